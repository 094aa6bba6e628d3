"""Inception-v3's weights for FID: PyTorch's state dict `pt_inception-2015-12-05`, or the same as safetensors.

Its 472 tensors are those of TensorFlow's graph `classify_image_graph_def.pb`, which ADM's evaluator runs;
pytorch-fid and torch-fidelity publish the same file.
"""

import functools
import hashlib
import logging
import pathlib
import urllib.error
import urllib.request
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from maskgen import files, tree
from maskgen.errors import UserError
from maskgen.importers import tensors
from maskgen.models import inception

FILE = "pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
TIMEOUT = 60.0  # seconds without a byte

# Our leaves by module, and the axes of their arrays in PyTorch.
_LEAVES = {
  ("conv", "kernel"): ("weight", (3, 2, 0, 1)),
  ("bn", "scale"): ("weight", (0,)),
  ("bn", "bias"): ("bias", (0,)),
  ("bn", "mean"): ("running_mean", (0,)),
  ("bn", "var"): ("running_var", (0,)),
  ("fc", "kernel"): ("weight", (1, 0)),
  ("fc", "bias"): ("bias", (0,)),
}

log = logging.getLogger("maskgen")


def load(path: epath.PathLike) -> dict[str, Any]:
  """Reads the parameters of `InceptionV3`, float32.

  Raises:
    UserError: as `tensors.read` and `tensors.take` do, or if the file has a tensor that the network has not.
  """
  found = tensors.read(path)
  if unused := sorted(found.keys() - jax.eval_shape(to_pytorch, shapes()).keys()):
    raise UserError(
      f"{path} has a tensor '{unused[0]}' that the network of FID does not have, so it is another Inception: "
      f"give {FILE}"
    )
  return tensors.take(path, found, to_pytorch, shapes())


@functools.cache
def shapes() -> Any:
  """The shapes of the parameters."""
  images = jax.ShapeDtypeStruct((1, inception.SIDE, inception.SIDE, 3), jnp.float32)
  return jax.eval_shape(inception.InceptionV3().init, jax.random.key(0), images)["params"]


def to_pytorch(params: Any) -> dict[str, Any]:
  """Renames our parameters to PyTorch's names and layout."""
  renamed = {}
  for path, value in tree.flatten(params).items():
    *modules, leaf = path.split("/")
    name, axes = _LEAVES[modules[-1], leaf]
    renamed[".".join([*modules, name])] = value.transpose(axes)
  return renamed


def fetch(address: str = ADDRESS, sha256: str = SHA256) -> pathlib.Path:
  """Returns the path of the published file, which is downloaded if the cache folder does not have it.

  Raises:
    UserError: if it cannot be downloaded, or its checksum is not the published one.
  """
  path = files.cache_folder() / address.rpartition("/")[2]
  if path.exists():
    data = path.read_bytes()
  else:
    log.info("downloading %s to %s", address, path)
    try:
      with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
        data = response.read()
    except (OSError, urllib.error.URLError) as error:
      reason = getattr(error, "reason", error)
      raise UserError(
        f"{address} cannot be downloaded ({reason}): download it elsewhere and give --weights=FILE, or put "
        f"it into {path.parent}"
      ) from None
  if hashlib.sha256(data).hexdigest() != sha256:
    raise files.damaged(path, "its checksum is not the published one", f"remove it and fetch {address} again")
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(epath.Path(path), data)
  return path
