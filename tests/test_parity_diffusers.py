"""The same numbers as PyTorch's diffusers and transformers: tiny models of each family with random weights.

PyTorch computes them in a separate process (diffusers_reference.py), which needs the extra `parity`.
"""

import functools
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_vilex import SECTION

import maskgen
from maskgen import objectives
from maskgen.importers import diffusers, diffusers_configs, torch_tensors
from maskgen.models.text_to_image import TEXT_PARTS, TextToImage
from maskgen.models.unet import Condition
from maskgen.numerics import diffusion
from maskgen.numerics.prompts import Segment
from maskgen.numerics.text import open_text_tokenizer
from maskgen.serving import ImageWords
from maskgen.tools import convert

FAMILIES = ("sd15", "sd21", "sdxl")
PROGRAM = pathlib.Path(__file__).parent / "diffusers_reference.py"
MERGES = pathlib.Path(__file__).parents[2] / "shared" / "weights" / "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  for package in ("torch", "diffusers", "transformers"):
    if importlib.util.find_spec(package) is None:
      pytest.skip(f"{package} is not installed: pip install 'maskgen[parity]'")
  folder = tmp_path_factory.mktemp("diffusers")
  compute(folder, *([str(MERGES)] if MERGES.exists() else []))
  return folder


def compute(*arguments):
  done = subprocess.run([sys.executable, str(PROGRAM), *map(str, arguments)], capture_output=True, text=True)
  assert not done.returncode, done.stderr[-3000:]


@functools.cache
def load(folder, family):
  return diffusers.load(folder / family / "model"), load_file(folder / family / "reference.safetensors")


def check(found, expected, tolerance=1e-4):
  """Compares relative to the largest value."""
  found, expected = np.asarray(found), np.asarray(expected)
  assert found.shape == expected.shape
  assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoders(folder, family):
  loaded, arrays = load(folder, family)
  for i, (part, encoder) in enumerate(zip(TEXT_PARTS, loaded.model.text_encoders, strict=False)):
    ids, end = arrays[f"text_{i}/ids"], arrays[f"text_{i}/end"]
    found = jax.jit(encoder.apply)({"params": loaded.params[part]}, ids, end)
    for name, value in found._asdict().items():
      check(value, arrays[f"text_{i}/{name}"])


@pytest.mark.parametrize("family", FAMILIES)
def test_unet(folder, family):
  loaded, arrays = load(folder, family)
  condition = Condition(arrays["unet/context"], arrays.get("unet/pooled"), arrays.get("unet/sizes"))
  predict = jax.jit(loaded.model.predict)
  found = predict(loaded.params, arrays["unet/noisy"], arrays["unet/time"], condition)
  check(found, arrays["unet/predicted"])


@pytest.mark.parametrize("family", FAMILIES)
def test_autoencoder(folder, family):
  loaded, arrays = load(folder, family)
  found = jax.jit(loaded.model.encode)(loaded.params, arrays["vae/images"])
  check(found.mean, arrays["vae/mean"])
  check(found.std, arrays["vae/std"])
  found = jax.jit(loaded.model.decode)(loaded.params, arrays["vae/latents"])
  check(found, arrays["vae/decoded"].clip(0, 1))


@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_to_images(folder, family, sampler):
  """Whole pipelines: tokenizers, text encoders, guidance, four steps, decoder."""
  loaded, arrays = load(folder, family)
  model = loaded.model

  def condition(params, texts):
    ids, end = loaded.tokenize(texts)
    return model.condition(params, model.embed(params, ids), end, size=(32, 64))

  @jax.jit
  def generate(params, noise):
    prompts = condition(params, ["the cat on the mat", "a cat"])
    null = model.null(condition(params, ["on a dog"] * 2))
    return model.generate(params, noise, prompts, null, guidance=3.0, sampler=sampler, steps=4)

  found = generate(loaded.params, arrays["noise"])
  check(found, arrays[f"{sampler}/images"].clip(0, 1), tolerance=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_generates(folder, family, tmp_path):
  convert.main(["--format=diffusers", f"--weights={folder / family / 'model'}", f"--out={tmp_path / 'out'}"])
  model, arrays = maskgen.load(tmp_path / "out"), load_file(folder / family / "reference.safetensors")
  negative = None if family == "sdxl" else "on a dog"  # as the reference
  request = model.request(0, None, ["the cat on the mat", "a cat"], negative) | {"noise": arrays["noise"]}
  found = model.call("generate", request, sampler="ddim", steps=4, guidance=3.0, height=32, width=64)
  check(found, arrays["ddim/images"].clip(0, 1), tolerance=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_tokenizers_pad_alike(folder, family):
  """Published folders have vocab.json and merges.txt, newer ones tokenizer.json."""
  texts = ["the cat on the mat", "", "cat " * 20]
  old, new = (diffusers.load(folder / family / name).tokenize(texts) for name in ("published", "model"))
  jax.tree.map(np.testing.assert_array_equal, old, new)
  paddings = {"sd15": [519], "sd21": [0], "sdxl": [519, 0]}
  assert [ids[1, -1] for ids in old[0]] == paddings[family]
  assert old[1].tolist() == [7, 1, 11]


@pytest.fixture(scope="module")
def inverted(folder):
  """The tokens of an image, used as a word in a prompt of diffusers."""
  tokens = {}
  for family in FAMILIES:
    decoder = dict(name="diffusers", folder=str(folder / family / "model"), image_size=(32, 64))
    section = SECTION | dict(decoder=decoder, tokens=4)
    model = ImageWords({"objective": section}, objectives.build(section), {})
    width = sum(model.objective.text_to_image.model.text_widths)
    tokens[family] = model, np.random.default_rng(0).normal(size=(3, width)).astype(np.float32)
    model.write_embedding(folder / family / "inversion.safetensors", tokens[family][1])
  compute(folder, "inversions")
  return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_textual_inversions(folder, inverted, family):
  """Several vectors, among words; and one file for each kind of model."""
  model, tokens = inverted[family]
  laid = model.lay_out("the {} on the mat", [tokens])
  text_to_image, params = model.objective.text_to_image, load(folder, family)[0].params
  said = [
    text_to_image.words(params, ids[None], number[None])
    for ids, number in zip(laid["words"], laid["num_words"], strict=True)
  ]
  image = Segment(laid["vectors"], laid["number"])
  found, _ = text_to_image.condition(params, [said[0], image, said[1]])
  expected = load_file(folder / family / "inverted.safetensors")
  check(found.context, expected["context"])
  assert ("pooled" in expected) == (family == "sdxl")
  if family == "sdxl":
    check(found.pooled, expected["pooled"])


def test_clip_tokenizer(folder):
  if not (folder / "clip.json").exists():
    pytest.skip(f"{MERGES} is not there")
  tokenizer = open_text_tokenizer(f"bpe:{folder / 'clip'}")
  expected = json.loads((folder / "clip.json").read_text())
  assert len(expected["texts"]) > 30
  for text, ids, padded in zip(expected["texts"], expected["ids"], expected["padded"], strict=True):
    assert tokenizer.encode(text) == ids[1:-1], text
    assert list(tokenizer.pad(text, 77)) == padded, text


def test_steps_of_samplers(folder):
  for config, sampler, steps, times, levels in json.loads((folder / "schedules.json").read_text()):
    schedule = diffusers_configs.schedule(config, "the schedule")
    np.testing.assert_allclose(schedule.alphas_squared[::111], levels, rtol=1e-4)
    if max(times) >= schedule.steps:  # diffusers only fails when it looks their noise up
      continue
    assert diffusion.visited(schedule, sampler, steps).tolist() == times, (config, sampler, steps)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_models_fit(folder, family):
  """Compares only names and shapes: no memory, no download."""
  parts = json.loads((folder / "shapes.json").read_text())[family]
  texts = [part for part in parts if part.startswith("text_encoder")]
  model = TextToImage(
    text_encoders=tuple(diffusers_configs.text_encoder(parts[part]["config"], part) for part in texts),
    unet=diffusers_configs.unet(parts["unet"]["config"], "unet"),
    autoencoder=diffusers_configs.autoencoder(parts["vae"]["config"], "vae"),
    schedule=diffusion.Schedule(),
  )
  shapes = model.shapes()
  assert shapes.keys() == parts.keys()
  for part, described in parts.items():
    buffers = diffusers.BUFFERS.get(part, ())
    names = torch_tensors.fit(
      described["shapes"], shapes[part], part, rename=diffusers.rename, buffers=buffers
    )
    assert len(names) >= len(described["shapes"]) - len(buffers)
  prefixed = {f"text_model.{name}": shape for name, shape in parts["text_encoder"]["shapes"].items()}
  prefixed["text_model.embeddings.position_ids"] = (1, 77)
  fitted = torch_tensors.fit(
    prefixed,
    shapes["text_encoder"],
    "old",
    rename=diffusers.rename,
    buffers=diffusers.BUFFERS["text_encoder"],
  )
  assert len(fitted) == len(prefixed) - 1
