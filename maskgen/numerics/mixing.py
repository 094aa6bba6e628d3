"""Mixtures of images and their labels: mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019).

The partner of an image is the one at its position in the reversed batch, and all randomness of an example
comes from its own PRNG key: results do not depend on how the batch is sharded. The middle example of an odd
batch is unchanged.

Letters: b batch, h height, w width, c channels, k classes.
"""

import jax
import jax.numpy as jnp

from maskgen.errors import UserError

Mixed = tuple[jax.Array, jax.Array]


def mixup(keys: jax.Array, images: jax.Array, labels: jax.Array, alpha: float) -> Mixed:
  """Interpolates two images and their labels (Zhang et al. 2018, section 2).

      x~ = l x + (1 - l) x'        y~ = l y + (1 - l) y'        l ~ Beta(alpha, alpha)

  The weight l is drawn for each example; the paper's code draws one for each batch.

  Args:
    keys: PRNG keys [b].
    images: floats [b, h, w, c].
    labels: floats [b, k], probabilities of classes.
    alpha: above 0; small values give weights near 0 and 1, 1 gives uniform weights.

  Returns:
    images and labels of the same shapes and dtypes.

  Raises:
    UserError: if alpha is not above 0.
  """
  _, height, width, _ = images.shape
  return _mix(_mixup_weights(keys, height, width, alpha), images, labels)


def cutmix(keys: jax.Array, images: jax.Array, labels: jax.Array, alpha: float) -> Mixed:
  """Pastes a box of one image into another (Yun et al. 2019, section 3.1, equations 1 and 2).

      x~ = M x + (1 - M) x'        y~ = l y + (1 - l) y'        l ~ Beta(alpha, alpha)

  M is 0 in a box of h sqrt(1 - l) by w sqrt(1 - l) pixels, rounded down, around a uniformly random
  pixel. The box is clipped to the image, and l is replaced by the fraction of pixels that x keeps, as in the
  paper's code. Boxes are drawn for each example.

  For arguments, result and errors see `mixup`.
  """
  _, height, width, _ = images.shape
  return _mix(_cutmix_weights(keys, height, width, alpha), images, labels)


def mixup_or_cutmix(
  keys: jax.Array,
  images: jax.Array,
  labels: jax.Array,
  mixup_alpha: float = 0.8,
  cutmix_alpha: float = 1.0,
  switch: float = 0.5,
) -> Mixed:
  """Chooses for each example: cutmix with probability `switch`, else mixup.

  The default alphas are those of MAE's fine-tuning (He et al. 2022, appendix A.1, table 9).

  Args:
    keys: PRNG keys [b].
    images: floats [b, h, w, c].
    labels: floats [b, k], probabilities of classes.
    mixup_alpha: alpha of `mixup`.
    cutmix_alpha: alpha of `cutmix`.
    switch: from 0 to 1.

  Returns:
    images and labels of the same shapes and dtypes.

  Raises:
    UserError: if an alpha is not above 0, or switch is not in [0, 1].
  """
  if not 0.0 <= switch <= 1.0:
    raise UserError(f"switch is {switch}: give a probability of cutmix from 0 to 1")
  _, height, width, _ = images.shape
  choice_keys, mixup_keys, cutmix_keys = _split(keys, 3)
  cut = jax.vmap(lambda key: jax.random.bernoulli(key, switch))(choice_keys)  # [b]
  weights = jnp.where(
    cut[:, None, None],
    _cutmix_weights(cutmix_keys, height, width, cutmix_alpha),
    _mixup_weights(mixup_keys, height, width, mixup_alpha),
  )
  return _mix(weights, images, labels)


def _mix(weights: jax.Array, images: jax.Array, labels: jax.Array) -> Mixed:
  """Mixes pixels by weights [b, h, w], and labels by the mean weight."""
  share = weights.mean(axis=(1, 2))[:, None]
  weights = weights[..., None]
  mixed_images = weights * images + (1.0 - weights) * images[::-1]
  mixed_labels = share * labels + (1.0 - share) * labels[::-1]
  return mixed_images.astype(images.dtype), mixed_labels.astype(labels.dtype)


def _mixup_weights(keys: jax.Array, height: int, width: int, alpha: float) -> jax.Array:
  """The same weight for all pixels of an example; float32 [b, h, w]."""
  return jnp.broadcast_to(_shares(keys, alpha)[:, None, None], (len(keys), height, width))


def _cutmix_weights(keys: jax.Array, height: int, width: int, alpha: float) -> jax.Array:
  """0 in the box and 1 around it; float32 [b, h, w]."""
  share_keys, y_keys, x_keys = _split(keys, 3)
  side = jnp.sqrt(1.0 - _shares(share_keys, alpha))
  rows, columns = _interval(y_keys, side, height), _interval(x_keys, side, width)
  return 1.0 - (rows[:, :, None] & columns[:, None, :]).astype(jnp.float32)


def _interval(keys: jax.Array, share: jax.Array, size: int) -> jax.Array:
  """True on floor(share * size) of `size` positions around a random one; bool [b, size]."""
  extent = jnp.floor(share * size).astype(jnp.int32)
  middle = jax.vmap(lambda key: jax.random.randint(key, (), 0, size))(keys)
  place = jnp.arange(size)[None] - (middle - extent // 2)[:, None]
  return (place >= 0) & (place < extent[:, None])


def _shares(keys: jax.Array, alpha: float) -> jax.Array:
  if not alpha > 0.0:
    raise UserError(f"alpha of mixup or cutmix is {alpha}: give a number above 0")
  return jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(keys)


def _split(keys: jax.Array, count: int) -> jax.Array:
  """PRNG keys [count, b], all different, from keys [b]."""
  return jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, count))(keys), 1, 0)
