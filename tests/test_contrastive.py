"""Contrastive learning of images and texts: the loss, frozen encoders, zero-shot classification, retrieval.

tests/golden/siglip.npz holds embeddings, and what big_vision's code computed from them in float64.
"""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskgen import evaluators, objectives
from maskgen.errors import UserError
from maskgen.evaluators import retrieval
from maskgen.numerics import losses
from maskgen.numerics.text import Captions
from maskgen.training.experiment import Experiment

GOLDEN = pathlib.Path(__file__).parent / "golden" / "siglip.npz"
WORDS = dict(text_tokenizer="list:a picture of red blue cat dog", length=8)
VIT = dict(name="vit", image_size=(8, 8), patch=4, width=16, depth=1, heads=2, pooling="attention")
READER = dict(width=8, depth=1, heads=2, hidden=8)
SECTION = dict(name="contrastive", encoder=VIT, captions=WORDS, text_encoder=READER)


@pytest.mark.parametrize("chunk", [1, 4096])
def test_loss_and_gradients_are_those_of_the_reference(chunk):
  with np.load(GOLDEN) as archive:
    golden = dict(archive)
  objective = objectives.build(SECTION | {"chunk": chunk})
  weights = {name: jnp.asarray(golden[f"weights/{name}"]) for name in ("t", "b", "img_raw", "txt_raw")}

  def loss(weights):
    contrast = {"scale": weights["t"][0], "bias": weights["b"][0]}
    found, _ = objective.compare({"main": {"contrast": contrast}}, weights["img_raw"], weights["txt_raw"])
    return found.mean()

  value, gradients = jax.value_and_grad(loss)(weights)
  np.testing.assert_allclose(value, golden["loss"], rtol=1e-6)
  for name, gradient in gradients.items():
    expected = golden[f"grad_whole/{name}"]
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.linalg.norm(expected), err_msg=name)


@pytest.mark.parametrize("bias", [None, -1.0])
def test_the_loss_is_the_same_in_chunks(bias):
  rng = np.random.default_rng(0)
  images, texts = (rng.normal(size=(7, 4)) for _ in range(2))
  images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, images + 0.9 * texts))
  logits = 3.0 * images @ texts.T + (bias or 0.0)
  own = np.diag(logits)
  if bias is None:
    expected = np.log(np.exp(logits).sum(axis=1)) - own
  else:
    signs = 2 * np.eye(7) - 1
    expected = np.log1p(np.exp(-signs * logits)).sum(axis=1)
  gradients = []
  for chunk, parts in ((4, 2), (100, 1)):

    def loss(images, texts, chunk=chunk):
      return losses.contrast(images, texts, jnp.float32(3.0), bias, chunk)

    found, nearest = loss(*(x.astype(np.float32) for x in (images, texts)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_array_equal(nearest, logits.argmax(axis=1) == np.arange(7))
    assert f"length={parts}" in str(jax.make_jaxpr(loss)(images, texts))
    gradient = jax.grad(lambda *x: loss(*x)[0].mean(), (0, 1))
    gradients.append(gradient(*(jnp.float32(x) for x in (images, texts))))
  assert 0 < nearest.mean() < 1
  np.testing.assert_allclose(*gradients, atol=1e-6)


def test_softmax_compares_in_both_directions_and_bounds_its_temperature():
  objective = objectives.build(SECTION | {"loss": "softmax", "temperature": 0.001, "embedding_width": 4})
  variables = {"params": {"main": {"contrast": {"scale": -jnp.log(0.001)}}}}
  rng = np.random.default_rng(0)
  images, texts = (losses.unit_length(jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)) for _ in range(2))
  logits = 100.0 * np.asarray(images @ texts.T, np.float64)
  over = [np.log(np.exp(logits).sum(axis=axis)) - np.diag(logits) for axis in (0, 1)]
  found, _ = objective.compare(variables["params"], images, texts)
  np.testing.assert_allclose(found, np.mean(over, axis=0), rtol=1e-4)


def test_a_frozen_encoder_stays_as_it_was():
  encoder = objectives.encoder_part(VIT, "encoder")
  params = {"main": encoder.encoder.init(jax.random.key(1), pooled=True)}
  objective = objectives.build(SECTION | {"trained": "text"})
  assert objective.pretrained_shapes().keys() == {"encoder"}
  variables = jax.jit(objective.init)(jax.random.key(0), {"encoder": {"params": params}})
  assert variables["params"]["main"].keys() == {"text_encoder", "contrast"}
  start = variables["params"]["main"]["contrast"]
  np.testing.assert_allclose([start["scale"], start["bias"]], [np.log(10.0), -10.0], rtol=1e-6)
  images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
  pooled = encoder.pool({"params": params}, {"image": images})
  found = objective.predict_fns()["embed_image"](variables, {"image": images}, jax.random.key(0))
  np.testing.assert_allclose(found, losses.unit_length(pooled), rtol=1e-6)


# Evaluators. Images are 1 x 1 and show the number of a class, and embeddings say which class it is.

NAMES = ("cat", "dog", "red cat", "red dog", "blue cat", "blue dog")
READ = Captions(**WORDS)


def make_context(labels, said, names=NAMES, captions=READ):
  """Images of the classes `labels`, each with the name of a class, `said`, as its caption."""
  table = jnp.asarray(np.concatenate([READ.read(NAMES), READ.read([f"a picture of {n}" for n in NAMES])]))
  directions = jnp.eye(len(NAMES))

  def embed_image(variables, batch, rng):
    return directions[batch["image"][:, 0, 0, 0].astype(int)]

  def embed_text(variables, batch, rng):
    same = (batch["caption"][:, None] == table[None]).all(axis=-1)
    return directions[same.argmax(axis=1) % len(NAMES)]

  images = np.asarray(labels, np.uint8)[:, None, None, None]
  batch = {
    "image": jnp.asarray(images),
    "label": jnp.asarray(labels),
    "caption": jnp.asarray(READ.read([NAMES[i] for i in said])),
    "valid": jnp.ones(len(labels), bool),
  }
  predict = {"embed_image": embed_image, "embed_text": embed_text}
  objective = tiny.FakeObjective(captions=captions)
  return evaluators.Context(objective, predict, lambda split: [batch], lambda seed, frozen: None, names)


def run(kind, context, **options):
  evaluator = evaluators.build("it", {"type": kind, **options}, context)
  return evaluator.run(None, jax.random.key(0)).numbers


def test_zero_shot_classification():
  context = make_context([0, 1, 2, 2], [0, 1, 2, 2])
  found = run("zero_shot", context, templates=("{}", "a picture of {}"))
  chance = dict(top1_chance=1 / 6, top5_chance=5 / 6, top1_constant=0.5)
  assert found == pytest.approx(dict(top1=1.0, top5=1.0) | chance)
  # Names in another order: the classes 0 and 1 are mistaken for each other.
  swapped = make_context([0, 1, 2, 2], [0, 1, 2, 2], names=(NAMES[1], NAMES[0], *NAMES[2:]))
  assert run("zero_shot", swapped)["top1"] == 0.5


def test_retrieval():
  # Two images have one caption. The images 0 and 1 have each other's.
  found = run("retrieval", make_context([0, 1, 2, 2], [1, 0, 2, 2]))
  assert found["image_to_text_recall1"] == 0.5
  assert found["text_to_image_recall1"] == pytest.approx(1 / 3)
  assert found["image_to_text_recall1_chance"] == pytest.approx(1 / 3)
  assert found["text_to_image_recall1_chance"] == pytest.approx((1 / 4 + 1 / 4 + 2 / 4) / 3)
  assert found["image_to_text_recall5"] == found["text_to_image_recall5_chance"] == 1.0


def test_chance_is_counted():
  number = np.array([0, 0, 0, 1, 1, 2, 2, 2])
  draws = list(itertools.combinations(number, 5))
  expected = np.mean([[text in draw for draw in draws] for text in range(3)])
  found = retrieval.recalls(np.eye(8, dtype=np.float32), np.eye(8, dtype=np.float32)[:3], number)
  assert found["text_to_image_recall5_chance"] == pytest.approx(expected)


# Wrong settings


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (dict(loss="sigmod"), "did you mean 'sigmoid'"),
    (dict(trained="head"), "trained 'head' does not exist"),
    (dict(temperature=0.0), "give a value above 0"),
    (dict(encoder=dict(VIT, name="diffusion")), "config.objective.encoder"),
  ],
)
def test_wrong_settings(change, words):
  with pytest.raises(UserError, match=words):
    objectives.build(SECTION | change)


def test_an_encoder_with_a_tokenizer_is_frozen():
  mage = dict(tiny.stage("mage")["objective"])
  with pytest.raises(UserError, match="trained='text'"):
    objectives.build(SECTION | {"encoder": mage})
  objectives.build(SECTION | {"encoder": mage, "trained": "text"})


def experiment(**changes):
  config = tiny.stage("mage")
  captions = {"text_tokenizer": WORDS["text_tokenizer"], "length": 8}
  preprocess = f"decode(3)|resize(8)|tokenize({WORDS['text_tokenizer']!r}, 8)"
  data = dict(source="emoji", preprocess=preprocess, eval_preprocess=preprocess)
  objective = {**SECTION, "captions": captions, "trained": changes.pop("trained", "all")}
  config |= {"data": data, "objective": objective, "pretrained": {}, "evals": {}}
  return Experiment(config | changes)


PLAIN = dict(source="digits", preprocess="decode(3)|resize(8)", eval_preprocess="decode(3)|resize(8)")


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (dict(data=PLAIN), "provides no captions, but objective 'contrastive' reads"),
    (dict(accumulation=2, batch_size=16), "'contrastive' compares all of a batch"),
    (dict(trained="text"), "config.pretrained.encoder is missing: give the path"),
  ],
)
def test_wrong_runs(change, words):
  with pytest.raises(UserError, match=words):
    experiment(**change)


@pytest.mark.parametrize(
  ("kind", "changes", "options", "words"),
  [
    ("zero_shot", dict(names=None), {}, "the data has no labels"),
    ("zero_shot", {}, dict(templates=("a picture",)), "'{}' once"),
    ("zero_shot", {}, dict(templates=("{} {x}",)), "out-of-vocabulary word"),
    ("zero_shot", dict(names=("horse", "cat")), {}, "out-of-vocabulary word 'horse'"),
    ("retrieval", {}, dict(num_images=1), "num_images"),
  ],
)
def test_wrong_evaluations(kind, changes, options, words):
  with pytest.raises(UserError, match=words):
    run(kind, make_context([0, 1], [0, 1], **changes), **options)
