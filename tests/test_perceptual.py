"""The frozen feature network, its importer, and the perceptual distance on it."""

import csv
import io
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFilter

from maskgen.errors import UserError
from maskgen.importers import mobilenet_v2
from maskgen.models import perceptual
from maskgen.models.mobilenet import MobileNetV2, scale_channels

SHARED = Path(__file__).parents[2] / "shared"
WEIGHTS = SHARED / "weights" / "mobilenet_v2_1.0_224_u8.npz"

# One block of each kind: without expansion, with a stride, with a residual.
TINY = MobileNetV2(
  width=0.25,
  num_classes=5,
  bottlenecks=((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 1, 2)),
  pooled_channels=32,
)


def images(shape, seed=0):
  return jax.random.uniform(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def tiny_params():
  return jax.jit(TINY.init)(jax.random.key(0), images((1, 32, 32, 3)))["params"]


def tiny_tensors():
  """A random file for TINY, with shapes written down by hand."""
  kernels = (
    *((3, 3, 3, 8), (3, 3, 1, 8), (1, 1, 8, 8)),
    *((1, 1, 8, 48), (3, 3, 1, 48), (1, 1, 48, 8)),
    *((1, 1, 8, 48), (3, 3, 1, 48), (1, 1, 48, 8)),
    *((1, 1, 8, 48), (3, 3, 1, 48), (1, 1, 48, 8)),
    *((1, 1, 8, 32), (1, 1, 32, 5)),
  )
  rng = np.random.default_rng(0)
  tensors = {}
  for i, shape in enumerate(kernels):
    fan_in = np.prod(shape[:-1])
    tensors |= {
      f"{i:02}.q": rng.integers(0, 256, shape).astype(np.uint8),
      f"{i:02}.scale": np.float32(rng.uniform(0.5, 1) / 60 / np.sqrt(fan_in)),
      f"{i:02}.zero": np.int32(rng.integers(100, 156)),
      f"{i:02}.b": rng.normal(0.5, 0.5, shape[-1]).astype(np.float32),
    }
  return tensors


@pytest.fixture
def save(tmp_path):
  def write(tensors):
    path = tmp_path / "weights.npz"
    np.savez(path, **tensors)
    return path

  return write


# --- the network


@pytest.mark.parametrize("height,width", [(224, 224), (97, 130), (1, 5)])
def test_maps_halve_the_resolution_rounding_up(height, width):
  network = MobileNetV2()
  out, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), images((2, height, width, 3)))
  channels = (96, 144, 192, 576, 1280)
  assert [m.shape for m in out["maps"]] == [
    (2, -(-height // stride), -(-width // stride), c)
    for stride, c in zip((2, 4, 8, 16, 32), channels, strict=True)
  ]
  assert out["pooled"].shape == (2, 1280)
  assert out["logits"].shape == (2, 1001)


def test_channels_are_multiples_of_eight_and_not_much_too_small():
  for width in (0.1, 0.35, 0.5, 1.0, 1.4):
    for channels in (16, 24, 32, 96, 320):
      scaled = scale_channels(channels, width)
      assert scaled % 8 == 0
      assert 0.9 * channels * width <= scaled <= max(8, channels * width + 8)


def test_padding_goes_below_and_right_on_even_sizes(tiny_params):
  def value(x):
    return TINY.apply({"params": tiny_params}, x)["maps"][0][0, 1, 1].sum()

  # The first block sees pixels 0..2 of the stem, and the stem's pixel i sees pixels 2i..2i+2.
  gradient = jax.jit(jax.grad(value))(images((1, 16, 16, 3)))[0]
  for axis in (0, 1):
    seen = np.any(gradient != 0, axis=(1 - axis, 2))
    np.testing.assert_array_equal(seen, np.arange(16) <= 6)


def test_gradient_reaches_every_pixel_and_is_finite(tiny_params):
  def value(x):
    return TINY.apply({"params": tiny_params}, x)["logits"].sum()

  gradient = jax.jit(jax.grad(value))(images((2, 32, 32, 3)))
  assert jnp.isfinite(gradient).all()
  assert (jnp.abs(gradient).sum(axis=-1) > 0).mean() > 0.95


# --- the importer


def reference_logits(tensors, x):
  """TINY as a straight-line program over the numbered convolutions of a file."""

  def conv(x, i, stride=1):
    kernel = (tensors[f"{i:02}.q"].astype(np.float32) - tensors[f"{i:02}.zero"]) * tensors[f"{i:02}.scale"]
    groups = x.shape[-1] // kernel.shape[2]
    y = jax.lax.conv_general_dilated(
      x,
      kernel,
      (stride, stride),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
    )
    return y + tensors[f"{i:02}.b"][None, None, None]

  def relu6(x):
    return jnp.clip(x, 0, 6)

  x = relu6(conv(2 * x - 1, 0, stride=2))
  x = x + conv(relu6(conv(x, 1)), 2)
  x = conv(relu6(conv(relu6(conv(x, 3)), 4, stride=2)), 5)
  x = x + conv(relu6(conv(relu6(conv(x, 6)), 7)), 8)
  x = conv(relu6(conv(relu6(conv(x, 9)), 10, stride=2)), 11)
  x = relu6(conv(x, 12)).mean(axis=(1, 2), keepdims=True)
  return conv(x, 13)[:, 0, 0]


def test_imported_network_computes_what_the_file_says(save, tiny_params):
  tensors = tiny_tensors()
  params = mobilenet_v2.load(save(tensors), TINY)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, tiny_params)
  x = images((2, 32, 48, 3))
  logits = jax.jit(TINY.apply)({"params": params}, x)["logits"]
  assert logits.std() > 1e-3
  np.testing.assert_allclose(logits, reference_logits(tensors, x), rtol=1e-4, atol=1e-5)


def test_full_network_has_53_convolutions():
  assert len(mobilenet_v2.convolutions(MobileNetV2())) == 53


@pytest.mark.parametrize(
  "change,named",
  [
    ({"03.zero": None}, "03.zero"),
    ({"13.b": None}, "13.b"),
    ({"14.q": np.zeros(3, np.uint8)}, "14.q"),
    ({"extra": np.zeros(3)}, "extra"),
    ({"04.q": np.zeros((3, 3, 48, 1), np.uint8)}, "04.q"),
    ({"04.scale": np.ones(48, np.float32)}, "04.scale"),
    ({"00.q": np.zeros((3, 3, 3, 8), np.float32)}, "00.q"),
    ({"05.b": np.full(8, np.nan, np.float32)}, "05.b"),
    ({"05.b": np.full(8, "x")}, "05.b"),
  ],
)
def test_wrong_tensor_is_named(save, change, named):
  tensors = {k: v for k, v in (tiny_tensors() | change).items() if v is not None}
  with pytest.raises(UserError, match=f"'{named}'"):
    mobilenet_v2.load(save(tensors), TINY)


def test_file_for_another_network_is_refused(save):
  with pytest.raises(UserError, match="53 convolutions"):
    mobilenet_v2.load(save(tiny_tensors()))


def test_file_that_is_not_an_npz_is_refused(save, tmp_path):
  whole = save(tiny_tensors()).read_bytes()
  single = io.BytesIO()
  np.save(single, np.zeros(3))
  flipped = bytearray(whole)
  flipped[len(whole) // 3] ^= 255
  path = tmp_path / "bad.npz"
  for content in (b"", b"not an archive", whole[: len(whole) // 2], single.getvalue(), flipped):
    path.write_bytes(content)
    with pytest.raises(UserError, match="not an intact npz"):
      mobilenet_v2.load(path, TINY)
  for path in (tmp_path / "absent.npz", tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
      mobilenet_v2.load(path, TINY)


# --- the distance


def test_distance_is_two_minus_two_cosines():
  a, b = (jax.random.normal(jax.random.key(seed), (3, 4, 5, 6)) for seed in (0, 1))
  cosine = (a * b).sum(-1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)
  expected = (2 - 2 * cosine).mean(axis=(1, 2))
  distance = perceptual.perceptual_distance
  np.testing.assert_allclose(distance([a], [b]), expected, rtol=1e-3)
  np.testing.assert_allclose(distance([a], [b]), distance([b], [a]), rtol=1e-6)
  np.testing.assert_allclose(distance([a, a], [b, a]), expected / 2, rtol=1e-3)  # levels weigh alike
  np.testing.assert_allclose(distance([9 * a], [b]), expected, rtol=1e-3)  # contrast does not count
  np.testing.assert_array_equal(distance([a], [a]), 0)


def test_distance_needs_as_many_levels_on_both_sides():
  a = jnp.ones((1, 2, 2, 3))
  with pytest.raises(ValueError):
    perceptual.perceptual_distance([a, a], [a])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_gradient_is_finite_on_equal_and_on_dead_maps(value):
  a = jnp.full((1, 2, 2, 3), value)
  gradient = jax.grad(lambda x: perceptual.perceptual_distance([x], [a]).sum())(a)
  np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_small_images_are_enlarged_and_grey_ones_are_coloured(tiny_params):
  def feature_maps(x):
    return perceptual.feature_maps(TINY, tiny_params, x)

  def shapes(*shape):
    return [m.shape[:3] for m in jax.eval_shape(feature_maps, images(shape))]

  assert shapes(2, 16, 16, 1) == shapes(2, 64, 64, 3)
  assert shapes(2, 28, 56, 3) == shapes(2, 64, 128, 3)
  assert shapes(1, 65, 90, 3)[0] == (1, 33, 45)
  grey = images((2, 70, 70, 1))
  maps = (jax.jit(feature_maps)(x) for x in (grey, jnp.repeat(grey, 3, axis=-1)))
  for a, b in zip(*maps, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_descending_the_distance_brings_images_closer(tiny_params):
  target = perceptual.feature_maps(TINY, tiny_params, images((2, 64, 64, 3), seed=1))

  @jax.jit
  @jax.value_and_grad
  def loss(x):
    maps = perceptual.feature_maps(TINY, tiny_params, x)
    return perceptual.perceptual_distance(maps, target).sum()

  x = images((2, 64, 64, 3), seed=2)
  first = loss(x)[0]
  for _ in range(10):
    gradient = loss(x)[1]
    x = jnp.clip(x - 0.02 * jnp.sign(gradient), 0, 1)
  assert loss(x)[0] < 0.8 * first


def test_registry_names_the_nearest_network():
  for name in perceptual.NETWORKS:
    perceptual.build_network(name)
  with pytest.raises(UserError, match="did you mean 'mobilenet_v2'"):
    perceptual.build_network("mobilnet_v2")


# --- real weights on real photos


def read_tar(name):
  """Yields (member name, bytes) of an archive of photos."""
  if not WEIGHTS.exists() or not (SHARED / "data" / name).exists():
    pytest.skip(f"needs the shared weights and {name}")
  with tarfile.open(SHARED / "data" / name) as archive:
    for member in archive:
      yield member.name, archive.extractfile(member).read()


def square(encoded, side):
  image = Image.open(io.BytesIO(encoded)).convert("RGB")
  short = min(image.size)
  left, top = ((size - short) // 2 for size in image.size)
  box = (left, top, left + short, top + short)
  return image.resize((side, side), Image.Resampling.BICUBIC, box=box)


def to_batch(pictures):
  return jnp.stack([np.asarray(picture, np.float32) / 255 for picture in pictures])


@pytest.mark.parametrize(
  "label,words",
  [
    ("Shoes", {"sandal", "Loafer", "clog", "cowboy boot", "running shoe"}),
    ("T-Shirt", {"jersey", "sweatshirt", "pajama"}),
    ("Shorts", {"swimming trunks", "jean"}),
  ],
)
def test_photos_are_recognised(label, words):
  members = dict(read_tar("clothing256.tar"))
  rows = csv.DictReader(io.StringIO(members["images.csv"].decode()))
  names = [f"images/{row['image']}.jpg" for row in rows if row["label"] == label]
  photos = to_batch([square(members[n], 224) for n in names if n in members][:20])
  lines = (SHARED / "weights" / "imagenet_labels_1001.txt").read_text().splitlines()
  classes = [line.split(maxsplit=1)[1].split(",")[0] for line in lines]
  params = mobilenet_v2.load(WEIGHTS)
  logits = jax.jit(lambda x: MobileNetV2().apply({"params": params}, x)["logits"])(photos)
  hits = [classes[i] in words for i in np.argmax(logits, axis=-1)]
  assert len(hits) == 20
  assert np.mean(hits) >= 0.5  # chance is below 0.005


@pytest.mark.parametrize("side", [32, 128])
def test_distance_orders_distortions_of_photos(side):
  photos = [square(content, side) for name, content in read_tar("kodak12.tar") if name.endswith("png")]
  params = mobilenet_v2.load(WEIGHTS)
  network = perceptual.build_network("mobilenet_v2")

  @jax.jit
  def distance(a, b):
    maps = (perceptual.feature_maps(network, params, x) for x in (a, b))
    return perceptual.perceptual_distance(*maps)

  def blurred(radius):
    return to_batch([photo.filter(ImageFilter.GaussianBlur(radius)) for photo in photos])

  x = to_batch(photos)
  slight, strong = distance(x, blurred(side / 128)), distance(x, blurred(side / 32))
  other = distance(x, jnp.roll(x, 1, axis=0))
  assert (slight > 0).all() and (slight < strong).all() and (strong < other).all()
