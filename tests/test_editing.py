"""Editing: windows, what must not change, and the command-line tool."""

import numpy as np
import pytest
import tiny
from PIL import Image, ImageCms

import maskgen
from maskgen import images
from maskgen.errors import UserError
from maskgen.numerics import editing
from maskgen.numerics.editing import Window
from maskgen.numerics.masking import token_mask
from maskgen.tools import edit

trained = tiny.trained

SIZE = tiny.SIZE
FACTOR = 4
OPTIONS = dict(steps=2, temperature=1.0)


@pytest.fixture(scope="module")
def mage(trained):
  return maskgen.load(trained / "mage")


def picture(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def floats(height, width, seed=0):
  return picture(height, width, seed).astype(np.float32) / 255


def hole_at(height, width, rows, columns):
  return editing.box_hole((columns[0], rows[0], columns[1], rows[1]), (height, width))


# Windows


def random_holes(count):
  rng = np.random.default_rng(0)
  for _ in range(count):
    height, width = rng.integers(1, 90, 2)
    rows, columns = np.sort(rng.integers(0, height + 1, 2)), np.sort(rng.integers(0, width + 1, 2))
    hole = np.zeros((height, width), bool)
    hole[slice(*rows), slice(*columns)] = True
    yield hole


@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_windows_hold_the_hole_and_stay_within_the_image_as_far_as_they_fit(size):
  for hole in random_holes(60):
    window = editing.choose_window(hole, size, FACTOR)
    rows, columns = np.nonzero(hole)
    sides = ((window.top, window.height, rows), (window.left, window.width, columns))
    for (start, length, used), available in zip(sides, hole.shape, strict=True):
      if used.size:
        assert start <= used.min() and used.max() < start + length
      if length <= available:
        assert 0 <= start <= available - length
      else:
        assert start <= 0 and start + length >= available
    # The aspect ratio is the model's, but for what whole pixels need.
    assert abs(window.height / size[0] - window.width / size[1]) < 1 / min(size)
    # Pixels are not magnified, unless the image is thinner than the model's.
    if all(have >= want for have, want in zip(hole.shape, size, strict=True)):
      assert window.height >= size[0] and window.width >= size[1]


def test_a_window_is_the_smallest_that_leaves_half_of_the_tokens_known():
  hole = hole_at(256, 256, (100, 108), (120, 128))
  window = editing.choose_window(hole, (64, 64), 8)
  assert (window.height, window.width) == (64, 64)
  hole = hole_at(256, 256, (80, 140), (80, 140))
  window = editing.choose_window(hole, (64, 64), 4)

  def unknown(window):
    return float(token_mask(window.cut_hole(hole, (64, 64))[None], 4).mean())

  assert 64 < window.height < 256 and unknown(window) <= 0.5
  smaller = int(window.height / 2**0.25)
  assert unknown(Window(110 - smaller // 2, 110 - smaller // 2, smaller, smaller)) > 0.5


def test_a_hole_larger_than_half_of_any_window_gets_the_whole_image():
  hole = ~hole_at(48, 48, (20, 28), (20, 28))
  assert editing.choose_window(hole, SIZE, FACTOR) == Window(0, 0, 48, 48)


def test_a_strip_at_a_side_needs_no_larger_window():
  hole = hole_at(64, 128, (0, 64), (112, 128))
  assert editing.choose_window(hole, (64, 64), 8) == Window(0, 64, 64, 64)


def test_windows_of_the_models_size_are_the_identity():
  image, hole = floats(40, 30), hole_at(40, 30, (20, 24), (9, 12))
  window = Window(10, 5, *SIZE)
  cut, cut_hole = window.cut(image, hole, SIZE)
  np.testing.assert_array_equal(cut, image[10:26, 5:21])
  np.testing.assert_array_equal(cut_hole, hole[10:26, 5:21])
  np.testing.assert_allclose(window.paste(image, cut, editing.opacity(hole, 3)), image, atol=1e-6)
  pasted = window.paste(image, 1 - cut, editing.opacity(hole, 0))
  np.testing.assert_array_equal(pasted, np.where(hole[..., None], 1 - image, image))


def test_beyond_the_image_all_is_hole():
  image = floats(10, 20)
  cut, hole = Window(-3, 2, 16, 16).cut(image, np.zeros((10, 20), bool), SIZE)
  np.testing.assert_array_equal(cut[3:13], image[:, 2:18])
  assert hole[:3].all() and hole[13:].all() and not hole[3:13].any()


@pytest.mark.parametrize("shape", [(48, 48), (16, 16), (100, 37), (9, 9)])
def test_scaled_windows_do_not_mix_the_hole_into_known_pixels(shape):
  hole = hole_at(*shape, (3, 7), (2, 5))
  window = editing.choose_window(hole, SIZE, FACTOR)
  one, other = (
    window.cut(np.where(hole[..., None], np.float32(value), floats(*shape)), hole, SIZE) for value in (0, 1)
  )
  np.testing.assert_array_equal(one[1], other[1])
  assert one[1].any() and not one[1].all()
  np.testing.assert_array_equal(one[0][~one[1]], other[0][~one[1]])


def test_scaling_keeps_smooth_pictures():
  rows, columns = np.mgrid[:96, :96] / 96
  image = np.stack([rows, columns, 0.5 + 0 * rows], axis=-1).astype(np.float32)
  window = Window(0, 0, 96, 96)
  cut, _ = window.cut(image, np.zeros((96, 96), bool), (32, 32))
  pasted = window.paste(image, cut, np.ones((96, 96), np.float32))
  np.testing.assert_allclose(pasted[4:-4, 4:-4], image[4:-4, 4:-4], atol=5e-3)


# Holes


def test_grown_holes_are_round_and_of_the_width_asked_for():
  hole = hole_at(21, 21, (10, 11), (10, 11))
  rows, columns = np.mgrid[:21, :21] - 10
  np.testing.assert_array_equal(editing.grow(hole, 4), np.hypot(rows, columns) <= 4)
  np.testing.assert_array_equal(editing.grow(hole, 0), hole)
  assert not editing.grow(np.zeros((5, 5), bool), 3).any()


def test_opacity_falls_from_the_hole_and_ends():
  hole = hole_at(3, 20, (0, 3), (0, 8))
  opacity = editing.opacity(hole, 3)
  assert opacity.dtype == np.float32
  np.testing.assert_allclose(opacity[1, 7:13], [1, 0.75, 0.5, 0.25, 0, 0])
  np.testing.assert_array_equal(editing.opacity(hole, 0), hole)
  assert not editing.opacity(np.zeros((5, 5), bool), 3).any()


def test_pixels_and_shares_extend_alike():
  images = np.stack([picture(10, 20), picture(10, 20, seed=1)])
  canvas, hole = editing.extend(images, (5, 0.25, 0.0, 3))
  assert canvas.shape == (2, 15, 28, 3) and hole.shape == (15, 28)
  np.testing.assert_array_equal(canvas[:, 5:, 3:23], images)
  assert not hole[5:, 3:23].any() and hole.sum() == 15 * 28 - 200


# The front door


@pytest.mark.parametrize("shape", [(16, 16), (40, 56), (11, 9), (7, 60), (16, 17), (1, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_known_pixels_of_any_size_keep_their_bits(shape, dtype, mage):
  image = picture(*shape) if dtype == np.uint8 else floats(*shape)
  hole = np.zeros(shape, bool)
  hole[: (shape[0] + 1) // 2, : (shape[1] + 1) // 2] = True
  edited = mage.inpaint(image, hole, **OPTIONS)
  assert edited.shape == image.shape and edited.dtype == dtype
  np.testing.assert_array_equal(edited[~hole], image[~hole])
  assert (edited[hole] != image[hole]).any()
  if dtype == np.float32:
    assert edited.min() >= 0 and edited.max() <= 1


def test_a_window_is_edited_like_an_image_of_its_own(mage):
  image, hole = picture(40, 40), hole_at(40, 40, (36, 40), (36, 40))
  assert editing.choose_window(hole, SIZE, FACTOR) == Window(24, 24, 16, 16)
  alone = mage.inpaint(image[24:, 24:], hole[24:, 24:], seed=3)
  np.testing.assert_array_equal(mage.inpaint(image, hole, seed=3)[24:, 24:], alone)


@pytest.mark.parametrize("shape", [(48, 48), (9, 12)])
def test_the_hole_is_not_seen_at_any_size(shape, mage):
  image, hole = picture(*shape), hole_at(*shape, (2, 6), (3, 8))
  changed = np.where(hole[..., None], 255 - image, image)
  np.testing.assert_array_equal(mage.inpaint(image, hole), mage.inpaint(changed, hole))


def test_a_feathered_edit_changes_a_band_and_no_more(mage):
  image, hole = picture(40, 40), hole_at(40, 40, (10, 18), (12, 20))
  edited = mage.inpaint(image, hole, feather=3)
  changed = (edited != image).any(axis=-1)
  assert not changed[~editing.grow(hole, 3)].any()
  assert changed[editing.grow(hole, 2) & ~hole].mean() > 0.5


def test_an_image_of_a_batch_is_edited_as_if_it_were_alone(mage):
  images, holes = np.stack([picture(30, 40, i) for i in range(2)]), np.zeros((2, 30, 40), bool)
  holes[0, 2:6, 3:9], holes[1, 10:30, 5:35] = True, True
  both = mage.inpaint(images, holes, **OPTIONS)
  np.testing.assert_array_equal(both[0], mage.inpaint(images[0], holes[0], **OPTIONS))


def test_few_unknown_tokens_can_be_fewer_than_steps(mage):
  image, hole = picture(*SIZE), hole_at(*SIZE, (0, 2), (0, 2))
  results = [mage.inpaint(image, hole, steps=steps) for steps in (1, 30)]
  for result in results:
    np.testing.assert_array_equal(result[~hole], image[~hole])
    assert (result[hole] != image[hole]).any()


@pytest.mark.parametrize(
  ("sides", "shape"),
  [
    ((0.5, 0.5, 0.5, 0.5), (32, 40)),
    ((0, 8, 0, 0), (16, 28)),
    ((3, 0, 1, 0.1), (20, 22)),
    ((100, 0, 0, 0), (116, 20)),
  ],
)
def test_outpainting_grows_the_canvas_around_the_image(sides, shape, mage):
  image = picture(16, 20)
  grown = mage.outpaint(image, *sides, seed=1, **OPTIONS)
  assert grown.shape == (*shape, 3) and grown.dtype == np.uint8
  top, left = (round(s * n) if isinstance(s, float) else s for s, n in ((sides[0], 16), (sides[3], 20)))
  np.testing.assert_array_equal(grown[top : top + 16, left : left + 20], image)
  known = np.zeros(shape, bool)
  known[top : top + 16, left : left + 20] = True
  assert len(np.unique(grown[~known], axis=0)) > 3
  np.testing.assert_array_equal(mage.outpaint(image[None], *sides, seed=1, **OPTIONS)[0], grown)


@pytest.mark.parametrize(
  ("sides", "message"),
  [
    ((0, 0, 0, 0), "nothing is added"),
    ((-1, 0, 0, 0), "cannot add -1"),
    ((0, float("nan"), 0, 0), "cannot add nan"),
    ((0, "8", 0, 0), "cannot add '8'"),
    ((0, True, 0, 0), "cannot add True"),
    ((50_000, 0, 0, 50_000), "50016 x 50016 pixels exceeds the limit"),
  ],
)
def test_wrong_sides(sides, message, mage):
  with pytest.raises(UserError, match=message):
    mage.outpaint(picture(*SIZE), *sides)


@pytest.mark.parametrize("feather", [-1, 0.5])
def test_wrong_feathers(feather, mage):
  with pytest.raises(UserError, match="feather is"):
    mage.inpaint(picture(*SIZE), np.ones(SIZE, bool), feather=feather)


def test_images_without_pixels(mage):
  with pytest.raises(UserError, match="at least one"):
    mage.inpaint(picture(0, 5), np.ones((0, 5), bool))


# The tool

BOX = (4, 6, 10, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """One picture, and its hole in three forms."""
  folder = tmp_path_factory.mktemp("pictures")
  image, hole = picture(30, 24), editing.box_hole(BOX, (30, 24))
  Image.fromarray(image).save(folder / "in.png")
  Image.fromarray(np.uint8(255) * hole).save(folder / "mask.png")
  clear = np.where(hole, 0, 255).astype(np.uint8)
  Image.fromarray(np.dstack([image, clear])).save(folder / "clear.png")
  return folder


def run(trained, folder, out, *arguments, image="in.png"):
  given = [argument.replace("@", f"{folder}/") for argument in arguments]
  edit.main([f"--model={trained / 'mage'}", f"--image={folder / image}", f"--out={out}", "--steps=2", *given])


def read(path):
  with Image.open(path) as opened:
    assert opened.mode == "RGB"
    return np.asarray(opened)


def test_masks_boxes_and_transparency_are_the_same_hole(trained, folder, tmp_path, capsys):
  run(trained, folder, tmp_path / "mask.png", "--mask=@mask.png")
  run(trained, folder, tmp_path / "box.png", f"--box={','.join(map(str, BOX))}")
  run(trained, folder, tmp_path / "clear.png", image="clear.png")
  assert "24 x 30 pixels, 11.7% of them new" in capsys.readouterr().out
  edited, image, hole = read(tmp_path / "mask.png"), picture(30, 24), editing.box_hole(BOX, (30, 24))
  np.testing.assert_array_equal(edited[~hole], image[~hole])
  assert (edited[hole] != image[hole]).mean() > 0.5
  for name in ("box.png", "clear.png"):
    np.testing.assert_array_equal(read(tmp_path / name), edited)


def test_the_tool_is_the_api(trained, folder, tmp_path, mage):
  run(trained, folder, tmp_path / "a.png", "--mask=@mask.png", "--seed=3", "--temperature=1.0", "--grow=2")
  hole = editing.grow(editing.box_hole(BOX, (30, 24)), 2)
  expected = mage.inpaint(picture(30, 24), hole, 3, **OPTIONS)
  np.testing.assert_array_equal(read(tmp_path / "a.png"), expected)


def test_candidates_differ_and_can_be_made_again_one_by_one(trained, folder, tmp_path):
  run(trained, folder, tmp_path / "a.png", "--mask=@mask.png", "--candidates=3", "--seed=5")
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ["a.png", "a_0.png", "a_1.png", "a_2.png"]
  candidates = [read(tmp_path / name) for name in names[1:]]
  assert len({candidate.tobytes() for candidate in candidates}) == 3
  run(trained, folder, tmp_path / "b.png", "--mask=@mask.png", "--seed=7")
  np.testing.assert_array_equal(read(tmp_path / "b.png"), candidates[2])
  assert read(tmp_path / "a.png").shape[1] > 5 * 100


@pytest.mark.parametrize(
  ("sides", "shape"), [("0.5", (60, 48)), ("8", (46, 40)), ("0,6,0,0", (30, 30)), ("0.1,0,3,0", (36, 24))]
)
def test_the_tool_outpaints(sides, shape, trained, folder, tmp_path):
  run(trained, folder, tmp_path / "a.png", f"--outpaint={sides}")
  assert read(tmp_path / "a.png").shape == (*shape, 3)


def test_pictures_are_turned_upright(trained, tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees
  Image.fromarray(picture(20, 30)).save(tmp_path / "in.png", exif=exif)
  run(trained, tmp_path, tmp_path / "out.png", "--box=0,0,4,4")
  edited = read(tmp_path / "out.png")
  np.testing.assert_array_equal(edited[4:, 4:], np.rot90(picture(20, 30), -1)[4:, 4:])


@pytest.mark.parametrize(("name", "mode"), [("in.jpg", "RGB"), ("in.tif", "RGB"), ("in.png", "L")])
def test_profiles_and_resolutions_are_kept(name, mode, trained, tmp_path):
  profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
  if mode == "L":
    profile = profile[:16] + b"GRAY" + profile[20:]
  given = Image.fromarray(picture(20, 20)).convert(mode)
  given.save(tmp_path / name, icc_profile=profile, dpi=(300, 150))
  run(trained, tmp_path, tmp_path / "out.png", "--box=0,0,4,4", "--candidates=2", image=name)
  for path in tmp_path.glob("out*.png"):
    with Image.open(path) as edited:
      assert np.rint(edited.info["dpi"]).tolist() == [300, 150]
      assert edited.info.get("icc_profile") == (profile if mode == "RGB" else None)


@pytest.mark.parametrize("dpi", [(0, 0), (float("nan"), 1), (1e12, 1e12)])
def test_impossible_resolutions_are_dropped(dpi, tmp_path):
  given = Image.new("RGB", (2, 2))
  given.info["dpi"] = dpi
  assert images.metadata(given) == {}


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "LA"])
def test_pictures_of_other_kinds_are_edited_as_rgb(mode, trained, tmp_path):
  Image.fromarray(picture(20, 20)).convert(mode).save(tmp_path / ("in.tif" if mode == "CMYK" else "in.png"))
  name = "in.tif" if mode == "CMYK" else "in.png"
  run(trained, tmp_path, tmp_path / "out.png", "--box=0,0,4,4", image=name)
  with Image.open(tmp_path / name) as given:
    np.testing.assert_array_equal(
      read(tmp_path / "out.png")[4:, 4:], np.asarray(given.convert("RGB"))[4:, 4:]
    )


def test_what_is_transparent_in_a_mask_is_no_hole(trained, folder, tmp_path):
  hole = editing.box_hole(BOX, (30, 24))
  white = np.full((30, 24, 3), 255, np.uint8)
  Image.fromarray(np.dstack([white, np.uint8(255) * hole])).save(tmp_path / "mask.png")
  run(trained, folder, tmp_path / "a.png", f"--mask={tmp_path / 'mask.png'}")
  run(trained, folder, tmp_path / "b.png", "--mask=@mask.png")
  assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.fixture(scope="module")
def wrong(folder):
  """Files that cannot be used."""
  Image.new("L", (24, 30)).save(folder / "black.png")
  Image.new("L", (24, 30), 255).save(folder / "white.png")
  Image.new("L", (30, 24), 255).save(folder / "turned.png")
  Image.new("I;16", (24, 30)).save(folder / "deep.png")
  (folder / "text.png").write_text("no picture")
  (folder / "cut.png").write_bytes((folder / "in.png").read_bytes()[:600])
  return folder


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], r"in\.png has no transparent pixels.*give --mask, --box or --outpaint"),
    (["--mask=@black.png"], r"black\.png is black everywhere"),
    (["--mask=@white.png"], r"leaves no pixel known: .* maskgen\.tools\.generate"),
    (["--mask=@mask.png", "--grow=100"], r"leaves no pixel known"),
    (["--mask=@turned.png"], r"has 30 x 24 pixels, the picture has 24 x 30: make them equal"),
    (["--mask=@missing.png"], r"--mask=.*missing\.png: there is no such file"),
    (["--mask=@text.png"], r"--mask=.*text\.png cannot be read as a picture"),
    (["--box=0,0,4,4", "--image=@text.png"], r"--image=.*text\.png cannot be read"),
    (["--box=0,0,4,4", "--image=@cut.png"], r"--image=.*cut\.png cannot be read"),
    (["--box=0,0,4,4", "--image=@deep.png"], r"more than 8 bits"),
    (["--box=0,0,4,4", "--image=@"], r"there is no such file"),
    (["--mask=@mask.png", "--box=0,0,4,4"], r"--mask and --box contradict each other"),
    (["--box=0,0,4,4", "--label=3", "--prompt=a"], r"--label=3 and --prompt=a: give one of them"),
    (["--box=0,0,4,4", "--outpaint=8"], r"--box and --outpaint contradict"),
    (["--box=0,0,25,4"], r"box 0,0,25,4 extends beyond the image: X must be within 0\.\.24"),
    (["--box=-1,0,4,4"], r"extends beyond"),
    (["--box=4,0,4,4"], r"is empty"),
    (["--box=0,0,24,30"], r"--box leaves no pixel known"),
    (["--box=0,0,4"], r"--box=0,0,4: give four whole numbers"),
    (["--box=0,0,4,0.5"], r"give four whole numbers"),
    (["--outpaint=1,2"], r"--outpaint=1,2: give one number or four"),
    (["--outpaint=half"], r"give one number or four"),
    (["--outpaint=0"], r"nothing is added"),
    (["--outpaint=-1,0,0,0"], r"cannot add -1"),
    (["--box=0,0,4,4", "--candidates=0"], r"--candidates=0: give at least 1"),
    (["--box=0,0,4,4", "--grow=-1"], r"--grow=-1: give at least 0"),
    (["--box=0,0,4,4", "--feather=-1"], r"--feather=-1: give at least 0"),
    (["--box=0,0,4,4", "--steps=0"], r"at least 1"),
    (["--box=0,0,4,4", "--out=a.jpg"], r"--out=a\.jpg: give the name of a \.png file"),
    (["--box=0,0,4,4", "--maks=a"], r"unrecognized arguments: --maks=a"),
  ],
)
def test_wrong_arguments(arguments, message, trained, wrong, tmp_path):
  with pytest.raises(UserError, match=message) as error:
    run(trained, wrong, tmp_path / "out.png", *arguments)
  assert "\n" not in str(error.value)
  assert not list(tmp_path.iterdir())


def test_models_that_cannot_edit(trained, folder, tmp_path):
  with pytest.raises(UserError, match="'tokenizer' has no 'inpaint'"):
    edit.main(
      [
        f"--model={trained / 'tokenizer'}",
        f"--image={folder / 'in.png'}",
        f"--out={tmp_path / 'out.png'}",
        "--box=0,0,4,4",
      ]
    )


def test_the_tool_explains_itself(capsys):
  with pytest.raises(SystemExit) as stop:
    edit.main(["--help"])
  assert stop.value.code == 0
  assert "python -m maskgen.tools.edit --model=" in capsys.readouterr().out
