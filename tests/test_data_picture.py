"""Pictures: shown as a viewer shows them, refused when they are damaged, and cropped as they are decoded."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from maskgen.data.cpu_tf import tf
from maskgen.data.picture import MAX_PIXELS, Picture
from maskgen.data.reader import reason_of

SIZE = (37, 52)


def scene() -> np.ndarray:
  """A smooth picture, uint8 [37, 52, 3], with four different corners."""
  y, x = np.meshgrid(np.linspace(0, 1, SIZE[0]), np.linspace(0, 1, SIZE[1]), indexing="ij")
  return (255 * np.stack([y, x, (1 - y) * (1 - x)], axis=-1)).astype(np.uint8)


def encode(image: Image.Image, file_format: str, **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, format=file_format, **options)
  return buffer.getvalue()


def shown(data: bytes, channels: int = 3) -> np.ndarray:
  return Picture(tf.constant(data), channels).pixels().numpy()


def difference(a: np.ndarray, b: np.ndarray) -> int:
  assert a.shape == b.shape
  return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured(orientation, file_format):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encode(Image.fromarray(scene()), file_format, exif=exif)
  expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
  assert difference(shown(data), expected) <= 3
  sides = Picture(tf.constant(data), 3).sides.numpy()
  assert tuple(sides) == (SIZE if orientation < 5 else SIZE[::-1])


def test_pictures_of_phones():
  pytest.importorskip("pillow_heif", reason="pillow-heif (the extra heif) is not installed")
  data = encode(Image.fromarray(scene()), "HEIF", quality=95, chroma=444)
  assert difference(shown(data), scene()) <= 12
  with pytest.raises(tf.errors.OpError):
    shown(data[: len(data) // 2])


UPSIDE_DOWN = Image.Exif()
UPSIDE_DOWN[0x0112] = 3


def segment(kind: int, content: bytes) -> bytes:
  return bytes([0xFF, kind]) + struct.pack(">H", len(content) + 2) + content


def chunk(kind: bytes, content: bytes) -> bytes:
  return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def rotated(file_format: str) -> tuple[bytes, bytes, bytes]:
  """A file whose EXIF data turns it upside down, split around that data."""
  exif = UPSIDE_DOWN.tobytes()
  plain = encode(Image.fromarray(scene()), file_format)
  if file_format == "JPEG":
    return plain[:2], segment(0xE1, exif), plain[2:]
  return plain[:33], chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")), plain[33:]


THUMBNAIL = b"Photoshop 3.0\0" + encode(Image.fromarray(scene()), "JPEG") + bytes(8000)


@pytest.mark.parametrize(
  ("file_format", "before"),
  [
    ("JPEG", segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b" " * 6000)),
    ("JPEG", segment(0xED, THUMBNAIL)),
    ("PNG", chunk(b"iCCP", b"x\0\0" + zlib.compress(np.random.default_rng(0).bytes(20_000)))),
    ("PNG", chunk(b"zTXt", b"x\0\0" + bytes(5000))),
  ],
)
def test_orientation_after_kilobytes_of_other_data_is_honoured(file_format, before):
  start, exif, rest = rotated(file_format)
  upright = shown(start + before + rest)
  np.testing.assert_array_equal(upright, shown(start + rest))
  assert difference(shown(start + before + exif + rest), upright[::-1, ::-1]) <= 3


def test_orientation_after_the_pixels_of_a_png_is_honoured():
  start, exif, rest = rotated("PNG")
  after = start + rest[:-12] + exif + rest[-12:]
  np.testing.assert_array_equal(shown(after), shown(start + rest)[::-1, ::-1])


def test_orientation_far_behind_the_pixels_of_a_png_is_honoured():
  start, exif, rest = rotated("PNG")
  after = start + rest[:-12] + exif + chunk(b"zTXt", b"x\0\0" + bytes(9000)) + rest[-12:]
  np.testing.assert_array_equal(shown(after), shown(start + rest)[::-1, ::-1])


def test_transparency_after_kilobytes_of_other_data_is_shown_on_white():
  data = encode(Image.fromarray(np.zeros((*SIZE, 3), np.uint8)), "PNG", transparency=(0, 0, 0))
  assert (shown(data[:33] + chunk(b"zTXt", b"x\0\0" + bytes(5000)) + data[33:]) == 255).all()


@pytest.mark.parametrize(
  ("mode", "file_format"),
  [
    ("RGB", "PNG"),
    ("RGB", "JPEG"),
    ("RGB", "GIF"),
    ("RGB", "WEBP"),
    ("RGB", "TIFF"),
    ("CMYK", "JPEG"),
    ("CMYK", "TIFF"),
    ("P", "PNG"),
    ("L", "JPEG"),
    ("1", "PNG"),
  ],
)
def test_every_mode_is_shown_as_pillow_shows_it(mode, file_format):
  data = encode(Image.fromarray(scene()).convert(mode), file_format)
  expected = Image.open(io.BytesIO(data))
  assert difference(shown(data), np.asarray(expected.convert("RGB"))) <= 3
  assert difference(shown(data, 1)[..., 0], np.asarray(expected.convert("L"))) <= 3


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("quality", [50, 75, 95])
@pytest.mark.parametrize("orientation", [None, 6])
def test_jpegs_are_decoded_as_by_pillow(orientation, quality, subsampling):
  noise = np.random.default_rng(quality).normal(0, 25, (*SIZE, 3))
  exif = Image.Exif()
  if orientation:
    exif[0x0112] = orientation
  noisy = Image.fromarray(np.clip(scene() + noise, 0, 255).astype(np.uint8))
  data = encode(noisy, "JPEG", quality=quality, subsampling=subsampling, exif=exif)
  expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).astype(int)
  picture = Picture(tf.constant(data), 3)
  assert np.abs(picture.pixels().numpy() - expected).mean() <= 0.05
  crop = picture.crop(tf.constant([4, 6]), tf.constant([20, 24])).numpy()
  assert np.abs(crop - expected[4:24, 6:30])[2:-2, 2:-2].mean() <= 0.05


@pytest.mark.parametrize(
  ("mode", "file_format"), [("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("P", "GIF")]
)
def test_transparency_is_shown_on_white(mode, file_format):
  image = Image.fromarray(scene()).convert("RGBA")
  alpha = np.full(SIZE, 255, np.uint8)
  alpha[:, :20] = 0
  image.putalpha(Image.fromarray(alpha))
  if mode == "P":
    image = Image.fromarray(np.where(alpha == 0, 0, 1).astype(np.uint8)).convert("P")
    image.putpalette([200, 0, 0, 0, 90, 0])
    data = encode(image, file_format, transparency=0)
  else:
    data = encode(image.convert(mode), file_format)
  pixels = shown(data)
  assert (pixels[:, :20] == 255).all() and (pixels[:, 20:] != 255).any(axis=-1).all()


def test_a_transparent_colour_of_an_rgb_png_is_shown_on_white():
  pixels = np.zeros((*SIZE, 3), np.uint8)
  pixels[:, :10] = (1, 2, 3)
  data = encode(Image.fromarray(pixels), "PNG", transparency=(1, 2, 3))
  assert (shown(data)[:, :10] == 255).all() and (shown(data)[:, 10:] == 0).all()


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bits_become_8(file_format):
  levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
  data = encode(Image.fromarray(levels), file_format)
  np.testing.assert_array_equal(shown(data, 1)[..., 0], np.arange(256).reshape(16, 16))
  np.testing.assert_array_equal(shown(data)[..., 2], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize(
  "options", [dict(subsampling=0), dict(subsampling=2), dict(subsampling=2, progressive=True)]
)
def test_a_crop_is_a_part_of_the_whole(options):
  data = encode(Image.fromarray(scene()), "JPEG", quality=95, **options)
  picture = Picture(tf.constant(data), 3)
  whole = picture.pixels().numpy()
  rng = np.random.default_rng(0)
  for _ in range(30):
    begin = rng.integers(0, np.array(SIZE) - 8)
    extent = rng.integers(8, np.array(SIZE) - begin + 1)
    crop = picture.crop(tf.constant(begin, tf.int32), tf.constant(extent, tf.int32)).numpy()
    expected = whole[begin[0] :, begin[1] :][: extent[0], : extent[1]]
    # Colour is interpolated from what is decoded: the border of the crop may differ a little.
    assert difference(crop, expected) <= 12
    assert difference(crop[2:-2, 2:-2], expected[2:-2, 2:-2]) == 0


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_crops_of_what_is_decoded_whole(file_format):
  data = encode(Image.fromarray(scene()), file_format)
  picture = Picture(tf.constant(data), 3)
  crop = picture.crop(tf.constant([5, 7]), tf.constant([11, 13]))
  np.testing.assert_array_equal(crop, shown(data)[5:16, 7:20])


def bomb(side: int) -> bytes:
  """A PNG that claims to have side x side pixels."""
  header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
  return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


DAMAGED = {
  "empty": (b"", "the file is empty"),
  "text": (b"no picture" * 50, "the file is not a picture"),
  "truncated JPEG": (encode(Image.fromarray(scene()), "JPEG")[:-300], "truncated"),
  "JPEG without end": (encode(Image.fromarray(scene()), "JPEG")[:-2], "truncated"),
  "truncated PNG": (encode(Image.fromarray(scene()), "PNG")[:-30], "truncated|broken"),
  "header alone": (encode(Image.fromarray(scene()), "JPEG")[:20], "not a picture"),
  "a frame around nothing": (b"\xff\xd8\xff" + b"\0" * 40 + b"\xff\xd9", "."),
  "60,000 x 60,000 pixels": (bomb(60_000), f"more than {MAX_PIXELS:,} pixels"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_errors_that_say_why(name):
  data, reason = DAMAGED[name]
  with pytest.raises(tf.errors.OpError):
    Picture(tf.constant(data), 3).pixels()
  with pytest.raises(tf.errors.OpError) as error:
    list(tf.data.Dataset.from_tensors(data).map(lambda data: Picture(data, 3).pixels()))
  assert re.search(reason, reason_of(error.value), re.IGNORECASE)


@pytest.mark.parametrize(
  "options",
  [
    dict(quality=50, subsampling=2),
    dict(quality=95, subsampling=0),
    dict(optimize=True, restart_marker_rows=1),
    dict(mode="L"),
    dict(mode="CMYK"),
    dict(exif=UPSIDE_DOWN),
  ],
)
def test_a_jpeg_that_was_cut_off_and_ended_is_refused(options):
  noise = np.random.default_rng(0).integers(-20, 20, (150, 200, 3))
  mode, options = options.get("mode", "RGB"), {key: options[key] for key in options if key != "mode"}
  image = Image.fromarray(np.clip(noise + 90, 0, 255).astype(np.uint8)).convert(mode)
  data = encode(image, "JPEG", **options)
  scan = data.rindex(b"\xff\xda")
  shown(data), shown(data, 1)
  for share in (0.02, 0.4, 0.8):
    cut = data[: scan + 12 + int(share * (len(data) - scan - 14))] + b"\xff\xd9"
    for channels in (1, 3):
      with pytest.raises(tf.errors.OpError, match="the file is truncated"):
        shown(cut, channels)


def test_a_crop_of_what_was_cut_off_is_refused():
  data = encode(Image.fromarray(scene()).resize((400, 400)), "JPEG")
  picture = Picture(tf.constant(data[: len(data) // 2] + b"\xff\xd9"), 3)
  assert picture.crop(tf.constant([0, 0]), tf.constant([100, 100])).shape == (100, 100, 3)
  with pytest.raises(tf.errors.OpError, match="the file is truncated"):
    picture.crop(tf.constant([100, 100]), tf.constant([250, 250]))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_a_grey_picture_is_intact(file_format):
  data = encode(Image.new("RGB", SIZE[::-1], (128, 128, 128)), file_format)
  assert (shown(data) == 128).all() and (shown(data, 1) == 128).all()


def test_a_truncated_file_is_refused_where_its_crop_is_intact():
  data = encode(Image.fromarray(scene()).resize((400, 400)), "JPEG")
  picture = tf.function(lambda data: Picture(data, 3).crop(tf.constant([0, 0]), tf.constant([8, 8])))
  assert picture(tf.constant(data)).shape == (8, 8, 3)
  with pytest.raises(tf.errors.OpError, match="truncated"):
    picture(tf.constant(data[: len(data) * 2 // 3]))
