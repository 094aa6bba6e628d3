"""Evaluations of image tokens and of words beside them, on models with known answers."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maskgen import config, evaluators, objectives
from maskgen.data import digit_scenes as scenes
from maskgen.data.cpu_tf import tf
from maskgen.data.sources import open_source
from maskgen.errors import UserError
from maskgen.evaluators import classifiers, comparison, feature_spaces, set_metrics
from maskgen.images import to_float
from maskgen.models.vilex import ImageWordsSampling
from maskgen.numerics.text import Captions

BATCH, TOKENS, IMAGES = 16, 4, 40
CAPTIONS = Captions(text_tokenizer=f"list:{' '.join(scenes.WORDS)}", length=16)
SHAPE = (scenes.SIDE, scenes.SIDE, 3)


@functools.cache
def records(split):
  """The first records of a split; 40 for evaluation, which is not a multiple of the batch."""
  opened = open_source("captioned_digits", split)
  fetched = tf.data.Dataset.range(1437 if split == "train" else IMAGES).map(opened.fetch)
  found = next(fetched.batch(opened.size).as_numpy_iterator())
  texts = [text.decode() for (text,) in found["caption"]]
  found["label"] = found["label"].astype(np.int32)
  return found | {"caption": CAPTIONS.read(texts), "valid": np.ones(len(texts), bool)}


def serve(split):
  """Padded batches, sharded over all devices."""
  mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  found = records({"train": "train", "eval": "test"}[split])
  for start in range(0, len(found["valid"]), BATCH):
    part = {key: value[start : start + BATCH] for key, value in found.items()}
    missing = BATCH - len(part["valid"])
    # The padding repeats garbage, so that an evaluator that counts it gets a wrong number.
    padded = {
      key: np.concatenate([value, np.full((missing, *value.shape[1:]), key != "valid", value.dtype)])
      for key, value in part.items()
    }
    yield {key: jax.device_put(value, sharding) for key, value in padded.items()}


def encode(variables, batch, rng):
  """Tokens, each of which encodes the whole image."""
  flat = to_float(batch["image"]).reshape(len(batch["image"]), 1, -1)
  return jnp.repeat(flat, TOKENS, axis=1)


def paint(variables, batch, rng, **options):
  """What a prompt asks for, if its words count: the image in the words' colour, or else in grey."""
  if "vectors" not in batch:
    return jnp.full((len(batch["key"]), *SHAPE), 0.5)
  images = np.asarray(batch["vectors"])[:, 0, 0].reshape(-1, *SHAPE)
  if options.get("text_guidance", 1) == 0:
    return jnp.asarray(images)
  border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
  ground = np.median(border, axis=1)[:, None, None]
  flat = (images - ground).reshape(len(images), -1, 3)
  farthest = np.square(flat).sum(-1).argmax(1)
  ink = ground + flat[np.arange(len(flat)), farthest][:, None, None]
  opacity = ((images - ground) * (ink - ground)).sum(-1, keepdims=True)
  opacity = np.clip(opacity / np.square(ink - ground).sum(-1, keepdims=True), 0, 1)
  for pieces, number, old, new in zip(batch["words"], batch["num_words"], ground, ink, strict=True):
    said = [CAPTIONS.opened.decode(np.asarray(ids)[:n]) for ids, n in zip(pieces, number, strict=True)]
    # Before the image its ink, behind it its ground.
    for text, part, palette in zip(said, (new, old), (scenes.INKS, scenes.BACKGROUNDS), strict=True):
      for word, colour in palette.items():
        if word in text.split():
          part[:] = np.array(colour, np.float32) / 255
  return jnp.asarray(np.clip(ground + opacity * (ink - ground), 0, 1).astype(np.float32))


def remember(variables, batch, rng, **options):
  """The image, if the prompt has at least two tokens."""
  knows = (batch["number"] >= 2)[..., None, None]
  return jnp.where(knows, to_float(batch["image"]), 0.5)


PREDICT = {"encode": encode, "reconstruct": remember, "generate": paint}


def make_context(
  predict=None, objective=None, captions=CAPTIONS, class_names=scenes.KINDS["class"], image_tokens=TOKENS
):
  predict = PREDICT if predict is None else predict
  objective = objective or tiny.FakeObjective(
    captions=captions, tokens=image_tokens, sampling=ImageWordsSampling()
  )
  return evaluators.Context(objective, predict, serve, lambda seed, frozen: None, class_names)


def run(kind, context=None, variables=None, **options):
  evaluator = evaluators.build("it", {"type": kind, "every_steps": 1, **options}, context or make_context())
  return evaluator.run(variables, jax.random.key(0))


# Tokens of images


@pytest.fixture(scope="module")
def report():
  return run("vilex", features="glyphs", classifier="svc", num_images=IMAGES, num_pictures=20)


def test_pictures_that_are_their_sources(report):
  numbers = report.numbers
  assert numbers["class_agreement_real"] > 0.8
  for way in ("k2", "k4"):
    assert numbers[f"class_agreement_{way}"] == numbers["class_agreement_real"]
    np.testing.assert_allclose(numbers[f"feature_cosine_{way}"], 1, atol=1e-5)
    assert numbers[f"retrieval_top1_{way}"] == 1
    assert numbers[f"frechet_glyphs_{way}"] < 1e-6
  assert numbers["l1"] == 0 and numbers["ssim"] == pytest.approx(1)


def test_pictures_that_are_all_the_same(report):
  numbers = report.numbers
  for way in ("k1", "caption", "nothing"):
    assert numbers[f"class_agreement_{way}"] < 0.3
    assert numbers[f"feature_cosine_{way}"] < 0.1
    assert numbers[f"retrieval_top1_{way}"] == 1 / IMAGES
    assert numbers[f"frechet_glyphs_{way}"] > 0.1


def test_picture_of_ways_to_draw(report):
  picture = report.pictures["reconstructions"]
  assert picture.dtype == np.uint8 and picture.shape[1] > 20 * 64
  few = run("vilex", num_images=2, num_pictures=1, num_tokens=(4,)).pictures["reconstructions"]
  assert few.shape[0] == pytest.approx(picture.shape[0] * 4 / 6, rel=0.05)  # rows: 4 of 6


def test_other_ways_to_draw():
  numbers = run("vilex", make_context(captions=None), num_images=10, num_tokens=(3, 1)).numbers
  ends = {name.rpartition("_")[2] for name in numbers if name.startswith("feature_cosine")}
  assert ends == {"k1", "k3", "nothing"}
  assert not [name for name in numbers if "class" in name] and "frechet_pixels_k3" in numbers


def test_fid_and_inception_score_by_number_of_tokens(monkeypatch):
  """A projection stands for Inception-v3: the rules depend on its protocol only."""
  mix = np.random.default_rng(0).normal(size=(np.prod(SHAPE), 6))

  def extract(images):
    rows = np.asarray(to_float(images), np.float64).reshape(len(images), -1) @ mix / 5
    return {"pooled": rows, "logits": rows}

  network = comparison.Network("inception_v3", "adm", "weights", extract)
  monkeypatch.setattr(comparison, "open_network", lambda *spec: network)
  monkeypatch.setattr("maskgen.evaluators.vilex.FEATURES", 6)
  options = dict(features="inception_v3", num_tokens=(1, 4))
  numbers = run("vilex", num_images=IMAGES, **options).numbers
  assert numbers["fid40/adm/eval/unstated_k4"] < 1e-6 < 0.1 < numbers["fid40/adm/eval/unstated_k1"]
  expected = set_metrics.inception_score_in_slices(extract(jnp.asarray(records("test")["image"]))["logits"])
  assert numbers["is40/adm/unstated_k4"] == pytest.approx(expected) and expected > 1.1
  assert numbers["is40/adm/unstated_k1"] == pytest.approx(1)  # all pictures are the same
  assert not [name for name in numbers if name.startswith("frechet")]
  with pytest.raises(UserError, match="FID on 6 features needs at least 6 pictures in the evaluated images"):
    evaluators.build("it", {"type": "vilex", "num_images": 5, **options}, make_context())
  evaluator = evaluators.build("it", {"type": "vilex", "num_images": IMAGES, **options}, make_context())
  with pytest.raises(UserError, match="needs at least 6 pictures in the evaluated images, but there are 5"):
    evaluator.memory(None, {}, {"train": 100, "eval": 5})


def test_the_earlier_name_is_read_with_a_warning(caplog):
  with caplog.at_level(logging.WARNING, "maskgen"):
    old, new = (
      evaluators.build("it", dict(type=kind, num_images=2, steps=3), make_context())
      for kind in ("lexicon", "vilex")
    )
  assert type(old) is type(new) and old.sampling == new.sampling == dict(steps=3)
  renamed = [text for text in caplog.messages if "renam" in text]
  assert renamed == ["config.evals.it.type 'lexicon' is now called 'vilex': rename it"]


def test_every_way_has_the_same_noise_and_options():
  """Images depend on the seed and their index, not on the kind of reconstruction."""
  seen = []

  def draw(variables, batch, rng, **options):
    seen.append((np.asarray(jax.random.key_data(batch["key"])), options))
    return jnp.full((len(batch["key"]), *SHAPE), 0.5)

  predict = {"encode": encode, "reconstruct": draw, "generate": draw}
  options = dict(steps=3, sampler="ddim", image_guidance=2.5, text_guidance=1.5)
  run("vilex", make_context(predict), num_images=2 * BATCH, num_tokens=(4,), **options)
  assert len(seen) == 2 * 3
  for first in (0, 3):
    for keys, given in seen[first : first + 3]:
      assert given == options
      np.testing.assert_array_equal(keys, seen[first][0])
  assert (seen[0][0] != seen[3][0]).any()


# Words beside images


def test_edits_that_follow_image_and_words():
  report = run("digit_edits", num_images=IMAGES, num_tokens=(2, 4), text_guidance=(0.0, 1.0), num_pictures=3)
  numbers = report.numbers
  assert numbers["class_real"] > 0.8
  for kind in ("background", "colour"):
    for k in (2, 4):
      assert numbers[f"{kind}_followed_k{k}_s1"] == 1, kind
      assert numbers[f"{kind}_class_kept_k{k}_s1"] == pytest.approx(numbers["class_real"], abs=0.03)
      assert numbers[f"{kind}_both_k{k}_s1"] == numbers[f"{kind}_class_kept_k{k}_s1"]
      assert numbers[f"{kind}_rest_kept_k{k}_s1"] > 0.95
      # Without guidance to words the image is left as it is.
      assert numbers[f"{kind}_followed_k{k}_s0"] == numbers[f"{kind}_both_k{k}_s0"] == 0
      assert numbers[f"{kind}_class_kept_k{k}_s0"] == numbers["class_real"]
  assert report.pictures["edits"].shape[0] > 12 * 64  # images, as they are, and five words of two kinds


def test_edits_that_forget_the_image():
  def forget(variables, batch, rng, **options):
    return paint(variables, {**batch, "vectors": batch["vectors"][::-1]}, rng)

  numbers = run(
    "digit_edits", make_context(PREDICT | {"generate": forget}), num_tokens=(4,), text_guidance=(1.0,)
  ).numbers
  assert numbers["background_followed_k4_s1"] == 1
  assert numbers["background_class_kept_k4_s1"] < 0.4 and numbers["background_rest_kept_k4_s1"] < 0.4


# A real model


def test_a_trained_vilex_is_measured():
  section = config.to_dict(config.load("vilex_digits.py:debug"))["vilex"]
  objective = objectives.build(section["objective"])
  rng = np.random.default_rng(0)
  pretrained = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype) / 4, objective.pretrained_shapes()
  )
  variables = jax.jit(objective.init)(jax.random.key(0), pretrained)
  context = make_context(objectives.compile_predict_fns(objective), objective)
  quick = dict(num_images=BATCH, num_pictures=2, num_tokens=(1, 8), sampling=dict(steps=1))
  drawn = [run("vilex", context, variables, seed=seed, **quick).numbers for seed in (0, 0, 1)]
  assert drawn[0] == drawn[1] != drawn[2]
  assert len({drawn[0][f"frechet_pixels_{way}"] for way in ("k1", "k8", "caption", "nothing")}) == 4
  calls = tiny.record_calls(context.predict)
  edited = run("digit_edits", context, variables, text_guidance=(3.0,), **quick)
  run("vilex", context, variables, **quick)
  called = set(calls)
  calls.clear()
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), next(iter(serve("eval"))))

  def call(name, batch, **options):
    return jax.eval_shape(
      functools.partial(context.predict[name], **options), variables, batch, jax.random.key(0)
    )

  for section in (dict(type="digit_edits", text_guidance=(3.0,)), dict(type="vilex")):
    evaluators.trace(evaluators.build("it", section | quick, context), call, shapes)
  assert calls == called
  assert np.isfinite(list(edited.numbers.values())).all() and "colour_both_k8_s3" in edited.numbers


# Parts


def test_feature_spaces():
  images = jnp.asarray(records("test")["image"])
  space = feature_spaces.open_space("glyphs", make_context())
  np.testing.assert_allclose(space(images), space(to_float(images)), atol=1e-6)
  np.testing.assert_allclose(space(images), space(1 - to_float(images)), atol=1e-3)  # whatever the colours
  pixels = feature_spaces.open_space("pixels", make_context())
  np.testing.assert_allclose(pixels(images), pixels(to_float(images)), atol=1e-6)


def test_glyphs_are_compared_with_statistics_of_glyphs_only(tmp_path):
  path = tmp_path / "pixels.npz"
  np.savez(path, mu=np.zeros(192), sigma=np.eye(192))
  section = dict(type="generation", features="glyphs", reference=str(path))
  context = make_context(objective=tiny.FakeObjective(image_shape=SHAPE))
  with pytest.raises(UserError, match="has statistics of 192 features, but glyphs has 64: give those of"):
    evaluators.build("it", section, context)


def test_pooled_features_of_photographs(repository):
  weights = repository.parent / "shared" / "weights" / "mobilenet_v2_1.0_224_u8.npz"
  if not weights.exists():
    pytest.skip(f"{weights} is not there")
  spec = f"mobilenet_v2:{weights}"
  features = np.asarray(
    feature_spaces.open_space(spec, make_context())(jnp.asarray(records("test")["image"][:2]))
  )
  assert features.shape == (2, 1280) and features.min() >= 0 and np.abs(features[0] - features[1]).max() > 0.1
  assert feature_spaces.name_of(spec) == "mobilenet_v2"


def test_classifiers_learn_from_the_first_images():
  seen = []

  def space(images):
    seen.append(len(images))
    return np.asarray(images).reshape(len(images), -1)

  model = classifiers.train("svc", make_context(), space, 100)
  assert sum(seen) < 100 + BATCH and model.shape_fit_[0] == 100


# Options


@pytest.mark.parametrize(
  ("section", "changes", "message"),
  [
    (dict(type="vilex"), dict(image_tokens=0), "does not turn images into words"),
    (dict(type="vilex", num_tokens=(5,)), {}, "num_tokens has 5: this model has 1 to 4"),
    (dict(type="vilex", num_images=1), {}, "give at least 2 and 1"),
    (dict(type="vilex", features="glyph"), {}, "did you mean 'glyphs'"),
    (
      dict(type="vilex", features="glyphs"),
      dict(class_names=("cat",)),
      "for data.source='captioned_digits'",
    ),
    (dict(type="vilex", features="mobilenet_v2"), {}, "needs weights: write it as"),
    (dict(type="vilex", features="mobilenet_v2:/none.npz"), {}, "/none.npz"),
    (dict(type="vilex", classifier="svm"), {}, "did you mean 'svc'"),
    (dict(type="vilex", classifier="svc"), dict(class_names=None), "no labels for the classifier"),
    (dict(type="vilex", sampling=dict(sampler="euler")), {}, "sampler 'euler' does not exist"),
    (dict(type="vilex", sampling=dict(temperature=1.0)), {}, "sampling has no option 'temperature'"),
    (dict(type="vilex", sampling=3), {}, "sampling is 3: give options by name"),
    (dict(type="digit_edits"), dict(captions=None), "remove this evaluation"),
    (dict(type="digit_edits"), dict(class_names=("cat",)), "remove this evaluation"),
    (dict(type="digit_edits", text_guidance=()), {}, "give at least 1 of each"),
    (dict(type="digit_edits", text_guidance=(-1.0,)), {}, "text_guidance is -1.0"),
    (dict(type="digit_edits", sampling=dict(text_guidance=1.0)), {}, "give all its values as text_guidance"),
    (dict(type="digit_edits", num_tokens=(0,)), {}, "num_tokens has 0"),
    (dict(type="digit_edits", prompts=("{} *",)), {}, "give a prompt for each kind"),
    (dict(type="digit_edits", prompts=dict(color="a * {}")), {}, "did you mean 'colour'"),
    (dict(type="digit_edits", prompts=dict(colour="a red {}")), {}, r"give a text with one \{\} and one \*"),
    (dict(type="digit_edits", prompts=dict(colour="{} dog *")), {}, "out-of-vocabulary word 'dog'"),
    (
      dict(type="digit_edits", prompts=dict(place="a a a a a a a {} *")),
      {},
      "10 words fit next to 4 tokens",
    ),
  ],
)
def test_wrong_options(section, changes, message):
  with pytest.raises(UserError, match=message) as error:
    evaluators.build("it", section, make_context(**changes))
  assert "config.evals.it" in str(error.value) and "\n" not in str(error.value)
