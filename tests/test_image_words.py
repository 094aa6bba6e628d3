"""Users' prompts that contain images."""

import numpy as np
import pytest
import test_text_to_image
from safetensors.numpy import load_file, save_file
from test_vilex import LENGTH, SECTION, SIZE, TOKENS, batch, setup

import maskgen
from maskgen import objectives, storage
from maskgen.errors import UserError
from maskgen.serving import ImageWords, image_words

folders = test_text_to_image.folders


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp("vilex") / "model"
  storage.write_export(folder, {"objective": SECTION}, setup()[1])
  return maskgen.load(folder)


def without_weights(section=SECTION):
  """A model that reads prompts and files."""
  return ImageWords({"objective": section}, objectives.build(section), {})


def test_tokens_of_images(model):
  images = batch()["image"]
  tokens = model.encode(images)
  assert tokens.shape == (4, TOKENS, 8) and tokens.dtype == np.float32
  np.testing.assert_array_equal(model.encode(images, num_tokens=2), tokens[:, :2])
  assert model.reconstruct(images, num_tokens=1).dtype == np.uint8
  again = [model.reconstruct(images, seed=seed) for seed in (0, 0, 1)]
  np.testing.assert_array_equal(again[0], again[1])
  assert (again[0] != again[2]).any()


def test_prompts_with_images(model):
  first, second = batch()["image"][:2]
  made = model.generate(3, 2, prompt="a {} on {} background", images=[first, second], num_tokens=2)
  assert made.shape == (2, SIZE, SIZE, 3)
  tokens = model.encode(np.stack([first, second]))
  same = model.generate(3, 1, prompt="a {} on {} background", images=list(tokens), num_tokens=2)
  np.testing.assert_allclose(same[0], made[0], atol=1e-5)  # tokens for images, and whatever the batch
  ends = model.interpolate(first, second, 2, text_guidance=1.0)
  np.testing.assert_allclose(ends[1], model.generate(0, 1, images=[second])[0], atol=1e-4)
  assert model.generate(prompt="a cat").shape == (1, SIZE, SIZE, 3)
  arrays = model.generate(3, prompt="a {} on {} background", images=tokens, num_tokens=np.full(2, 2))
  np.testing.assert_allclose(arrays[0], made[0], atol=1e-5)
  texts = ["{}{}", "a {} on {} background"]  # one per image, the first without words
  several = model.generate(3, prompt=texts, images=tokens, num_tokens=2)
  np.testing.assert_allclose(several[1], made[1], atol=1e-5)
  alone = model.generate(3, 2, prompt=texts[0], images=tokens, num_tokens=2)
  np.testing.assert_allclose(several[0], alone[0], atol=1e-5)
  for given, message in (
    (first, "images is a single image: give a list"),
    ([np.zeros((TOKENS + 1, 8))], f"num_tokens is {TOKENS + 1}: this model has 1 to"),
  ):
    with pytest.raises(UserError, match=message):
      model.generate(images=given)
  for prompt, message in (
    (["a", "a"], "prompt has 2 texts for 3 images: give one, or one for each"),
    (3, "prompt is 3: give a text, or one per generated image"),
    ([], r"prompt is \[\]: give a text, or one per generated image"),
    (["a", 3, "a"], "give a text, or one per generated image"),
  ):
    with pytest.raises(UserError, match=message):
      model.generate(batch=3, prompt=prompt)
  with pytest.raises(UserError, match="count is 0"):
    model.interpolate(first, second, 0)


def test_layouts():
  model = without_weights()
  tokens = np.ones((TOKENS, 8), np.float32)
  laid = model.lay_out("a {} on {}", [tokens, tokens[:2]])
  np.testing.assert_array_equal(laid["num_words"], [1, 1, 0])
  np.testing.assert_array_equal(laid["number"], [3, 2])  # as many as fit, of a room of 8 with 2 words
  assert laid["vectors"].shape == (2, TOKENS, 8) and laid["words"].shape == (3, LENGTH - 2)
  behind = model.lay_out("on blue", [tokens])
  np.testing.assert_array_equal(behind["num_words"], [0, 2])
  assert "words" not in model.lay_out("", [tokens])
  for arguments, message in (
    (("a {}", []), r"has 1 place \{\} for 0 images"),
    (("a dog", []), "has the out-of-vocabulary word 'dog'"),
    (("a red blue cat on background a {}", [tokens] * 1, 4), "at most 1 fit"),
    (("a red blue cat on background a red {}", [tokens]), "leaves no room for 1 image:"),
    (("a red blue cat on background a red cat", []), "is 1 token too long: shorten it"),
    (("{}", [tokens], 9), "num_tokens is 9: this model has 1 to 4"),
  ):
    with pytest.raises(UserError, match=message):
      model.lay_out(*arguments)


def test_shares_of_a_prompt():
  """Requested numbers are exact; the other images share the rest."""
  model = without_weights()
  tokens = np.ones((TOKENS, 8), np.float32)
  for wanted, expected in (
    ([1, None, None], [1, 3, 3]),
    ([4, 3, None], [4, 3, 1]),
    ([None, 1, 2], [4, 1, 2]),
    (2, [2, 2, 2]),
    (None, [2, 2, 2]),
  ):
    laid = model.lay_out("{}{}{}", [tokens] * 3, wanted)
    np.testing.assert_array_equal(laid["number"], expected)
  for images, wanted, message in (
    (3, [4, 4, None], "num_tokens asks for 8 tokens and leaves too few for 1 other image: .* at most 8 fit"),
    (3, [4, 4, 4], "asks for 12 tokens"),
    (3, [1, 2], "num_tokens has 2 numbers for 3 images: give one for each"),
    (3, [1, 2, 0], "num_tokens is 0: this model has 1 to 4"),
    (9, None, "leaves no room for 9 images"),
  ):
    with pytest.raises(UserError, match=message):
      model.lay_out("{}" * images, [tokens] * images, wanted)
  with pytest.raises(UserError, match="num_tokens is 3, but only 2 tokens of the image are given"):
    model.lay_out("{}", [tokens[:2]], 3)


def test_another_image_in_each_row(model):
  images = batch()["image"][:3]
  rows = model.generate(5, prompt="{} on {}", images=[images, images[0]])
  assert len(rows) == 3
  tokens = model.encode(images)
  np.testing.assert_array_equal(model.generate(5, prompt="{} on {}", images=[tokens, images[0]]), rows)
  first = model.generate(5, 1, prompt="{} on {}", images=[images[0]] * 2)
  np.testing.assert_allclose(first[0], rows[0], atol=1e-5)
  third = model.generate(5, 3, prompt="{} on {}", images=[images[2], images[0]])
  np.testing.assert_allclose(third[2], rows[2], atol=1e-5)
  with pytest.raises(UserError, match="an image of the prompt has 3 rows for a batch of 2"):
    model.generate(5, 2, images=[images])


def test_negative_prompts(model):
  """Guidance moves away from them instead of the empty prompt."""
  image = batch()["image"][0]
  given = dict(prompt="{} on blue", images=[image], batch=1)
  usual = model.generate(**given, image_guidance=2.0)
  np.testing.assert_allclose(
    model.generate(**given, negative_prompt="", image_guidance=2.0), usual, atol=1e-5
  )
  away = model.generate(**given, negative_prompt="a red cat", image_guidance=2.0)
  assert np.abs(away - usual).max() > 1e-4
  with pytest.raises(UserError, match=r"negative_prompt has no effect .* set another image_guidance"):
    model.generate(**given, negative_prompt="a red cat", image_guidance=1)
  with pytest.raises(UserError, match="negative_prompt needs a prompt that it is compared with"):
    model.request(0, negative_prompt="blue")
  words = model.generate(prompt="blue", negative_prompt="blue", batch=1, text_guidance=5.0)
  np.testing.assert_allclose(words, model.generate(prompt="blue", batch=1, text_guidance=1.0), atol=1e-5)
  with pytest.raises(UserError, match=r"no effect on a prompt of words at text_guidance=1: set another"):
    model.generate(prompt="blue", negative_prompt="red", text_guidance=1.0)
  with pytest.raises(UserError, match="has the out-of-vocabulary word 'dog'"):
    model.generate(**given, negative_prompt="a dog")
  with pytest.raises(UserError, match=r"has 9 words .*: shorten it, this model reads 8"):
    model.generate(**given, negative_prompt="a " * 9)


def test_between_tokens():
  first, second = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
  second *= np.linalg.norm(first, axis=-1, keepdims=True) / np.linalg.norm(second, axis=-1, keepdims=True)
  start, middle, end = image_words.between(first, second, 3)
  np.testing.assert_allclose(start, first, atol=1e-6)
  np.testing.assert_allclose(end, second, atol=1e-6)
  np.testing.assert_allclose(*(np.linalg.norm(x, axis=-1) for x in (middle, first)), rtol=1e-5)
  for same in image_words.between(first, first, 4):
    np.testing.assert_allclose(same, first, atol=1e-6)
  assert image_words.between(first, second[:2], 2).shape == (2, 2, 8)


def test_files_of_tokens(tmp_path):
  model = without_weights()
  tokens = np.random.default_rng(0).normal(size=(3, 2, 8)).astype(np.float32)
  model.write_tokens(tmp_path / "three.safetensors", tokens)
  np.testing.assert_array_equal(model.read_tokens(tmp_path / "three.safetensors"), tokens)
  assert load_file(tmp_path / "three.safetensors").keys() == {"tokens"}
  with pytest.raises(UserError, match=r"shape \(2, 8\): give those of a batch"):
    model.write_tokens(tmp_path / "two.safetensors", tokens[0])
  with pytest.raises(UserError, match=r"shape \(3, 2, 8\): give those of one image"):
    model.write_embedding(tmp_path / "word.safetensors", tokens)


def test_functions_of_the_first_version(tmp_path):
  from maskgen import lexicon

  objective, path = setup()[0], tmp_path / "cat.safetensors"
  tokens = np.ones((2, 8), np.float32)
  maskgen.lexicon.write_embedding(path, tokens, objective)
  np.testing.assert_array_equal(lexicon.read_tokens(path, objective), tokens[None])
  lexicon.write_tokens(path, 2 * tokens[None])
  np.testing.assert_array_equal(lexicon.read_tokens(path, objective), 2 * tokens[None])


@pytest.mark.parametrize(("name", "widths"), [("sd", (8,)), ("xl", (4, 8))])
def test_textual_inversions(folders, tmp_path, name, widths):
  """Written for models with one and two text encoders, and read back."""
  decoder = dict(name="diffusers", folder=str(folders / name), image_size=(8, 8))
  model = without_weights(SECTION | dict(decoder=decoder, tokens=3))
  tokens = np.random.default_rng(0).normal(size=(2, sum(widths))).astype(np.float32)
  model.write_embedding(tmp_path / "cat.safetensors", tokens)
  found = load_file(tmp_path / "cat.safetensors")
  names = ["emb_params"] if len(widths) == 1 else ["clip_l", "clip_g"]
  assert found.keys() == {*names}
  np.testing.assert_array_equal(np.concatenate([found[name] for name in names], axis=-1), tokens)
  np.testing.assert_array_equal(model.read_tokens(tmp_path / "cat.safetensors"), tokens[None])
  if len(widths) == 1:  # under the name of a word, and in half precision, as others write them
    save_file({"<cat>": tokens.astype(np.float16)}, tmp_path / "cat.safetensors")
    found = model.read_tokens(tmp_path / "cat.safetensors")
    np.testing.assert_allclose(found, tokens[None], atol=1e-3)


@pytest.mark.parametrize(
  ("data", "message"),
  [
    ({"tokens": np.zeros((1, 2, 9))}, r"holds tokens of shape \[2, 9\], this model's have \[1 to 4, 8\]"),
    ({"tokens": np.zeros((1, 5, 8))}, r"holds tokens of shape \[5, 8\]"),
    ({"tokens": np.zeros((1, 0, 8))}, r"holds tokens of shape \[0, 8\]"),
    ({"tokens": np.zeros(8)}, r"holds tokens of shape \[\]"),
    ({"tokens": np.full((1, 1, 8), np.nan)}, "holds tokens that are not finite"),
    ({"a": np.zeros((1, 8)), "b": np.zeros((1, 8))}, "holds no tokens of images: give a file written by"),
    ({"word": np.zeros(())}, r"holds tokens of shape"),
    ({"clip_l": np.zeros((1, 8)), "clip_g": np.zeros((1, 8))}, "holds no tokens of images"),
  ],
)
def test_wrong_files_of_tokens(data, message, tmp_path):
  save_file({name: value.astype(np.float32) for name, value in data.items()}, tmp_path / "a.safetensors")
  with pytest.raises(UserError, match=message):
    without_weights().read_tokens(tmp_path / "a.safetensors")
