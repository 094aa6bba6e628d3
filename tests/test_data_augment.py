"""What all augmentations promise; those of colour and sharpness against Pillow, SciPy and colorsys."""

import collections
import colorsys
import functools
import itertools

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from PIL import Image, ImageEnhance

from maskgen.data import augment, rand_augment
from maskgen.data.cpu_tf import tf
from maskgen.data.ops import OPS

OURS = {
  "color_jitter": augment.color_jitter,
  "grayscale": augment.grayscale,
  "blur": functools.partial(augment.blur, probability=0.8),
  "rand_augment": functools.partial(rand_augment.rand_augment, increasing=True, method="bicubic"),
}


def picture(
  height: int = 37, width: int = 45, channels: int = 3, low: int = 0, high: int = 255
) -> np.ndarray:
  """Smooth colours with some noise, between two levels."""
  generator = np.random.default_rng(0)
  coarse = generator.uniform(low, high, (5, 6, channels))
  smooth = scipy.ndimage.zoom(coarse, (height / 5, width / 6, 1), order=1)
  noisy = smooth + generator.normal(0, (high - low) / 15, smooth.shape)
  return np.clip(noisy, low, high).astype(np.uint8)


def pillow(image: np.ndarray) -> Image.Image:
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def difference(ours: tf.Tensor, theirs) -> np.ndarray:
  """The difference of two images in grey levels, [h, w, c]."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.dtype == np.uint8
  return np.abs(ours.astype(int) - theirs.reshape(ours.shape).astype(int))


def seeds(count: int, start: int = 3) -> tf.Tensor:
  return tf.random.experimental.stateless_split(tf.constant([start, 4], tf.int64), count)


def compiled(augmented):
  """A function of a seed alone, whose operations are not called one by one from Python."""
  return tf.function(augmented, input_signature=[tf.TensorSpec([2], tf.int64)])


# All ops


def test_specifications_find_them():
  assert set(OURS) <= set(OPS)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("channels", [1, 3])
def test_eager_and_tf_data_agree(name, channels):
  # Eager operations use all threads, this data set only one in each.
  augmented = OURS[name]
  image = tf.constant(picture(channels=channels))
  dataset = tf.data.Dataset.from_tensor_slices(seeds(40)).map(
    lambda seed: augmented(image, seed=seed), num_parallel_calls=2
  )
  options = tf.data.Options()
  options.threading.max_intra_op_parallelism = 1
  assert dataset.element_spec == tf.TensorSpec(image.shape, tf.uint8)
  for seed, result in zip(seeds(40), dataset.with_options(options), strict=True):
    np.testing.assert_array_equal(augmented(image, seed=seed), result)


@pytest.mark.parametrize("name", OURS)
def test_unknown_sizes_stay_unknown(name):
  def augmented(image):
    result = OURS[name](image, seed=tf.constant([1, 2], tf.int64))
    assert result.shape.as_list() == [None, None, 3] and result.dtype == tf.uint8
    return result

  image = tf.constant(picture())
  graph = tf.function(augmented, input_signature=[tf.TensorSpec([None, None, 3], tf.uint8)])
  np.testing.assert_array_equal(graph(image), OURS[name](image, seed=tf.constant([1, 2], tf.int64)))


@pytest.mark.parametrize("name", OURS)
def test_the_seed_alone_decides(name):
  image = tf.constant(picture())
  first, again = ([OURS[name](image, seed=seed).numpy() for seed in seeds(30)] for _ in range(2))
  np.testing.assert_array_equal(first, again)
  assert len({result.tobytes() for result in first}) > (1 if name == "grayscale" else 10)


@pytest.mark.parametrize(
  ("name", "others", "probability"),
  [
    ("color_jitter", {}, 0.8),
    ("grayscale", {}, 0.2),
    ("blur", {"sigma": (1.0, 2.0)}, 0.5),
    ("blur", {"sigma": (1.0, 2.0)}, 0.0),
  ],
)
def test_probability(name, others, probability):
  image = tf.constant(picture(8, 8))
  augmented = compiled(lambda seed: OURS[name](image, **others, probability=probability, seed=seed))
  results = [augmented(seed) for seed in seeds(400)]
  changed = sum(not np.array_equal(result, image) for result in results)
  assert scipy.stats.binomtest(changed, 400, probability).pvalue > 0.01


@pytest.mark.parametrize(
  ("name", "arguments", "message"),
  [
    ("color_jitter", {"brightness": -1}, "brightness is -1, not a number of at least 0"),
    ("color_jitter", {"contrast": "a"}, "contrast is 'a', not a number of at least 0"),
    ("color_jitter", {"saturation": (0.5, 1)}, r"saturation is \(0.5, 1\), not a number"),
    ("color_jitter", {"saturation": float("inf")}, "saturation is inf, not a number"),
    ("color_jitter", {"hue": 0.6}, "hue is 0.6, not a number from 0 to 0.5"),
    ("color_jitter", {"probability": 2}, "probability is 2, not a number from 0 to 1"),
    ("grayscale", {"probability": -0.1}, "probability is -0.1, not a number from 0 to 1"),
    ("blur", {"sigma": 2.0}, r"sigma is 2.0, not \(low, high\) with 0 < low <= high"),
    ("blur", {"sigma": (2, 1)}, r"sigma is \(2, 1\)"),
    ("blur", {"sigma": (0, 1)}, r"sigma is \(0, 1\)"),
    ("blur", {"sigma": (1, "a")}, r"sigma is \(1, 'a'\)"),
    ("blur", {"probability": None}, "probability is None, not a number from 0 to 1"),
    ("rand_augment", {"layers": 0}, r"layers is 0, not a number of operations \(1 or more\)"),
    ("rand_augment", {"layers": 1.5}, "layers is 1.5"),
    ("rand_augment", {"magnitude": 11}, "magnitude is 11, not a number from 0 to 10"),
    ("rand_augment", {"std": -1}, "std is -1, not a number of at least 0"),
    ("rand_augment", {"increasing": 1}, "increasing is 1, not True or False"),
    ("rand_augment", {"method": "nearest"}, "method is 'nearest', not one of bilinear, bicubic"),
    ("rand_augment", {"fill": (1, 2)}, r"fill is \(1, 2\), not a level from 0 to 255, or one for each"),
    ("rand_augment", {"fill": 256}, "fill is 256"),
    ("rand_augment", {"std": True}, "std is True, not a number of at least 0"),
  ],
)
def test_refused_arguments(name, arguments, message):
  with pytest.raises(ValueError, match=message):
    OURS[name](tf.constant(picture(4, 4)), **arguments, seed=seeds(1)[0])


@pytest.mark.parametrize("name", OURS)
def test_refused_images(name):
  image = tf.constant(picture(4, 4, channels=4))
  with pytest.raises(ValueError, match="image is uint8 with 4 channels, not uint8 with 1 or 3 channels"):
    OURS[name](image, seed=seeds(1)[0])
  with pytest.raises(ValueError, match="image is float32 with 3 channels"):
    OURS[name](tf.cast(image[..., :3], tf.float32), seed=seeds(1)[0])


# Colour jitter

JITTER = ("brightness", "contrast", "saturation", "hue")


def jitter(image: np.ndarray, seed: tf.Tensor, **amounts: float) -> np.ndarray:
  amounts = {**dict.fromkeys(JITTER, 0.0), **amounts}
  return augment.color_jitter(tf.constant(image), **amounts, probability=1.0, seed=seed).numpy()


@pytest.mark.parametrize(
  ("name", "enhancer", "statistic"),
  [
    ("brightness", ImageEnhance.Brightness, np.mean),
    ("contrast", ImageEnhance.Contrast, np.std),
    ("saturation", ImageEnhance.Color, lambda image: np.std(image[..., 0] - image[..., 1])),
  ],
)
def test_jitter_is_uniform_and_agrees_with_pillow(name, enhancer, statistic):
  image = picture(low=80, high=165)  # nothing is clipped
  factors = []
  for seed in seeds(150):
    result = jitter(image, seed, **{name: 0.5})
    # The factor shows in what it scales.
    factors.append(statistic(result.astype(float)) / statistic(image.astype(float)))
    # Pillow cuts fractions off, and has whole levels of grey.
    assert difference(result, np.asarray(enhancer(pillow(image)).enhance(factors[-1]))).max() <= 2
  assert 0.49 < min(factors) < 0.53 and 1.47 < max(factors) < 1.51
  assert scipy.stats.kstest(factors, scipy.stats.uniform(0.5, 1.0).cdf).pvalue > 0.01


def test_jitter_turns_the_hue_as_colorsys_does():
  image = picture(6, 7)
  hsv = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(-1, 3) / 255])
  sharpest = np.argmax(hsv[:, 1] * hsv[:, 2])
  shifts = []
  for seed in seeds(150):
    result = jitter(image, seed, hue=0.3)
    turned = colorsys.rgb_to_hsv(*result.reshape(-1, 3)[sharpest] / 255)[0]
    shifts.append((turned - hsv[sharpest, 0] + 0.5) % 1.0 - 0.5)
    expected = [colorsys.hsv_to_rgb((h + shifts[-1]) % 1.0, s, v) for h, s, v in hsv]
    assert difference(result, np.rint(255 * np.array(expected))).max() <= 2
  assert -0.31 < min(shifts) < -0.28 and 0.28 < max(shifts) < 0.31
  assert scipy.stats.kstest(shifts, scipy.stats.uniform(-0.3, 0.6).cdf).pvalue > 0.01


def test_a_factor_is_never_negative():
  darkest = min(jitter(np.full((1, 1, 1), 200, np.uint8), seed, brightness=3.0).item() for seed in seeds(40))
  assert darkest < 40  # uniform in [0, 4]


def test_jitter_of_nothing_changes_nothing():
  image = picture()
  np.testing.assert_array_equal(jitter(image, seeds(1)[0]), image)


def test_jitter_of_grey_has_no_colour():
  grey = picture(channels=1)
  np.testing.assert_array_equal(jitter(grey, seeds(1)[0], saturation=1.0, hue=0.5), grey)
  same = np.repeat(grey, 3, axis=-1)
  for seed in seeds(10):
    one, three = (jitter(image, seed, brightness=0.8, contrast=0.8) for image in (grey, same))
    assert difference(one.repeat(3, axis=-1), three).max() <= 1


def test_jitter_takes_every_order(monkeypatch):
  called: list[str] = []

  def recorder(name):
    return lambda image, factor: called.append(name) or image

  for name in ("brightness", "contrast", "saturation"):
    monkeypatch.setattr(augment, f"_adjust_{name}", recorder(name))
  monkeypatch.setattr(tf.image, "adjust_hue", recorder("hue"))
  for seed in seeds(480):
    jitter(picture(1, 1), seed)
  orders = collections.Counter(zip(*[iter(called)] * 4, strict=True))
  assert set(orders) == set(itertools.permutations(JITTER))
  assert scipy.stats.chisquare(list(orders.values())).pvalue > 0.01


# Grayscale and blur


def test_grayscale_is_the_luma_of_pillow():
  image = picture()
  grey = augment.grayscale(tf.constant(image), 1.0, seed=seeds(1)[0])
  luma = np.asarray(pillow(image).convert("L"))[..., None]
  np.testing.assert_array_equal(grey, luma.repeat(3, axis=-1))
  np.testing.assert_array_equal(augment.grayscale(tf.constant(luma), 1.0, seed=seeds(1)[0]), luma)


@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.0, 1.7, 2.0, 5.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_blur_agrees_with_scipy(sigma, channels):
  image = picture(channels=channels)
  ours = augment.blur(tf.constant(image), (sigma, sigma), 1.0, seed=seeds(1)[0])
  scipys = scipy.ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0))
  errors = difference(ours, np.rint(scipys))
  assert errors.max() <= 1 and errors.mean() < 1e-3  # halves may round either way


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 20, 1), (20, 5, 3)])
def test_images_smaller_than_the_gaussian(shape):
  image = tf.constant(picture(*shape))
  ours = augment.blur(image, (2.0, 2.0), 1.0, seed=seeds(1)[0]).numpy()
  scipys = scipy.ndimage.gaussian_filter(image.numpy().astype(float), (2, 2, 0), radius=min(*shape[:2], 8))
  assert difference(ours, np.rint(scipys)).max() <= 1


def test_sigma_is_uniform():
  edge = np.tile(np.repeat(np.array([0, 255], np.uint8), 10), (8, 1))

  def steepness(blurred) -> float:
    return blurred[0, 9] - float(blurred[0, 10])

  image = tf.constant(edge[..., None])
  blurred = compiled(lambda seed: augment.blur(image, (0.5, 2.0), 1.0, seed=seed))
  found = [steepness(blurred(seed).numpy()[..., 0].astype(float)) for seed in seeds(200)]
  sigmas = np.linspace(0.4, 2.5, 300)
  known = [steepness(scipy.ndimage.gaussian_filter(edge.astype(float), sigma)) for sigma in sigmas]
  drawn = np.interp(found, known, sigmas)  # to 1/20, because of the rounding
  assert 0.48 < drawn.min() < 0.55 and 1.9 < drawn.max() < 2.06
  assert scipy.stats.kstest(drawn, scipy.stats.uniform(0.5, 1.5).cdf).pvalue > 0.01
