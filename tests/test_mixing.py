import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from maskgen import sharding
from maskgen.config import Mesh
from maskgen.errors import UserError
from maskgen.numerics import mixing

MIXTURES = {
  "mixup": functools.partial(mixing.mixup, alpha=0.8),
  "cutmix": functools.partial(mixing.cutmix, alpha=1.0),
  "mixup_or_cutmix": mixing.mixup_or_cutmix,
}
each_mixture = pytest.mark.parametrize("mix", MIXTURES.values(), ids=MIXTURES)


def keys_of(count: int, seed: int = 0) -> jax.Array:
  return jax.random.split(jax.random.key(seed), count)


def weights_of(mix, keys: jax.Array, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
  """The weight of each example in its own mixture: pixels [b, h, w] and its share of the label [b].

  The first half of the batch is 1 and the second 0, to distinguish partners.
  """
  own = (np.arange(len(keys)) < len(keys) // 2).astype(np.float32)
  images = np.broadcast_to(own[:, None, None, None], (len(keys), *shape, 1))
  images, labels = jax.jit(mix)(keys, images, np.eye(2, dtype=np.float32)[own.astype(int)])
  pixels, shares = np.asarray(images)[..., 0], np.asarray(labels)[:, 1]
  return np.where(own[:, None, None] == 1, pixels, 1 - pixels), np.where(own == 1, shares, 1 - shares)


def examples(batch: int, shape: tuple[int, int, int] = (12, 10, 3), classes: int = 5):
  generator = np.random.default_rng(0)
  images = generator.random((batch, *shape), np.float32)
  return images, generator.dirichlet(np.ones(classes), batch).astype(np.float32)


@each_mixture
@pytest.mark.parametrize("batch", [8, 7])
def test_agrees_with_numpy(mix, batch):
  # With as many keys again, the probe gives the weights of odd batches too.
  keys = keys_of(batch)
  weights, _ = weights_of(mix, jnp.concatenate([keys, keys_of(batch, 1)]), (12, 10))
  weights = weights[:batch, :, :, None].astype(np.float64)
  images, labels = examples(batch)
  share = weights.mean(axis=(1, 2, 3))[:, None]
  partner = np.arange(batch)[::-1]
  mixed_images, mixed_labels = jax.jit(mix)(keys, images, labels)
  np.testing.assert_allclose(mixed_images, weights * images + (1 - weights) * images[partner], atol=1e-6)
  np.testing.assert_allclose(mixed_labels, share * labels + (1 - share) * labels[partner], atol=1e-6)
  np.testing.assert_allclose(np.sum(mixed_labels, axis=1), 1.0, atol=1e-6)


@each_mixture
def test_labels_have_the_share_of_pixels(mix):
  weights, shares = weights_of(mix, keys_of(200), (12, 10))
  np.testing.assert_allclose(shares, weights.mean(axis=(1, 2)), atol=1e-6)
  assert weights.min() >= 0.0 and weights.max() <= 1.0 and shares.std() > 0.1


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_draws_from_the_beta_distribution(alpha):
  mix = functools.partial(mixing.mixup, alpha=alpha)
  weights, shares = weights_of(mix, keys_of(3000), (1, 2))
  assert np.ptp(weights, axis=(1, 2)).max() == 0.0
  assert abs(shares.mean() - 0.5) < 4 * scipy.stats.beta(alpha, alpha).std() / 3000**0.5
  assert scipy.stats.kstest(shares, scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.01


def paper_box(generator, height: int, width: int, alpha: float) -> tuple[int, int]:
  """Height and width of a cutmix box within the image."""
  side = np.sqrt(1 - generator.beta(alpha, alpha))
  extents = []
  for size in (height, width):
    extent = int(side * size)
    start = generator.integers(size) - extent // 2
    extents.append(len(range(max(start, 0), min(start + extent, size))))
  return tuple(extents)


def test_cutmix_cuts_the_boxes_of_the_paper():
  height, width, count, alpha = 24, 16, 4000, 0.5
  mix = functools.partial(mixing.cutmix, alpha=alpha)
  weights, shares = weights_of(mix, keys_of(count), (height, width))
  assert set(np.unique(weights)) == {0.0, 1.0}
  cut = weights == 0
  rows, columns = cut.any(axis=2), cut.any(axis=1)
  np.testing.assert_array_equal(cut, rows[:, :, None] & columns[:, None, :])  # rectangles ...
  for places in (rows, columns):  # ... without gaps
    assert (np.abs(np.diff(places, axis=1, prepend=False, append=False)).sum(axis=1) <= 2).all()

  generator = np.random.default_rng(1)
  boxes = np.array([paper_box(generator, height, width, alpha) for _ in range(count)])
  assert scipy.stats.ks_2samp(rows.sum(axis=1), boxes[:, 0]).pvalue > 0.01
  assert scipy.stats.ks_2samp(columns.sum(axis=1), boxes[:, 1]).pvalue > 0.01
  expected = 1 - boxes.prod(axis=1) / (height * width)
  assert abs(shares.mean() - expected.mean()) < 4 * expected.std() * (2 / count) ** 0.5
  # Boxes that the border leaves alone have the aspect ratio of the image.
  whole = ~(rows[:, 0] | rows[:, -1] | columns[:, 0] | columns[:, -1])
  assert whole.sum() > 100
  assert (np.abs(rows[whole].sum(axis=1) / height - columns[whole].sum(axis=1) / width) < 1 / width).all()


def test_cutmix_reaches_every_pixel_evenly_along_the_middle():
  cut = weights_of(functools.partial(mixing.cutmix, alpha=1.0), keys_of(4000), (9, 9))[0] == 0
  share = cut.mean(axis=0)
  assert share.min() > 0.1 and share.argmax() in (30, 31, 32, 39, 40, 41, 48, 49, 50)
  # Extents of an even number of pixels are half a pixel off, hence no closer.
  np.testing.assert_allclose(share, share.T, atol=0.05)
  np.testing.assert_allclose(share, share[::-1, ::-1], atol=0.12)


@pytest.mark.parametrize("switch", [0.0, 0.3, 1.0])
def test_switch_is_the_probability_of_cutmix(switch):
  mix = functools.partial(mixing.mixup_or_cutmix, switch=switch)
  weights, _ = weights_of(mix, keys_of(2000), (8, 8))
  is_cutmix = np.isin(weights, (0.0, 1.0)).all(axis=(1, 2))
  # Mixup keeps one share in the whole image.
  assert np.ptp(weights[~is_cutmix], axis=(1, 2)).sum() == 0.0
  assert abs(is_cutmix.mean() - switch) < 4 * (switch * (1 - switch) / 2000) ** 0.5 + 1e-3


@each_mixture
def test_keys_alone_decide(mix):
  keys = keys_of(16)
  weights, _ = weights_of(mix, keys, (12, 10))
  others = keys_of(16, seed=1)
  mixed_keys = jnp.concatenate([keys[:3], others[3:]])
  again, _ = weights_of(mix, mixed_keys, (12, 10))
  np.testing.assert_array_equal(again[:3], weights[:3])
  assert (np.abs(again[3:] - weights[3:]).max(axis=(1, 2)) > 0).all()
  moved, _ = weights_of(mix, keys[jnp.arange(16)[::-1]], (12, 10))
  np.testing.assert_allclose(moved[::-1], weights, atol=1e-7)


@each_mixture
def test_eight_devices_give_what_one_gives(mix):
  images, labels = examples(16)
  keys = keys_of(16)
  alone = jax.jit(mix)(keys, images, labels)
  mesh = sharding.make_mesh(Mesh(data=4, fsdp=2))
  split = sharding.batch_sharding(mesh)
  batch = jax.device_put((keys, images, labels), split)
  together = jax.jit(mix, out_shardings=split)(*batch)
  assert len(together[0].sharding.device_set) == 8
  jax.tree.map(np.testing.assert_array_equal, alone, together)


@each_mixture
def test_shapes_and_dtypes_stay(mix):
  images, labels = examples(4)
  mixed = jax.eval_shape(mix, keys_of(4), jnp.asarray(images, jnp.bfloat16), jnp.asarray(labels))
  assert mixed[0].dtype == jnp.bfloat16 and mixed[0].shape == images.shape
  assert mixed[1].dtype == jnp.float32 and mixed[1].shape == labels.shape


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_alpha_is_positive(alpha):
  arguments = (keys_of(4), *examples(4))
  for mix in (mixing.mixup, mixing.cutmix):
    with pytest.raises(UserError, match=r"alpha of mixup or cutmix is .*: give a number above 0"):
      mix(*arguments, alpha)
  with pytest.raises(UserError, match="alpha"):
    mixing.mixup_or_cutmix(*arguments, cutmix_alpha=alpha)


@pytest.mark.parametrize("switch", [-0.1, 1.5, float("nan")])
def test_switch_is_a_probability(switch):
  with pytest.raises(UserError, match=r"switch is .*: give a probability"):
    mixing.mixup_or_cutmix(keys_of(4), *examples(4), switch=switch)
