"""Compares sets of pictures in the features of a network: FID and its family, with their names.

Metrics in the features of Inception-v3 are called after a protocol, a reference and the labels of the
generated pictures, such as `fid50k/adm/imagenet_256/balanced`; those of another network after the network,
such as `frechet_mobilenet_v2` and `kid_mobilenet_v2`.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from maskgen import images as images_lib
from maskgen import tree
from maskgen.errors import UserError, nearest
from maskgen.evaluators import feature_spaces, protocols, set_metrics
from maskgen.evaluators.batches import gather
from maskgen.evaluators.context import Context
from maskgen.evaluators.frechet import Gaussian, Moments, distance
from maskgen.importers import inception
from maskgen.models.inception import FEATURES, Outputs

INCEPTION, DEFAULT_PROTOCOL = "inception_v3", "adm"
# Metrics, and what they need of each set: keys of `Features`.
METRICS = {
  "fid": ("pooled_moments",),
  "rfid": ("pooled_moments",),
  "sfid": ("spatial_moments",),
  "is": ("logits",),
  "kid": ("pooled",),
  "precision": ("pooled",),
  "recall": ("pooled",),
  "density": ("pooled",),
  "coverage": ("pooled",),
}
# Those that other networks have, and those that each protocol's tool reports.
_OF_ANY_NETWORK = ("fid", "kid", "precision", "recall", "density", "coverage")
DEFAULTS = {
  "adm": ("fid", "sfid", "is", "precision", "recall"),
  "torch-fidelity": ("fid", "is", "kid", "precision", "recall"),
  "clean": ("fid", "kid"),
  "pytorch-fid": ("fid",),
  "": ("fid", "kid"),
}
# How pictures were labelled: a part of the names of metrics.
LABELS = ("unstated", "unconditional", "random", "balanced", "captions")
# Published distances are those of this number of samples.
_USUAL = 50_000

log = logging.getLogger("maskgen")


@dataclasses.dataclass(frozen=True)
class Network:
  """A feature network.

  Attributes:
    name: "inception_v3", or the name of a feature space.
    protocol: how pictures are prepared for Inception-v3, a name in `protocols.PROTOCOLS`; "" for others.
    weights: the fingerprint of its weights; "" if it has none.
    extract: from images [b, h, w, c], uint8 or float32 in [0, 1], to "pooled" [b, d], and for Inception-v3
      "spatial" and "logits".
  """

  name: str
  protocol: str
  weights: str
  extract: Callable[[jax.Array], Mapping[str, Any]]

  def width(self, size: tuple[int, int], channels: int = 3) -> int:
    """The number of pooled features of a picture of this (height, width)."""
    if self.protocol:
      return FEATURES
    if not self.weights:  # cheap, and perhaps no function of JAX
      return self.extract(jnp.zeros((1, *size, channels), jnp.uint8))["pooled"].shape[1]
    image = jax.ShapeDtypeStruct((1, *size, channels), jnp.uint8)
    return jax.eval_shape(self.extract, image)["pooled"].shape[1]


def check_features(spec: str, protocol: str = "") -> None:
  """Checks that `open_network` knows a network, and its file if one is given.

  Raises:
    UserError: if not.
  """
  name, _, path = spec.partition(":")
  if name != INCEPTION:
    feature_spaces.check_space(spec)
    if protocol:
      raise UserError(f"protocol '{protocol}' is for {INCEPTION}, not for {name}: leave it out")
    return
  protocols.check(protocol or DEFAULT_PROTOCOL)
  if path and not epath.Path(path).expanduser().exists():
    raise UserError(f"the weights {path} of {INCEPTION} do not exist: give the path of {inception.FILE}")


def open_network(spec: str, protocol: str = "", context: Context | None = None) -> Network:
  """Opens a feature network.

  Args:
    spec: "inception_v3:/path/to/weights", or "inception_v3" for the published weights, which are downloaded
      once; or what `feature_spaces.open_space` takes.
    protocol: how pictures are prepared for Inception-v3, by default "adm".
    context: the context of the run whose images are compared, if it is a run; the network is added to its
      `networks`.

  Raises:
    UserError: as `check_features` and importers do.
  """
  check_features(spec, protocol)
  name, _, path = spec.partition(":")
  if name == INCEPTION:
    network = open_inception(inception.load(path or inception.fetch()), protocol or DEFAULT_PROTOCOL)
    if context is not None:
      context.networks[network.name] = {"protocol": network.protocol, "weights": network.weights}
    return network
  space = feature_spaces.open_space(spec, context)
  return Network(space.name, "", space.weights, lambda images: {"pooled": space(images)})


def open_inception(params: Any, protocol: str) -> Network:
  """Returns Inception-v3 with parameters, which are copied to the devices of the images at first use."""
  protocols.check(protocol)

  @functools.cache
  def apply_on(devices: jax.sharding.Sharding) -> Callable[[jax.Array], Outputs]:
    return protocols.open_inception(jax.device_put(params, devices), protocol)

  def extract(images: jax.Array) -> Mapping[str, Any]:
    devices = images.sharding
    if isinstance(devices, NamedSharding):
      devices = NamedSharding(devices.mesh, PartitionSpec())
    outputs = apply_on(devices)(images_lib.to_rgb_on_devices(images))
    return {"pooled": outputs.pooled, "spatial": outputs.spatial, "logits": outputs.logits_unbiased}

  return Network(INCEPTION, protocol, tree.fingerprint(params), extract)


@dataclasses.dataclass(frozen=True)
class Features:
  """What metrics read of a set of pictures; None for what was not asked for.

  Attributes:
    name: of the set, for messages.
    pooled_moments: the Gaussian of the features.
    spatial_moments: that of the spatial features.
    pooled: float32 [n, d].
    logits: float32 [n, classes].
  """

  name: str
  pooled_moments: Gaussian | None = None
  spatial_moments: Gaussian | None = None
  pooled: np.ndarray | None = None
  logits: np.ndarray | None = None

  @property
  def count(self) -> int | None:
    """The number of pictures, if it is known."""
    if self.pooled_moments is not None:
      return self.pooled_moments.count
    rows = self.pooled if self.pooled is not None else self.logits
    return None if rows is None else len(rows)


def collect(name: str, batches: Iterable[Mapping[str, Any]], needs: Iterable[str]) -> Features:
  """Streams the features of a set of pictures.

  Args:
    name: of the set, for messages.
    batches: what `Network.extract` returns, without padding.
    needs: keys of `Features`; only these are kept.

  Raises:
    UserError: if a feature is not finite.
  """
  moments = {need: Moments() for need in needs if need.endswith("_moments")}
  kept: dict[str, list[np.ndarray]] = {need: [] for need in needs if need not in moments}
  wanted = {need.removesuffix("_moments") for need in needs}
  seen = 0
  for batch in batches:
    arrays = {key: gather(batch[key]) for key in wanted}
    for array in arrays.values():
      if len(wrong := np.flatnonzero(~np.isfinite(array).all(axis=1))):
        raise UserError(
          f"picture {seen + wrong[0]} of {name} has features that are not finite: check the weights of the "
          "feature network"
        )
    seen += len(next(iter(arrays.values())))
    for need, accumulated in moments.items():
      accumulated.add(arrays[need.removesuffix("_moments")])
    for need, rows in kept.items():
      rows.append(arrays[need].astype(np.float32))
  set_metrics.check_count(f"'{name}'", seen, 2, "pictures")
  found: dict[str, Any] = {need: accumulated.gaussian() for need, accumulated in moments.items()}
  found |= {need: np.concatenate(rows) for need, rows in kept.items()}
  return Features(name, **found)


def check_metrics(metrics: Iterable[str], protocol: str, others: Sequence[str] = ()) -> None:
  """Checks that a protocol, or with "" any other network, has metrics.

  Args:
    metrics: the metrics.
    protocol: the protocol.
    others: metrics that need no network.

  Raises:
    UserError: if not.
  """
  for metric in metrics:
    if metric in others:
      continue
    if metric not in METRICS:
      raise UserError(f"metric '{metric}' does not exist{nearest(metric, (*METRICS, *others))}")
    if not protocol and metric not in _OF_ANY_NETWORK:
      raise UserError(f"metric '{metric}' needs Inception-v3: leave it out, or use the features {INCEPTION}")
    if metric == "sfid" and protocol != "adm":
      raise UserError("metric 'sfid' is defined by ADM's evaluator: use the protocol adm, or leave it out")


def needs_of(metrics: Iterable[str]) -> set[str]:
  """The keys of `Features` that metrics read of generated pictures."""
  return {need for metric in metrics for need in METRICS[metric]}


def reference_needs_of(metrics: Iterable[str]) -> set[str]:
  """The keys of `Features` that metrics read of reference pictures."""
  return needs_of(metric for metric in metrics if metric != "is")


def check_counts(metrics: Iterable[str], count: int, what: str, network: Network, width: int) -> None:
  """Checks that there are enough pictures, and warns if there are few.

  Args:
    metrics: the metrics.
    count: the number of pictures.
    what: names them.
    network: the network.
    width: the number of its features.

  Raises:
    UserError: if there are fewer than a metric needs.
  """
  if {"fid", "rfid", "sfid"} & {*metrics}:
    if network.protocol:
      set_metrics.check_count(f"FID on {width:,} features", count, width, f"pictures in {what}")
    elif count < width:
      log.warning(
        "%s has %d pictures for %d features, n/d = %.2f: its Frechet distance depends on the number",
        what,
        count,
        width,
        count / width,
      )
  if "kid" in metrics:
    set_metrics.check_count("KID", count, 1000, f"pictures in {what}")
  if network.protocol and count < _USUAL:
    log.warning(
      "%s has %d pictures: published values of FID and its family are of 50,000, and others are biased",
      what,
      count,
    )


def compute(
  metrics: Sequence[str], network: Network, generated: Features, real: Features
) -> dict[str, float]:
  """Computes metrics; `is_std` and `kid_std` come with theirs.

  Raises:
    UserError: if a set has fewer pictures than a metric needs.
  """
  numbers: dict[str, float] = {}
  for names, key in ((("fid", "rfid"), "pooled_moments"), (("sfid",), "spatial_moments")):
    if asked := [name for name in names if name in metrics]:
      numbers |= dict.fromkeys(asked, distance(getattr(generated, key), getattr(real, key)))
  if "is" in metrics:
    assert generated.logits is not None
    if network.protocol == "adm":
      numbers["is"] = set_metrics.inception_score_in_slices(generated.logits)
    else:
      numbers["is"], numbers["is_std"] = set_metrics.inception_score(generated.logits)
  if "kid" in metrics:
    numbers["kid"], numbers["kid_std"] = set_metrics.kid(_rows(generated), _rows(real))
  for pair, k, strict in ((("precision", "recall"), 3, False), (("density", "coverage"), 5, True)):
    if wanted := set(pair) & set(metrics):
      half = network.protocol == "adm" and "precision" in pair
      found = set_metrics.manifold_metrics(_rows(generated), _rows(real), k=k, strict=strict, half=half)
      numbers |= {name: found[name] for name in pair if name in wanted}
  return numbers


def _rows(features: Features) -> np.ndarray:
  assert features.pooled is not None
  return features.pooled


def metric_name(metric: str, network: Network, count: int, reference: str, labels: str) -> str:
  """The name of a metric in results; see the module.

  Args:
    metric: a key of what `compute` returns.
    network: the network.
    count: the number of generated pictures.
    reference: the name of the reference.
    labels: one of `LABELS`.
  """
  if not network.protocol:
    return f"{'frechet' if metric == 'fid' else metric}_{network.name}"
  samples = f"{count // 1000}k" if count % 1000 == 0 else str(count)
  against = () if metric.startswith("is") else (reference,)
  return "/".join((f"{metric}{samples}", network.protocol, *against, labels))
