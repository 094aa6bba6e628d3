"""Preprocessing ops: against Pillow, eager against tf.data, and as specifications."""

import functools
import io
import math

import numpy as np
import pytest
from PIL import Image

from maskgen.data import ops
from maskgen.data.cpu_tf import tf
from maskgen.data.preprocess import parse_preprocess
from maskgen.errors import UserError

ZERO = tf.constant(0, tf.int64)


def _image(height: int, width: int, channels: int = 3) -> np.ndarray:
  noise = np.random.default_rng(0).uniform(-40, 40, (height, width, channels))
  ramp = np.linspace(40, 215, height)[:, None, None] * np.linspace(0.4, 1, width)[None, :, None]
  return np.clip(ramp + noise, 0, 255).astype(np.uint8)


def _encode(image: Image.Image, file_format: str) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, format=file_format)
  return buffer.getvalue()


def _seeds(count: int) -> tf.Tensor:
  return tf.random.experimental.stateless_split(tf.constant([3, 4], tf.int64), count)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(16, 16), (31, 20), (90, 77)])
def test_resize_agrees_with_pillow(method, size):
  image = _image(61, 47) // 2 + 60  # Pillow clips bicubic overshoot between its two passes
  ours = ops.resize(tf.constant(image), size, method).numpy().astype(int)
  pillow = Image.fromarray(image).resize(size[::-1], Image.Resampling[method.upper()])
  assert ours.shape == (*size, 3)
  assert np.abs(ours - np.asarray(pillow, int)).max() <= 1


def test_resize_rounds_to_the_nearest_level():
  image = tf.constant([[[0], [3]], [[3], [0]]], tf.uint8)
  assert ops.resize(image, 1).numpy().item() == 2  # 1.5, which truncation would make 1


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "CMYK"])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "GIF", "WEBP"])
def test_decode_gives_the_asked_channels(mode, file_format):
  image = Image.fromarray(_image(9, 7)).convert(mode)
  try:
    data = _encode(image, file_format)
  except (OSError, ValueError):
    pytest.skip(f"Pillow writes no {mode} {file_format}")
  for channels in (1, 3):
    decoded = ops.decode(tf.constant(data), channels).pixels()
    assert decoded.dtype == tf.uint8 and decoded.shape == (9, 7, channels)


def test_decode_is_exact_on_png_and_keeps_grey():
  image = _image(9, 7)
  data = tf.constant(_encode(Image.fromarray(image), "PNG"))
  np.testing.assert_array_equal(ops.decode(data).pixels(), image)
  grey = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
  data = tf.constant(_encode(Image.fromarray(grey[..., 0]), "PNG"))
  np.testing.assert_array_equal(ops.decode(data, 1).pixels(), grey)
  np.testing.assert_array_equal(ops.decode(data, 3).pixels(), np.repeat(grey, 3, axis=-1))


@pytest.mark.parametrize("have", [1, 2, 3, 4])
@pytest.mark.parametrize("want", [1, 3])
def test_decode_converts_arrays(have, want):
  image = np.full((4, 5, have), 200, np.uint8)
  np.testing.assert_array_equal(ops.decode(tf.constant(image), want), image[..., :1].repeat(want, -1))


def test_luma_agrees_with_pillow():
  image = _image(9, 7)
  ours = ops.decode(tf.constant(image), 1).numpy()[..., 0].astype(int)
  assert np.abs(ours - np.asarray(Image.fromarray(image).convert("L"), int)).max() <= 1


@pytest.mark.parametrize(("shape", "result"), [((20, 40), (10, 20)), ((41, 20), (20, 10))])
def test_resize_small_keeps_the_aspect_ratio(shape, result):
  assert ops.resize_small(tf.constant(_image(*shape)), 10).shape[:2] == result


def test_center_crop_is_central():
  image = _image(11, 14)
  np.testing.assert_array_equal(ops.center_crop(tf.constant(image), (5, 6)), image[3:8, 4:10])


def test_random_crop_reaches_every_place():
  image = tf.constant(np.arange(30, dtype=np.uint8).reshape(5, 6, 1))
  corners = {int(ops.random_crop(image, (3, 4), seed=seed)[0, 0, 0]) for seed in _seeds(150)}
  assert corners == {6 * y + x for y in range(3) for x in range(3)}


@pytest.mark.parametrize("encoded", [False, True])
def test_sized_crops_say_where_they_are(encoded):
  """The resized picture, at the place that the numbers name."""
  image = _image(12, 30)
  data = io.BytesIO()
  Image.fromarray(image).save(data, "PNG")
  record = {"image": tf.constant(data.getvalue() if encoded else image)}
  small = ops.resize_small(tf.constant(image), 6).numpy()
  places = set()
  for text, seeds in (("sized_crop(6)", _seeds(40)), ("sized_crop(6, 'center')", _seeds(1))):
    preprocess = tf.function(functools.partial(parse_preprocess(f"decode(3)|{text}"), draw=ZERO))
    for seed in seeds:
      made = preprocess(record, seed)
      assert made["sizes"].shape == (6,) and made["sizes"].dtype == tf.int32
      height, width, top, left, *after = made["sizes"].numpy()
      assert (height, width, top, after) == (12, 30, 0, [6, 6])
      np.testing.assert_array_equal(made["image"], small[:, left : left + 6])
      places.add(left)
  assert left == 4 and places >= {0, 9}


def test_flip_is_fair_and_mirrors():
  image = tf.constant(_image(4, 6))
  flips = []
  for seed in _seeds(200):
    result = ops.flip_lr(image, seed=seed).numpy()
    flips.append(not np.array_equal(result, image))
    np.testing.assert_array_equal(result, image[:, ::-1] if flips[-1] else image)
  assert 60 < sum(flips) < 140


def test_pad():
  image = _image(4, 5)
  np.testing.assert_array_equal(ops.pad(tf.constant(image), 2), np.pad(image, [(2, 2), (2, 2), (0, 0)]))
  mirrored = ops.pad(tf.constant(image), 2, "reflect")
  np.testing.assert_array_equal(mirrored, np.pad(image, [(2, 2), (2, 2), (0, 0)], "reflect"))


def _crop_boxes(shape, scale, count=300):
  """Recovers the rectangles: pixel values are coordinates, and nearest resizing keeps them."""
  height, width = shape
  y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
  image = tf.constant(np.stack([y, x, 0 * x], -1).astype(np.uint8))
  crop = tf.function(lambda seed: ops.random_resized_crop(image, shape, scale, "nearest", False, seed=seed))
  crops = np.stack([crop(seed).numpy() for seed in _seeds(count)]).astype(int)
  low, high = crops[:, 0, 0], crops[:, -1, -1]
  return low[:, :2], high[:, :2] - low[:, :2] + 1


def test_random_resized_crop_samples_area_and_aspect_ratio():
  start, extent = _crop_boxes((200, 240), (0.2, 0.5))
  share = extent.prod(1) / (200 * 240)
  ratio = np.log(extent[:, 1] / extent[:, 0])
  # Nearest resizing may lose a pixel at the border, rounding half a pixel: hence the margins.
  assert share.min() > 0.19 and share.max() < 0.51
  assert abs(share.mean() - 0.35) < 0.02  # uniform
  assert np.abs(ratio).max() < np.log(4 / 3) + 0.03
  assert abs(ratio.mean()) < 0.04 and abs(ratio.std() - np.log(4 / 3) / 3**0.5) < 0.02
  assert (start + extent <= (200, 240)).all()
  free = start / ((200, 240) - extent)
  assert free.min() < 0.1 and free.max() > 0.9 and np.abs(free.mean(0) - 0.5).max() < 0.06


def test_random_resized_crop_falls_back_to_the_centre():
  start, extent = _crop_boxes((20, 200), (0.9, 1.0), count=5)  # nothing of this area fits
  assert (start == (0, 86)).all() and (np.abs(extent - (20, 27)) <= 1).all()


def test_a_clamped_crop_is_the_first_draw_as_in_mae():
  height, width = 20, 200
  y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
  image = tf.constant(np.stack([y, x, 0 * x], -1).astype(np.uint8))
  for seed in _seeds(20):
    draws = tf.random.stateless_uniform([22], seed).numpy()
    area = height * width * (0.2 + 0.8 * draws[0])
    ratio = math.exp(math.log(3 / 4) + math.log(16 / 9) * draws[10])
    h = min(round(math.sqrt(area / ratio)), height)
    w = min(round(math.sqrt(area * ratio)), width)
    top, left = int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1))
    crop = ops.random_resized_crop(image, (h, w), (0.2, 1.0), "nearest", False, clamp=True, seed=seed)
    np.testing.assert_array_equal(crop, image[top : top + h, left : left + w])


def test_preprocessing_agrees_with_ops_and_tf_data():
  image = _image(40, 30)
  data = tf.constant(_encode(Image.fromarray(image), "PNG"))
  seed = tf.constant([1, 2], tf.int64)
  preprocess = parse_preprocess("decode(3) | random_resized_crop((16, 12), scale=(0.3, 1.0)) | pad(1)")
  record = {"image": data, "label": tf.constant(3, tf.int64)}
  eager = preprocess(record, seed, ZERO)
  dataset = tf.data.Dataset.from_tensors(record).map(lambda record: preprocess(record, seed, ZERO))
  assert dataset.element_spec["image"] == tf.TensorSpec((18, 14, 3), tf.uint8)
  np.testing.assert_array_equal(next(iter(dataset))["image"], eager["image"])
  assert int(eager["label"]) == 3
  expected = ops.random_resized_crop(
    tf.constant(image), (16, 12), (0.3, 1.0), seed=seed + tf.constant([0, 1 << 32], tf.int64)
  )
  np.testing.assert_array_equal(eager["image"], ops.pad(expected, 1))


def test_random_ops_have_seeds_of_their_own():
  preprocess = parse_preprocess("decode|flip_lr|flip_lr")
  image = _image(4, 6)
  results = [preprocess({"image": tf.constant(image)}, seed, ZERO)["image"] for seed in _seeds(40)]
  kept = sum(np.array_equal(result, image) for result in results)
  assert 5 < kept < 35  # with one seed for both, every image would be flipped twice


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("decode|resise(16)", r"did you mean resize\(size, method='bilinear', antialias=True\)"),
    ("decode|resize", r"missing a required argument: 'size'; the form is resize\(size, "),
    ("decode|resize(1, 'bilinear', True, 4)", r"too many positional arguments; the form is"),
    ("decode|flip_lr(seed=3)", r"unexpected keyword argument 'seed'; the form is flip_lr\(\)"),
    ("decode|resize(size)", "'size' is not a number, string or tuple"),
    ("resize(16)", r"starts with resize: put 'decode\|' before it"),
    ("decode|resize(16", "never closed"),
    ("decode||flip_lr", "malformed"),
    ("", "malformed"),
    ("decode|ops.pad(1)", r"preprocessing 'decode\|ops\.pad\(1\)': module 'ops' cannot be imported"),
    ("decode|ops[0](1)", r"not an op: 'ops\[0\]\(1\)'"),
    ("decode|zzzzzz", "known: blur, center_crop"),
  ],
)
def test_malformed_preprocessing(text, message):
  with pytest.raises(UserError, match=message):
    parse_preprocess(text)


@pytest.mark.parametrize(
  ("op", "message"),
  [
    ("decode(0)", "channels is 0, not a number"),
    ("resize(0)", "size is 0"),
    ("resize(16.0)", "size is 16.0"),
    ("resize((1, 2, 3))", r"size is \(1, 2, 3\)"),
    ("resize(8, 'cubic')", "method is 'cubic', not one of bilinear"),
    ("random_crop(41)", "41x41 pixels don't fit into 40x30"),
    ("center_crop((8, 31))", "8x31 pixels don't fit into 40x30"),
    ("random_resized_crop(8, 0.2)", "scale is 0.2"),
    ("random_resized_crop(8, (0.5, 0.2))", r"scale is \(0.5, 0.2\)"),
    ("sized_crop(8, 'corner')", "place is 'corner', not one of random, center"),
    ("pad(-1)", "n is -1"),
    ("pad(1, 'edge')", "mode is 'edge', not one of constant"),
  ],
)
def test_rejected_arguments(op, message):
  record = {"image": tf.constant(_image(40, 30))}
  with pytest.raises(UserError, match=message + ".*; the form is "):
    parse_preprocess(f"decode|{op}")(record, tf.constant([0, 0], tf.int64), ZERO)
