"""Sentences with images in them, as users give them to a model."""

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from test_vilex import LENGTH, SECTION, SIZE, TOKENS, batch, setup

import maskgen
from maskgen import checkpoint, lexicon
from maskgen.errors import UserError

trained = tiny.trained


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp("vilex") / "model"
  checkpoint.write_export(folder, {"objective": SECTION}, setup()[1])
  return maskgen.load(folder)


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
  assert model.generate(0, 1, prompt="a cat").shape == (1, SIZE, SIZE, 3)


def test_layouts():
  objective, _, _ = setup()
  tokens = np.ones((TOKENS, 8), np.float32)
  laid = lexicon.lay_out(objective, "a {} on {}", [tokens, tokens[:2]])
  np.testing.assert_array_equal(laid["num_words"], [1, 1, 0])
  np.testing.assert_array_equal(laid["number"], [3, 2])  # as many as fit, of a room of 8 with 2 words
  assert laid["vectors"].shape == (2, TOKENS, 8) and laid["words"].shape == (3, LENGTH - 2)
  behind = lexicon.lay_out(objective, "on blue", [tokens])
  np.testing.assert_array_equal(behind["num_words"], [0, 2])
  assert "words" not in lexicon.lay_out(objective, "", [tokens])
  for arguments, message in (
    (("a {}", []), r"has 1 places \{\} for 0 images"),
    (("a dog", []), "has a word that this model never read, 'dog'"),
    (("a red blue cat on background a {}", [tokens] * 1, 4), "at most 1 fit"),
    (("a red blue cat on background a red {}", [tokens]), "leaves no room for 1 images"),
    (("{}", [tokens], 9), "num_tokens is 9: this model has 1 to 4"),
  ):
    with pytest.raises(UserError, match=message):
      lexicon.lay_out(objective, *arguments)


def test_between_tokens():
  first, second = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
  second *= np.linalg.norm(first, axis=-1, keepdims=True) / np.linalg.norm(second, axis=-1, keepdims=True)
  for share, expected in ((0.0, first), (1.0, second)):
    np.testing.assert_allclose(lexicon.between(first, second, share), expected, atol=1e-6)
  middle = lexicon.between(first, second, 0.5)
  np.testing.assert_allclose(*(np.linalg.norm(x, axis=-1) for x in (middle, first)), rtol=1e-5)
  np.testing.assert_allclose(lexicon.between(first, first, 0.3), first, atol=1e-6)


def test_textual_inversions(tmp_path):
  objective, _, _ = setup()
  tokens = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
  lexicon.write_embedding(tmp_path / "cat.safetensors", tokens, objective)
  found = load_file(tmp_path / "cat.safetensors")
  assert found.keys() == {"emb_params"}
  np.testing.assert_array_equal(found["emb_params"], tokens)


def test_other_models_have_no_tokens_of_images(trained):
  tokenizer = maskgen.load(trained / "tokenizer")
  images = np.zeros((1, 16, 16, 3), np.uint8)
  for call in (
    lambda: tokenizer.encode(images, num_tokens=2),
    lambda: tokenizer.reconstruct(images, num_tokens=2),
    lambda: tokenizer.generate(images=[images[0]]),
  ):
    with pytest.raises(UserError, match="of objective 'tokenizer' knows no tokens of images"):
      call()
