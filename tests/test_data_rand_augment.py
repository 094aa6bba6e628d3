"""RandAugment: its operations against Pillow, its random draws against what is documented."""

import collections

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from PIL import Image, ImageEnhance, ImageOps
from test_data_augment import difference, picture, pillow, seeds

from maskgen.data import rand_augment
from maskgen.data.cpu_tf import tf

# The operations

IMAGES = {
  "colours": picture(),
  "grey": picture(channels=1),
  "dim": picture(low=60, high=130),
  "flat": np.full((6, 5, 3), (0, 90, 255), np.uint8),
  "two levels": np.where(picture() > 100, 40, 200).astype(np.uint8),
  "tiny": picture(18, 15),  # 270 pixels: few more than levels
}
each_image = pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)


@each_image
@pytest.mark.parametrize("name", ["autocontrast", "equalize", "invert"])
def test_histogram_operations_are_those_of_pillow(name, image):
  ours = getattr(rand_augment, name)(tf.constant(image))
  assert difference(ours, getattr(ImageOps, name)(pillow(image))).max() == 0


@pytest.mark.parametrize(
  ("name", "amounts", "theirs"),
  [
    ("posterize", range(1, 9), ImageOps.posterize),
    ("posterize", (0,), lambda image, _: image.point(lambda level: 0)),
    ("solarize", (0, 1, 100, 255, 256), ImageOps.solarize),
    (
      "solarize_add",
      (0, 50, 110, 128),
      lambda image, amount: image.point(
        [min(255, level + amount) if level < 128 else level for level in range(256)] * len(image.getbands())
      ),
    ),
  ],
)
@pytest.mark.parametrize("kind", ["colours", "grey"])
def test_operations_on_levels_are_those_of_pillow(name, amounts, theirs, kind):
  image = IMAGES[kind]
  for amount in amounts:
    ours = getattr(rand_augment, name)(tf.constant(image), tf.constant(amount))
    assert difference(ours, theirs(pillow(image), amount)).max() == 0


@each_image
@pytest.mark.parametrize("factor", [0.1, 0.73, 1.0, 1.72, 1.9])
@pytest.mark.parametrize("name", ["color", "contrast", "brightness", "sharpness"])
def test_blends_are_those_of_pillow(name, factor, image):
  ours = getattr(rand_augment, name)(tf.constant(image), tf.constant(factor))
  enhancer = getattr(ImageEnhance, name.capitalize())
  assert difference(ours, enhancer(pillow(image)).enhance(factor)).max() == 0


@pytest.mark.parametrize(
  ("name", "amount", "coefficients"),
  [
    ("shear_x", 0.27, (1, 0.27, 0, 0, 1, 0)),
    ("shear_x", -0.27, (1, -0.27, 0, 0, 1, 0)),
    ("shear_y", 0.27, (1, 0, 0, 0.27, 1, 0)),
    ("shear_y", -0.1, (1, 0, 0, -0.1, 1, 0)),
    ("translate_x", 11.3, (1, 0, 11.3, 0, 1, 0)),
    ("translate_x", -7.0, (1, 0, -7, 0, 1, 0)),
    ("translate_y", 11.3, (1, 0, 0, 0, 1, 11.3)),
    ("translate_y", -7.0, (1, 0, 0, 0, 1, -7)),
    ("rotate", 27.0, None),
    ("rotate", -11.0, None),
    ("rotate", 0.0, None),
  ],
)
@pytest.mark.parametrize(
  ("method", "fill"), [("bilinear", 128), ("bilinear", (124, 116, 104)), ("bicubic", (124, 116, 104))]
)
def test_geometry_is_that_of_pillow(name, amount, coefficients, method, fill):
  def theirs(of: np.ndarray, fill: int | tuple) -> np.ndarray:
    fill = fill if isinstance(fill, tuple) else (fill,) * 3
    how = {"resample": Image.Resampling[method.upper()], "fillcolor": fill}
    if coefficients is None:
      return np.asarray(pillow(of).rotate(amount, **how))
    return np.asarray(pillow(of).transform(of.shape[1::-1], Image.Transform.AFFINE, coefficients, **how))

  image = picture()
  ours = getattr(rand_augment, name)(tf.constant(image), tf.constant(amount), method, fill)
  errors = difference(ours, theirs(image, fill))
  if method == "bicubic":
    assert errors.max() <= 1 and errors.mean() < 0.01
    return
  # Across the border TensorFlow fades into the fill within a pixel, where Pillow has a sharp edge.
  white = np.full_like(image, 255)
  framed = np.pad(white[1:-1, 1:-1], ((1, 1), (1, 1), (0, 0)))
  inside = theirs(framed, 0)[..., 0] == 255
  outside = scipy.ndimage.binary_erosion(theirs(white, 0)[..., 0] == 0, border_value=1)
  assert errors[inside].max() <= 1 and not errors[outside].any()
  assert inside.mean() > 0.4 and (inside | outside).mean() > 0.85


# The policy

OPERATIONS = {
  "autocontrast": None,
  "equalize": None,
  "invert": None,
  "rotate": lambda level: 30 * level / 10,
  "posterize": lambda level: int(level / 10 * 4),
  "solarize": lambda level: min(256, int(level / 10 * 256)),
  "solarize_add": lambda level: min(128, int(level / 10 * 110)),
  "color": lambda level: level / 10 * 1.8 + 0.1,
  "contrast": lambda level: level / 10 * 1.8 + 0.1,
  "brightness": lambda level: level / 10 * 1.8 + 0.1,
  "sharpness": lambda level: level / 10 * 1.8 + 0.1,
  "shear_x": lambda level: level / 10 * 0.3,
  "shear_y": lambda level: level / 10 * 0.3,
  "translate_x": lambda level: level / 10 * 0.45 * 20,
  "translate_y": lambda level: level / 10 * 0.45 * 10,
}
SIGNED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
  """Replaces the operations; holds (name, argument) of each call."""
  made: list[tuple] = []

  def recorder(name):
    return lambda image, *amount: made.append((name, *map(float, amount[:1]))) or image

  for name in OPERATIONS:
    monkeypatch.setattr(rand_augment, name, recorder(name))
  return made


def test_operations_are_drawn_evenly_half_of_the_time(calls):
  image = tf.constant(picture(10, 20))
  counts = []
  for seed in seeds(450):
    rand_augment.rand_augment(image, layers=2, seed=seed)
    counts.append(len(calls) - sum(counts))
  drawn = collections.Counter(name for name, *_ in calls)
  assert set(drawn) == set(OPERATIONS)
  assert scipy.stats.chisquare(list(drawn.values())).pvalue > 0.01
  # 0, 1 or 2 operations: each layer decides for itself.
  expected = 450 * scipy.stats.binom(2, 0.5).pmf([0, 1, 2])
  assert scipy.stats.chisquare(np.bincount(counts, minlength=3), expected).pvalue > 0.01
  signs = [amount > 0 for name, amount in (call for call in calls if call[0] in SIGNED)]
  assert scipy.stats.binomtest(sum(signs), len(signs)).pvalue > 0.01


@pytest.mark.parametrize("magnitude", range(11))
def test_magnitudes_mean_what_they_mean_in_timm(calls, magnitude):
  image = tf.constant(picture(10, 20))
  rand_augment.rand_augment(image, layers=120, magnitude=magnitude, std=0.0, seed=seeds(1, magnitude)[0])
  assert len({name for name, *_ in calls}) > 10
  for name, *amounts in calls:
    expected = OPERATIONS[name]
    if expected is None:
      assert amounts == []
    else:
      amount = abs(amounts[0]) if name in SIGNED else amounts[0]
      assert amount == pytest.approx(expected(magnitude), rel=1e-5, abs=1e-6)


INCREASING = OPERATIONS | {
  "posterize": lambda level: 4 - int(level / 10 * 4),
  "solarize": lambda level: 256 - int(level / 10 * 256),
}
BLENDS = ("color", "contrast", "brightness", "sharpness")


@pytest.mark.parametrize("magnitude", [0, 4, 9, 10])
def test_increasing_magnitudes_mean_what_they_mean_in_timm(calls, magnitude):
  image = tf.constant(picture(10, 20))
  rand_augment.rand_augment(image, 120, magnitude, 0.0, increasing=True, seed=seeds(1, magnitude)[0])
  for name, *amounts in calls:
    if name in BLENDS:
      assert abs(amounts[0] - 1) == pytest.approx(magnitude / 10 * 0.9, abs=1e-6)
    elif INCREASING[name] is not None:
      amount = abs(amounts[0]) if name in SIGNED else amounts[0]
      assert amount == pytest.approx(INCREASING[name](magnitude), rel=1e-5, abs=1e-6)
  factors = [amounts[0] > 1 for name, *amounts in calls if name in BLENDS]
  assert magnitude == 0 or 0 < sum(factors) < len(factors)


# The green levels of a row of picture(9, 8) after each operation of timm 0.3.2, rand-m9-inc1, bicubic, filled
# with the mean colour of ImageNet; for both signs where they differ.
TIMM = {
  "autocontrast": [[124, 161, 147, 64, 189, 112, 72, 107]],
  "equalize": [[127, 158, 146, 76, 182, 117, 83, 113]],
  "invert": [[128, 97, 109, 179, 73, 138, 172, 142]],
  "rotate": [[201, 174, 105, 180, 124, 130, 215, 116], [116, 206, 173, 110, 77, 178, 117, 72]],
  "posterize": [[0, 128, 128, 0, 128, 0, 0, 0]],
  "solarize": [[128, 97, 109, 179, 73, 138, 172, 142]],
  "solarize_add": [[226, 158, 146, 175, 182, 216, 182, 212]],
  "color": [[145, 183, 153, 39, 173, 98, 62, 103], [108, 132, 138, 112, 190, 135, 103, 122]],
  "contrast": [[122, 179, 157, 30, 222, 104, 43, 97], [131, 136, 134, 121, 141, 129, 122, 128]],
  "brightness": [[229, 255, 255, 137, 255, 211, 150, 204], [24, 30, 27, 14, 34, 22, 15, 21]],
  "sharpness": [[127, 162, 146, 41, 212, 111, 57, 113], [127, 153, 146, 110, 151, 122, 108, 113]],
  "shear_x": [[149, 162, 82, 152, 150, 84, 100, 116], [116, 137, 163, 113, 104, 178, 94, 87]],
  "shear_y": [[134, 169, 115, 112, 96, 120, 215, 225], [118, 166, 173, 145, 180, 103, 82, 210]],
  "translate_x": [[94, 182, 98, 85, 117, 116, 116, 116], [116, 116, 116, 122, 152, 159, 77, 162]],
  "translate_y": [[78, 30, 48, 59, 56, 161, 219, 187], [116] * 8],
}


def test_the_recipe_of_mage_gives_the_pixels_of_timm(monkeypatch):
  image = picture(9, 8)

  def draw(shape, seed, *limits):  # the operation, and then the sign
    return tf.constant(list(TIMM).index(name)) if limits else tf.constant(0.0 if sign < 0 else 0.9)

  monkeypatch.setattr(tf.random, "stateless_uniform", draw)
  for name, rows in TIMM.items():
    for sign, row in zip((1, -1), rows, strict=False):
      augmented = rand_augment.rand_augment(
        tf.constant(image), 1, 9.0, 0.0, True, "bicubic", (124, 116, 104), seed=seeds(1)[0]
      )
      assert np.abs(augmented.numpy()[2, :, 1].astype(int) - row).max() <= 1, (name, sign)


def test_the_level_is_a_clipped_normal(calls):
  image = tf.constant(picture(10, 20))
  for seed in seeds(20):
    rand_augment.rand_augment(image, layers=60, magnitude=9.0, std=0.5, seed=seed)
  levels = np.array([abs(amount) / 3 for name, amount in (c for c in calls if c[0] == "rotate")])
  levels = np.append(
    levels, [(a - 0.1) / 0.18 for n, a in (c for c in calls if c[0] in ("color", "contrast"))]
  )
  assert len(levels) > 60 and levels.max() <= 10.0 + 1e-5
  unclipped = levels[levels < 10.0 - 1e-5]
  assert 0.005 < 1 - len(unclipped) / len(levels) < 0.08  # 2.3%
  truncated = scipy.stats.truncnorm(-np.inf, 2.0, loc=9.0, scale=0.5)
  assert scipy.stats.kstest(unclipped, truncated.cdf).pvalue > 0.01
