"""Feature spaces in which sets of images are compared, by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

_PIXELS_SIDE = 8


def area_weights(size: int, target: int) -> np.ndarray:
  """The matrix [target, size] that averages `size` samples over `target` equal intervals."""
  ends = np.arange(target + 1) * (size / target)
  starts = np.arange(size)
  overlap = np.minimum(ends[1:, None], starts + 1) - np.maximum(ends[:-1, None], starts)
  return np.maximum(overlap, 0.0) * (target / size)


def pixels(images: jax.Array) -> jax.Array:
  """Images float32 [b, h, w, c], averaged over areas to 8 x 8: float32 [b, 64 * c]."""
  rows = area_weights(images.shape[1], _PIXELS_SIDE).astype(np.float32)
  columns = area_weights(images.shape[2], _PIXELS_SIDE).astype(np.float32)
  small = jnp.einsum("yh,bhwc,xw->byxc", rows, images, columns, precision="highest")
  return small.reshape(len(images), -1)


# float32 images [b, h, w, c] in [0, 1] -> float32 features [b, d].
SPACES: dict[str, Callable[[jax.Array], jax.Array]] = {"pixels": pixels}
