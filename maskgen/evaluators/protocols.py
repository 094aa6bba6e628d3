"""The four protocols of FID: how published tools prepare images for Inception-v3.

Their resizing and scales differ, so that no single number equals all of them (docs/evaluation.md).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from maskgen.errors import UserError, nearest
from maskgen.models.inception import SIDE, InceptionV3, Outputs
from maskgen.numerics import resizing

# From float32 [b, h, w, 3] in 0..255 to float32 [b, 299, 299, 3] in the network's range.
Prepare = Callable[[jax.Array], jax.Array]


def _tensorflow(images: jax.Array) -> jax.Array:
  return (resizing.bilinear_tf1(images, SIDE) - 128) / 128


def _clean(images: jax.Array) -> jax.Array:
  return (jnp.clip(resizing.bicubic_pillow(images, SIDE), 0, 255) - 128) / 128


def _pytorch(images: jax.Array) -> jax.Array:
  return 2 * resizing.bilinear_half_pixel(images / 255, SIDE) - 1


PROTOCOLS: dict[str, Prepare] = {
  "adm": _tensorflow,
  "torch-fidelity": _tensorflow,
  "clean": _clean,
  "pytorch-fid": _pytorch,
}


def check(protocol: str) -> None:
  """Checks the name of a protocol.

  Raises:
    UserError: if there is none.
  """
  if protocol not in PROTOCOLS:
    raise UserError(f"protocol '{protocol}' does not exist{nearest(protocol, PROTOCOLS)}")


def open_inception(params: object, protocol: str) -> Callable[[jax.Array], Outputs]:
  """Returns a function from images uint8 [b, h, w, 3] to what Inception-v3 computes of them."""
  prepare = PROTOCOLS[protocol]
  apply = jax.jit(InceptionV3().apply)
  # Images are prepared one operation at a time: fused ones round differently, see `resizing.bilinear_tf1`.
  return lambda images: apply({"params": params}, prepare(images.astype(jnp.float32)))
