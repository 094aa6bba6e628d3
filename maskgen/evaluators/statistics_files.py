"""Files of reference statistics: npz, with the arrays of ADM's and pytorch-fid's files, and a manifest.

`mu` [d] and `sigma` [d, d] are the mean and covariance of the features; `mu_s` and `sigma_s` those of the
spatial features of Inception-v3; `manifest` is a JSON object, see `Manifest`, which others' files lack.
"""

import dataclasses
import hashlib
import importlib.metadata
import io
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from maskgen import __version__, files
from maskgen.errors import UserError
from maskgen.evaluators import comparison
from maskgen.evaluators.comparison import Features, Network
from maskgen.evaluators.frechet import Gaussian
from maskgen.importers import tensors

# The arrays of each Gaussian.
_ARRAYS = {"pooled_moments": ("mu", "sigma"), "spatial_moments": ("mu_s", "sigma_s")}
_MANIFEST = "manifest"
# Looked up at import: a long run describes the packages that it runs with, not those installed since.
_PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "scikit-learn", "pillow")
_VERSIONS = {"maskgen": __version__, **{name: importlib.metadata.version(name) for name in _PACKAGES}}

log = logging.getLogger("maskgen")


@dataclasses.dataclass(frozen=True)
class Manifest:
  """How statistics were made.

  Attributes:
    network: name of the feature network.
    protocol: how pictures were prepared for it; "" unless it is Inception-v3.
    weights: the fingerprint of its weights.
    count: the number of pictures.
    size: (height, width) of the pictures before they were prepared.
    source: the data source.
    split: its split.
    preprocess: what was done to its records.
    fingerprint: of the records.
    jpeg_decoding: how JPEGs were decoded; "" if there were none.
    versions: of maskgen and the packages that numbers depend on.
  """

  network: str
  protocol: str
  weights: str
  count: int
  size: tuple[int, int]
  source: str
  split: str
  preprocess: str
  fingerprint: str
  jpeg_decoding: str
  versions: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Statistics:
  """A file that is the reference of a run.

  Attributes:
    path: of the file.
    features: its content.
    manifest: how they were made, or None.
  """

  path: str
  features: Features
  manifest: Manifest | None

  def check(self, metrics: Sequence[str], network: Network, shape: tuple[int, int, int]) -> None:
    """Checks that generated images of a shape (h, w, c) can be compared with them.

    Raises:
      UserError: if not.
    """
    for metric in metrics:
      if any(getattr(self.features, need) is None for need in comparison.reference_needs_of([metric])):
        raise UserError(
          f"metric '{metric}' needs what {self.path} does not have: leave it out, or the reference, which "
          "then is the training split"
        )
    *size, channels = shape
    width = network.width((size[0], size[1]), channels)
    check(self.path, self.features, self.manifest, network, (size[0], size[1]), width)
    if self.features.count is not None:
      comparison.check_counts(metrics, self.features.count, self.path, network, width)

  def facts(self) -> dict[str, Any]:
    """What it is, for receipts."""
    manifest = None if self.manifest is None else dataclasses.asdict(self.manifest)
    return {"path": self.path, "manifest": manifest, "sha256": hash_of(self.path)}


def hash_of(path: str) -> str:
  """The hash of a file."""
  return hashlib.sha256(epath.Path(path).read_bytes()).hexdigest()


def open_statistics(path: str) -> Statistics:
  """Opens the reference of a run.

  Raises:
    UserError: if there is no such file, or as `read` does.
  """
  found = read(path) if epath.Path(path).exists() else None
  if found is None:
    raise UserError(
      f"reference {path} is not a file of statistics: give an npz file of maskgen.tools.reference_stats"
    )
  return Statistics(path, *found)


def versions() -> dict[str, str]:
  """The versions of maskgen and of the packages that numbers depend on."""
  return dict(_VERSIONS)


def write(path: str, features: Features, manifest: Manifest) -> None:
  """Writes statistics; the file depends only on its contents."""
  arrays: dict[str, Any] = {_MANIFEST: np.array(json.dumps(dataclasses.asdict(manifest), indent=2))}
  for key, (mean, covariance) in _ARRAYS.items():
    if (found := getattr(features, key)) is not None:
      arrays |= {mean: found.mean, covariance: found.covariance}
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  files.replace(epath.Path(path), buffer.getvalue())


def read(path: str) -> tuple[Features, Manifest | None] | None:
  """Reads statistics; None if the file has none, but perhaps pictures.

  Raises:
    UserError: if the file is damaged, or its arrays do not fit each other.
  """
  try:
    with (
      epath.Path(path).open("rb") as file,
      np.load(file, allow_pickle=False) as archive,
    ):
      names = [name for pair in _ARRAYS.values() for name in pair if name in archive.files]
      arrays = {name: np.asarray(archive[name]) for name in names}
      text = str(archive[_MANIFEST]) if _MANIFEST in archive.files else None
    manifest = None if text is None else Manifest(**json.loads(text))
  except (*tensors.DAMAGE, OSError, TypeError, AttributeError) as error:
    raise UserError(f"{path} is not an intact npz file of statistics ({error}): create it again") from error
  if "mu" not in arrays:
    return None
  count = None if manifest is None else manifest.count
  found: dict[str, Any] = {}
  for key, (mean, covariance) in _ARRAYS.items():
    if mean not in arrays:
      continue
    numbers = all(arrays[name].dtype.kind in "fiu" for name in (mean, covariance) if name in arrays)
    fits = numbers and arrays[mean].ndim == 1 and covariance in arrays
    if not fits or arrays[covariance].shape != (len(arrays[mean]),) * 2:
      raise UserError(
        f"{path}: '{covariance}' does not fit '{mean}': give a mean [d] and a covariance [d, d]"
      )
    found[key] = Gaussian(arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64), count)
  return Features(path, **found), manifest


def check(
  path: str,
  statistics: Features,
  manifest: Manifest | None,
  network: Network,
  size: tuple[int, int],
  width: int,
) -> None:
  """Checks that statistics were made as the features that are compared with them.

  Args:
    path: of the file.
    statistics: its content.
    manifest: its manifest.
    network: that is used now.
    size: of the pictures.
    width: the number of features.

  Raises:
    UserError: if not.
  """
  gaussian = statistics.pooled_moments
  assert gaussian is not None
  if manifest is not None:
    for what, theirs, ours in (
      ("network", manifest.network, network.name),
      ("protocol", manifest.protocol, network.protocol),
      ("weights of the network", manifest.weights, network.weights),
      ("size of pictures", tuple(manifest.size), tuple(size)),
    ):
      if theirs != ours:
        raise UserError(
          f"{path} has statistics of another {what} ({theirs} instead of {ours}): create them again with "
          "maskgen.tools.reference_stats"
        )
  if len(gaussian.mean) != width:
    raise UserError(
      f"{path} has statistics of {len(gaussian.mean):,} features, but {network.name} has {width:,}: give "
      "those of the same network"
    )
  if manifest is None:
    log.warning("%s has no manifest: nothing shows how its statistics were made", path)
