"""The public API: shapes, dtypes, ranges, and what must not change."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from test_errors import assert_clear

import maskgen
from maskgen import serving
from maskgen.data import pipeline as data_pipeline
from maskgen.errors import UserError
from maskgen.tools import export, generate

trained = tiny.trained

IMAGE = (*tiny.SIZE, 3)
OPTIONS = dict(steps=2, temperature=1.0)


@pytest.fixture(scope="module")
def mage(trained):
  return maskgen.load(trained / "mage")


@pytest.fixture(scope="module")
def tokenizer(trained):
  return maskgen.load(trained / "tokenizer")


@pytest.fixture(scope="module", params=tiny.STAGES)
def model(request):
  return request.getfixturevalue(request.param)


def pictures(count, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, *IMAGE), np.uint8)


def assert_pixels(images, count):
  assert images.shape == (count, *IMAGE) and images.dtype == np.float32
  assert images.min() >= 0.0 and images.max() <= 1.0


def test_encode_gives_codes(model):
  tokens = model.encode(pictures(3))
  assert tokens.shape == (3, tiny.TOKENS) and tokens.dtype == np.int32
  assert tokens.min() >= 0 and tokens.max() < tiny.CODES


def test_decode_gives_pixels(model):
  tokens = np.random.default_rng(0).integers(0, tiny.CODES, (3, tiny.TOKENS))
  assert_pixels(model.decode(tokens), 3)


def test_reconstruct_is_decode_after_encode(model):
  images = pictures(2).astype(np.float32) / 255
  reconstructed = model.reconstruct(images)
  assert_pixels(reconstructed, 2)
  np.testing.assert_allclose(reconstructed, model.decode(model.encode(images)), atol=1e-5)


def test_mage_uses_the_codes_of_its_tokenizer(mage, tokenizer):
  images = pictures(4)
  np.testing.assert_array_equal(mage.encode(images), tokenizer.encode(images))


def test_bytes_and_floats_are_the_same_images(model):
  images = pictures(3)
  floats = images / 255.0  # float64, as users have it
  np.testing.assert_array_equal(model.encode(images), model.encode(floats))
  reconstructed = model.reconstruct(images)
  assert reconstructed.dtype == np.uint8
  np.testing.assert_array_equal(reconstructed, np.rint(model.reconstruct(floats) * 255).astype(np.uint8))


def test_examples_do_not_see_each_other(mage):
  images = pictures(5)
  np.testing.assert_array_equal(mage.encode(images)[2:4], mage.encode(images[2:4]))
  np.testing.assert_allclose(mage.features(images)[2:4], mage.features(images[2:4]), atol=1e-5)


def test_features_are_one_vector_per_image(mage):
  features = mage.features(pictures(3))
  assert mage.features(pictures(3), patches=True).shape == (3, tiny.TOKENS, features.shape[1])
  assert features.ndim == 2 and len(features) == 3 and features.dtype == np.float32
  assert np.isfinite(features).all()
  assert np.abs(features[0] - features[1]).max() > 1e-4


def test_logits_are_over_the_codes_and_hide_masked_tokens(mage):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, tiny.CODES, (2, tiny.TOKENS))
  hidden = rng.uniform(size=tokens.shape) < 0.6
  logits = mage.logits(tokens, hidden)
  assert logits.shape == (2, tiny.TOKENS, tiny.CODES) and logits.dtype == np.float32
  other = np.where(hidden, (tokens + 1) % tiny.CODES, tokens)
  np.testing.assert_array_equal(mage.logits(other, hidden), logits)
  shown = np.where(hidden, tokens, (tokens + 1) % tiny.CODES)
  assert np.abs(mage.logits(shown, hidden) - logits).max() > 1e-6


def test_generate_gives_pixels_that_vary_with_the_seed(mage):
  images = mage.generate(seed=0, batch=4)
  assert_pixels(images, 4)
  np.testing.assert_array_equal(images, mage.generate(seed=0, batch=4))
  assert np.abs(images - mage.generate(seed=1, batch=4)).max() > 1e-3
  assert np.abs(images[0] - images[1]).max() > 1e-3


def test_generated_image_i_depends_on_seed_and_i_alone(mage):
  few, many = mage.generate(seed=3, batch=2), mage.generate(seed=3, batch=4)
  np.testing.assert_allclose(few, many[:2], atol=1e-5)


def test_a_batch_of_another_size_compiles_nothing_and_changes_nothing(mage):
  inputs = pictures(8)
  images, features = mage.generate(batch=8, **OPTIONS), mage.features(inputs)
  compiled = []

  def note(event, *_, **__):
    compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    for size in (7, 8):
      np.testing.assert_array_equal(mage.generate(batch=size, **OPTIONS), images[:size])
      np.testing.assert_array_equal(mage.features(inputs[:size]), features[:size])
  finally:
    jax.monitoring.unregister_event_duration_listener(note)
  assert not compiled
  exact = mage.call("generate", mage.request(0, 7), **OPTIONS)
  np.testing.assert_allclose(mage.generate(batch=7, **OPTIONS), exact, atol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "arccos"])
def test_sampling_options_are_taken(mage, schedule):
  assert_pixels(mage.generate(batch=2, schedule=schedule, **OPTIONS), 2)


def test_defaults_of_sampling_are_the_configs(mage):
  sampling = mage.config["objective"]["sampling"]
  np.testing.assert_array_equal(mage.generate(batch=2), mage.generate(batch=2, **sampling))


def hole():
  mask = np.zeros((2, *tiny.SIZE), bool)
  mask[0, 3:7, 5:12] = True  # not aligned with tokens
  mask[1, :, 8:] = True
  return mask


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_inpaint_leaves_known_pixels_alone(mage, dtype):
  images = pictures(2) if dtype == np.uint8 else pictures(2).astype(np.float32) / 255
  original = images.copy()
  filled = mage.inpaint(images, hole(), seed=1)
  assert filled.shape == images.shape and filled.dtype == dtype
  np.testing.assert_array_equal(filled[~hole()], images[~hole()])
  assert (filled[hole()] != images[hole()]).mean() > 0.5
  np.testing.assert_array_equal(images, original)  # and what came in
  if dtype == np.float32:
    assert_pixels(filled, 2)


def test_inpaint_does_not_look_into_the_hole(mage):
  images = pictures(2)
  changed = np.where(hole()[..., None], 255 - images, images)
  np.testing.assert_array_equal(mage.inpaint(images, hole()), mage.inpaint(changed, hole()))


def test_inpaint_of_nothing_is_the_image(mage):
  images = pictures(2)
  np.testing.assert_array_equal(mage.inpaint(images, np.zeros((2, *tiny.SIZE), bool)), images)


def test_one_image_needs_no_batch(mage):
  images = pictures(2)
  one = mage.inpaint(images[0], hole()[0], seed=5)
  assert one.shape == IMAGE and one.dtype == np.uint8
  np.testing.assert_array_equal(one, mage.inpaint(images[:1], hole()[:1], seed=5)[0])


def test_one_mask_serves_all_images(mage):
  images, mask = pictures(2), hole()[0]
  np.testing.assert_array_equal(
    mage.inpaint(images, mask), mage.inpaint(images, np.broadcast_to(mask, (2, *mask.shape)))
  )


def test_a_loaded_model_keeps_config_and_objective(mage):
  assert mage.config["objective"]["name"] == "mage"
  assert mage.objective.image_shape == IMAGE
  assert set(mage.variables) == {"params", "frozen", "extra"}


def test_loading_and_generating_needs_no_tensorflow(trained):
  """Users of a trained model should not wait for imports that only training needs."""
  program = (
    "import sys, maskgen; assert 'jax' not in sys.modules;"
    f"model = maskgen.load({str(trained / 'mage')!r});"
    "model.reconstruct(model.generate(batch=1));"
    "assert 'tensorflow' not in sys.modules and 'sklearn' not in sys.modules"
  )
  process = tiny.python("-c", program)
  _, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors


# What users have

BLACK_AND_WHITE = np.uint8(255) * (pictures(2) > 127)


@pytest.mark.parametrize(
  "convert",
  [
    list,
    lambda images: [Image.fromarray(image) for image in images],
    lambda images: [Image.fromarray(image).convert("RGBA") for image in images],
    jnp.asarray,
    lambda images: jnp.asarray(images / 255, jnp.bfloat16),
    lambda images: images.astype(np.float16) / 255,
    lambda images: np.float32(images / 255 * 1.001 - 0.0005),  # as left by resizing
  ],
)
def test_images_come_in_many_forms(convert, tokenizer):
  expected = tokenizer.encode(BLACK_AND_WHITE)
  np.testing.assert_array_equal(tokenizer.encode(convert(BLACK_AND_WHITE)), expected)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Pictures of other sizes: rotated by their metadata, with transparency, and grey."""
  folder = tmp_path_factory.mktemp("pictures") / "test"
  folder.mkdir()
  colours = np.random.default_rng(3).integers(0, 256, (40, 30, 4), np.uint8)
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(colours[..., :3]).save(folder / "a.jpg", exif=exif)
  Image.fromarray(colours).save(folder / "b.png")
  Image.fromarray(colours[..., 0]).resize((50, 20)).save(folder / "c.png")
  return sorted(folder.iterdir())


def test_pictures_are_prepared_as_evaluations_do(mage, trained, files, tmp_path):
  (files[0].parents[1] / "train").symlink_to(files[0].parent)
  pipeline = data_pipeline.Data(f"folder:{files[0].parents[1]}", "decode|resize(16)", mage.preprocessing, 1)
  (batch,) = pipeline.eval_batches("eval", len(files))
  prepared = mage.preprocess(files)
  np.testing.assert_array_equal(prepared[batch["record"]], batch["image"])
  np.testing.assert_array_equal(mage.preprocess(str(files[0])), prepared[:1])
  np.testing.assert_array_equal(mage.features(files), mage.features(prepared))
  grey = np.asarray(Image.open(files[2]))
  np.testing.assert_array_equal(
    mage.preprocess([Image.open(files[1]), grey, grey / 255]), prepared[[1, 2, 2]]
  )
  np.testing.assert_array_equal(mage.preprocess(BLACK_AND_WHITE), BLACK_AND_WHITE)
  assert mage.inpaint(files[0], np.zeros((30, 40), bool)).shape == (30, 40, 3)  # an edit keeps the size
  export.main([f"--model={trained / 'mage'}", f"--out={tmp_path / 'export'}"])
  assert maskgen.load(tmp_path / "export").preprocessing == mage.preprocessing == "decode(3)|resize(16)"


def test_pictures_that_cannot_be_prepared(mage, files, tmp_path, monkeypatch):
  (tmp_path / "cut.jpg").write_bytes(files[0].read_bytes()[:500])
  (tmp_path / "notes.txt").write_text("taken in 2019")
  for given, message in (
    (tmp_path / "cut.jpg", r"cut.jpg cannot be prepared by 'decode\(3\)\|resize\(16\)': Truncated File Read"),
    (tmp_path / "notes.txt", r"notes.txt cannot be prepared by '.*': the file is not a picture"),
    (tmp_path / "none.jpg", r"none.jpg cannot be read \(No such file or directory\): give the path"),
    ([], "pictures is empty"),
    (np.zeros((2, 3, 4, 5, 3)), r"picture 0 has shape \(2, 3, 4, 5, 3\): give"),
    (np.full((4, 4), 7.0), r"float images range over \[7, 7\]"),
  ):
    with pytest.raises(UserError, match=message) as error:
      mage.preprocess(given)
    assert_clear(error)
  monkeypatch.setitem(sys.modules, "maskgen.data.eager", None)  # as where TensorFlow is absent
  monkeypatch.delattr(sys.modules["maskgen.data"], "eager")
  with pytest.raises(UserError, match=r"preprocess needs TensorFlow .* or give images of 16x16") as error:
    mage.features(files[0])
  assert_clear(error)


def test_a_model_prints_what_it_is(mage, tokenizer):
  text = str(mage)
  assert text.startswith("TokenModel of objective 'mage'\n  images: 16x16x3\n  parameters: main ")
  assert "tokenizer " in text and "preprocessing: decode(3)|resize(16)" in text and ", generate, " in text
  assert "generator " in str(tokenizer)
  named = type(mage)({**mage.config, "classes": ["cat", "dog"]}, mage.objective, mage.variables)
  assert "classes: 2, cat, dog" in str(named)


@pytest.mark.parametrize(
  "convert",
  [
    lambda mask: mask.astype(int),
    lambda mask: np.uint8(255) * mask,
    lambda mask: mask.astype(np.float32),
    lambda mask: mask[..., None],
    jnp.asarray,
    Image.fromarray,
  ],
)
def test_masks_come_in_many_forms(convert, mage):
  expected = mage.inpaint(BLACK_AND_WHITE, hole()[0], **OPTIONS)
  np.testing.assert_array_equal(mage.inpaint(BLACK_AND_WHITE, convert(hole()[0]), **OPTIONS), expected)


def test_a_picture_is_edited_as_it_is(mage):
  image = BLACK_AND_WHITE[0]
  expected = mage.inpaint(image, hole()[0], **OPTIONS)
  np.testing.assert_array_equal(mage.inpaint(Image.fromarray(image), hole()[0], **OPTIONS), expected)


def test_numbers_come_in_many_forms(mage):
  expected = mage.generate(seed=3, batch=2, **OPTIONS)
  for kind in (np.int64, np.uint8, jnp.int32):
    options = dict(steps=kind(2), temperature=np.float32(1.0))
    np.testing.assert_array_equal(mage.generate(seed=kind(3), batch=kind(2), **options), expected)
  images, mask = BLACK_AND_WHITE, hole()
  np.testing.assert_array_equal(
    mage.inpaint(images, mask, feather=np.int32(1), **OPTIONS),
    mage.inpaint(images, mask, feather=1, **OPTIONS),
  )


# Tools


def test_the_generate_tool_writes_a_grid(trained, tmp_path, capsys):
  file = tmp_path / "grid.png"
  generate.main([f"--model={trained / 'mage'}", f"--out={file}", "--count=5", "--seed=3", "--steps=2"])
  assert str(file) in capsys.readouterr().out
  with Image.open(file) as picture:
    assert picture.mode == "RGB" and max(picture.size) >= 512
    assert len(np.unique(np.asarray(picture))) > 2


def test_the_generate_tool_takes_an_export(trained, tmp_path):
  export.main([f"--model={trained / 'mage'}", f"--out={tmp_path / 'export'}"])
  for model, file in ((trained / "mage", "a.png"), (tmp_path / "export", "b.png")):
    generate.main([f"--model={model}", f"--out={tmp_path / file}", "--count=2", "--temperature=2.0"])
  assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("tool", [generate, export])
def test_tools_explain_themselves(tool, capsys):
  with pytest.raises(SystemExit) as stop:
    tool.main(["--help"])
  assert stop.value.code == 0
  assert f"python -m {tool.__name__} --model=" in capsys.readouterr().out


# Classes of models


def test_each_kind_of_model_has_its_class(mage, tokenizer):
  assert type(mage) is serving.TokenModel and type(tokenizer) is serving.Tokenizer
  assert isinstance(mage, maskgen.Model)
  assert hasattr(mage, "generate") and not hasattr(tokenizer, "generate")
  with pytest.raises(
    UserError, match="'tokenizer' has no 'paint': call one of code_vectors, decode, encode, loss, reconstruct"
  ):
    tokenizer.paint(pictures(1))


def test_any_prediction_function_can_be_called(mage):
  losses = mage.call("loss", {"image": pictures(3)}, seed=1)
  assert losses["loss"].shape == (3,)
  again, other = (mage.call("loss", {"image": pictures(3)}, seed=seed)["loss"] for seed in (1, 2))
  np.testing.assert_array_equal(again, losses["loss"])
  assert (other != again).any()
  with pytest.raises(UserError, match="'mage' has no 'paint': call one of"):
    mage.call("paint", {})


class Painter(maskgen.Model):
  """A user's own class."""


def test_an_objective_of_a_user_names_its_class(tokenizer):
  class Own(type(tokenizer.objective)):
    serving = f"{__name__}.Painter"

  assert serving.loading.find_class(Own) is Painter
  assert serving.loading.find_class(object) is maskgen.Model


def test_variables_are_on_the_device_once(mage):
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(mage.variables))
