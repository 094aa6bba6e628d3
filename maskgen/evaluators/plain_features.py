"""Features without an encoder, to compare encoders with: pixels, patches and codes, of a limited width."""

import functools
import math

import jax
import jax.numpy as jnp

from maskgen import images as images_lib
from maskgen.evaluators.feature_spaces import area_average
from maskgen.numerics import clusters

_PATCH, _STRIDE = 6, 2  # pixels
CLUSTERS = 256
_CONTRAST = 10 / 255**2  # added to the variance of a patch: flat ones shall not become noise
QUADRANTS = 4
_IMAGES = 32  # at once: each has hundreds of patches


def reduced(images: jax.Array, width: int) -> jax.Array:
  """Images float32 [b, h, w, c] in [0, 1], averaged over areas if they have more than `width` values each."""
  _, rows, columns, channels = images.shape
  side = math.isqrt(width // channels)
  small = images_lib.to_float(images)
  if rows * columns * channels > width:
    small = area_average(small, min(side, rows), min(side, columns))
  return small


def pooled_pixels(images: jax.Array, width: int) -> jax.Array:
  """The pixels of images [b, h, w, c], `reduced`: float32 [b, d]."""
  return reduced(images, width).reshape(len(images), -1)


def patches(images: jax.Array) -> jax.Array:
  """Square patches of images float32 [b, h, w, c], without brightness and contrast: [b, h', w', d]."""
  side = min(_PATCH, *images.shape[1:3])
  found = jax.lax.conv_general_dilated_patches(
    images, (side, side), (_STRIDE, _STRIDE), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  centred = found - found.mean(axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(found.var(axis=-1, keepdims=True) + _CONTRAST)


@functools.partial(jax.jit, static_argnums=1)
def patch_clusters(images: jax.Array, width: int) -> clusters.State:
  """Finds clusters of whitened patches, as Coates and Ng 2012, section 3.

  Args:
    images: [n, h, w, c], a sample of the training images in a random order.
    width: the largest number of features that `patch_features` shall make.
  """
  size = min(_IMAGES, len(images))
  batches = images[: len(images) // size * size].reshape(-1, size, *images.shape[1:])

  def find(few: jax.Array) -> jax.Array:
    return patches(reduced(few, width))

  def update(state: clusters.State, batch: tuple[jax.Array, jax.Array]) -> tuple[clusters.State, None]:
    number, few = batch
    found = find(few)
    key = jax.random.fold_in(jax.random.key(0), number)
    return clusters.update(state, found.reshape(-1, found.shape[-1]), key)[1], None

  first = jax.eval_shape(find, batches[0])
  state = clusters.init(min(CLUSTERS, width // QUADRANTS), first.shape[-1])
  return jax.lax.scan(update, state, (jnp.arange(len(batches)), batches))[0]


def patch_features(state: clusters.State, images: jax.Array, width: int) -> jax.Array:
  """How near the patches in each quadrant are to each cluster, float32 [b, 4 * K].

  A patch counts by how much nearer than the mean distance a cluster is (Coates, Ng and Lee 2011, section
  3.2.2).

  Args:
    state: as `patch_clusters` returns it.
    images: [b, h, w, c].
    width: as given to `patch_clusters`.
  """
  centroids = clusters.centroids(state)

  def pool(image: jax.Array) -> jax.Array:
    found = patches(image[None])[0]
    rows, columns, depth = found.shape
    cosines = clusters.whiten(state, found.reshape(-1, depth)) @ centroids.T
    distances = jnp.sqrt(jnp.maximum(2.0 - 2.0 * cosines, 0.0)).reshape(rows, columns, -1)
    near = jnp.maximum(distances.mean(axis=-1, keepdims=True) - distances, 0.0)
    middle, centre = (rows + 1) // 2, (columns + 1) // 2
    halves = [
      half for part in (near[:middle], near[middle:]) for half in (part[:, :centre], part[:, centre:])
    ]
    return jnp.concatenate([half.sum(axis=(0, 1)) for half in halves])

  return jax.lax.map(pool, reduced(images, width), batch_size=min(_IMAGES, len(images)))


def token_histogram(tokens: jax.Array, codes: int, width: int) -> jax.Array:
  """How often each code is among tokens int32 [b, n]: float32 [b, codes], `hashed`."""
  counts = jnp.zeros((len(tokens), codes)).at[jnp.arange(len(tokens))[:, None], tokens].add(1.0)
  return hashed(counts, width)


def hashed_onehot(tokens: jax.Array, codes: int, width: int) -> jax.Array:
  """One-hot codes of each position, float32 [b, n * codes], or at most `width` random signed sums of them.

  As `hashed`, without the one-hot codes in memory.

  Args:
    tokens: int32 [b, n].
    codes: the size of the codebook.
    width: the largest number of features.
  """
  b, n = tokens.shape
  if n * codes <= width:
    return jax.nn.one_hot(tokens, codes).reshape(b, -1)
  bucket, signs = _sums(n * codes, width)
  at = jnp.arange(n)[None] * codes + tokens
  rows = jnp.arange(b)[:, None]
  return jnp.zeros((b, width)).at[rows, bucket[at]].add(signs[at])


def hashed(features: jax.Array, width: int) -> jax.Array:
  """Features float32 [b, d], or `width` random signed sums of them, if they are more.

  Inner products stay the same in expectation (Weinberger et al. 2009). The sums are fixed, so that all
  batches and both splits have the same.
  """
  b, d = features.shape
  if d <= width:
    return features
  bucket, signs = _sums(d, width)
  return jnp.zeros((b, width)).at[:, bucket].add(features * signs[None])


def _sums(count: int, width: int) -> tuple[jax.Array, jax.Array]:
  """For each of `count` features the sum that it belongs to, int32, and its sign there, float32."""
  place, sign = jax.random.split(jax.random.key(0))
  return jax.random.randint(place, (count,), 0, width), jax.random.rademacher(sign, (count,), jnp.float32)
