"""Evaluations of emoji, on models with known answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskgen import config as config_lib
from maskgen import evaluators
from maskgen.data import emoji
from maskgen.errors import UserError
from maskgen.evaluators import emoji_edits, feature_spaces
from maskgen.evaluators.emoji import in_other_tone, wanted_pictures, with_other_base
from maskgen.evaluators.emoji_judge import distances_to_real, judge
from maskgen.images import to_float
from maskgen.models.vilex import ImageWordsSampling
from maskgen.numerics.text import Captions

KNOWN = emoji.load()
CAPTIONS = Captions(text_tokenizer=f"list:{' '.join(KNOWN.words)}", length=24)
BATCH, TOKENS = 16, 8
DRAWING = feature_spaces.open_space("drawing", None)


def words(text):
  return " ".join(CAPTIONS.opened.decode(CAPTIONS.read([text])[0]).split())


BY_WORDS = {words(name): i for i, name in enumerate(KNOWN.names)}
BY_PIXELS = {picture.tobytes(): i for i, picture in enumerate(KNOWN.images)}


def serve(split):
  rows = KNOWN.split("test" if split == "eval" else split)[:BATCH]
  yield {
    "image": jnp.asarray(KNOWN.images[rows]),
    "caption": jnp.asarray(CAPTIONS.read([KNOWN.names[i] for i in rows])),
    "valid": jnp.ones(BATCH, bool),
  }


def make_context(predict, captions=CAPTIONS, classes=KNOWN.classes):
  objective = tiny.FakeObjective(captions=captions, tokens=TOKENS, sampling=ImageWordsSampling())
  return evaluators.Context(objective, dict(predict), serve, lambda seed, frozen: None, classes)


def run(kind, context, **options):
  evaluator = evaluators.build("it", {"type": kind, "every_steps": 1, **options}, context)
  return evaluator.run(None, jax.random.key(0))


def draw(change=lambda i: i):
  """A model that draws a function of what the caption names."""

  def generate(variables, batch, rng, **options):
    said = [BY_WORDS[words(CAPTIONS.opened.decode(ids))] for ids in np.asarray(batch["caption"])]
    return to_float(jnp.asarray(KNOWN.images[[change(i) for i in said]]))

  return generate


def blur(variables, batch, rng):
  images = to_float(batch["image"])
  return jax.image.resize(
    jax.image.resize(images, (len(images), 12, 12, 3), "linear"), images.shape, "linear"
  )


# The judge


def test_real_pictures_are_recognised():
  for group, wanted in wanted_pictures(1000).items():
    assert len(wanted) == {"tone": 301, "form": 72, "seen": 301}[group]
    for hits in judge(distances_to_real(DRAWING, KNOWN.images[wanted]), wanted).values():
      assert hits.all()


def test_the_groups_are_what_they_say():
  groups = wanted_pictures(1000)
  assert {KNOWN.held_out[i] for i in groups["seen"]} == {""}
  for group in ("tone", "form"):
    assert {KNOWN.held_out[i] for i in groups[group]} == {group}
  for i in groups["tone"]:
    other = with_other_base(i)
    assert KNOWN.tones[other] == KNOWN.tones[i] and KNOWN.bases[other] != KNOWN.bases[i]
    other = in_other_tone(i)
    assert KNOWN.bases[other] == KNOWN.bases[i] and KNOWN.tones[other] not in ("", KNOWN.tones[i])
  assert len(wanted_pictures(10)["tone"]) == 10


def test_noisy_pictures_are_recognised():
  wanted = wanted_pictures(40)["tone"]
  noise = np.random.default_rng(0).normal(0, 0.1, KNOWN.images[wanted].shape)
  noisy = np.clip(KNOWN.images[wanted] / 255 + noise, 0, 1).astype(np.float32)
  assert all(hits.all() for hits in judge(distances_to_real(DRAWING, noisy), wanted).values())


# Pictures from words


def test_a_model_that_draws_what_it_is_told():
  report = run("emoji", make_context({"generate": draw()}), num_images=24, num_pictures=6)
  numbers = dict(report.numbers)
  for start in ("", "form_", "seen_"):
    for kind in ("base", "tone", "exact"):
      assert numbers[f"{start}{kind}_top1"] == 1 and numbers[f"{start}{kind}_top1_floor"] < 0.05
    assert numbers[f"{start}distance"] < 1e-6
  assert numbers["distance_train"] > 0.03 and numbers["seen_distance_train"] < 1e-6
  assert not [name for name in numbers if "reconstructed" in name]
  assert report.pictures["emoji"].dtype == np.uint8
  table = report.tables["emoji"]
  assert sum(row["pictures"] for row in table) == 48 and all(row["exact_top1"] == 1 for row in table)


@pytest.mark.parametrize(("change", "right"), [(in_other_tone, "base"), (with_other_base, "tone")])
def test_a_model_that_ignores_a_part_of_the_name(change, right):
  numbers = run("emoji", make_context({"generate": draw(change)}), num_images=24, num_pictures=6).numbers
  wrong = {"base": "tone", "tone": "base"}[right]
  assert numbers[f"{wrong}_top1"] == numbers["exact_top1"] == 0 and numbers["distance"] > 0.03
  assert numbers[f"{wrong}_top1_floor"] == 1
  assert numbers[f"{right}_top1"] == 1


def test_reconstructions_and_other_spaces():
  context = make_context({"reconstruct": blur}, captions=None)
  numbers = run("emoji", context, num_images=20, num_pictures=6, spaces=("drawing", "pixels")).numbers
  assert numbers["exact_top1_reconstructed"] < numbers["base_top1_reconstructed"]
  assert "base_top1_pixels_reconstructed" in numbers and "form_distance_train_reconstructed" in numbers
  assert not [name for name in numbers if "floor" in name]


@pytest.mark.parametrize(
  ("options", "changes", "message"),
  [
    ({}, dict(classes=("a",)), "it needs data.source='emoji'"),
    ({}, dict(captions=None), "neither reconstructs images nor takes captions"),
    (dict(num_images=0), {}, "num_images is 0"),
    (dict(spaces=("drawings",)), {}, "did you mean 'drawing'"),
    (dict(sampling=dict(sampler="x")), {}, "sampler 'x'"),
  ],
)
def test_what_cannot_be_evaluated(options, changes, message):
  with pytest.raises(UserError, match=message):
    run("emoji", make_context({"generate": draw()}, **changes), **options)


# Edits


def encode(variables, batch, rng):
  """The number of the picture in each of its tokens."""
  numbers = [BY_PIXELS[picture.tobytes()] for picture in np.asarray(batch["image"])]
  return jnp.broadcast_to(jnp.asarray(numbers, jnp.float32)[:, None, None], (len(numbers), TOKENS, 4))


PROMPTS = {"tone": "{} with * skin", "form": "a * {}", "role": "{} *"}
TARGETS = {
  (edit.source, words(PROMPTS[kind].format("").replace("*", edit.word))): edit.target
  for kind in PROMPTS
  for edit in emoji_edits.edits(kind)
}


def edit(variables, batch, rng, **options):
  """The right picture, if there are words and guidance to them; without tokens, the one that is named."""
  made = []
  for vectors, tokens, pieces, number in zip(
    *(np.asarray(batch[key]) for key in ("vectors", "number", "words", "num_words")), strict=True
  ):
    said = " ".join(CAPTIONS.opened.decode(ids[:n]) for ids, n in zip(pieces, number, strict=True)).strip()
    source = int(vectors[0, 0, 0])
    if not tokens[0]:
      made.append(BY_WORDS[said])
    else:
      made.append(TARGETS[source, said] if said and options["text_guidance"] else source)
  return to_float(jnp.asarray(KNOWN.images[made]))


def test_edits_have_targets_that_were_never_trained_on():
  for kind, number in (("tone", 301), ("form", 60), ("role", 130)):
    found = emoji_edits.edits(kind)
    assert len(found) == number
    for source, target, _ in found:
      assert not KNOWN.held_out[source] and KNOWN.held_out[target]
  source, target, word = next(e for e in emoji_edits.edits("role") if "judge" in KNOWN.names[e.target])
  assert word == "judge" and KNOWN.tones[source] == KNOWN.tones[target]


def test_edits_that_follow_image_and_words():
  predict = {"encode": encode, "generate": edit}
  options = dict(num_tokens=(4, 8), text_guidance=(0.0, 2.0), num_images=20, num_pictures=4)
  report = run("emoji_edits", make_context(predict), **options)
  for start in ("", "form_", "role_"):
    for kind in ("edit_followed", "edit_identity", "edit_exact_top1"):
      found = functools.partial("{}{}_{}_s{}".format, start, kind)
      assert report.numbers[found("k8", 2)] == report.numbers[found("words", 2)] == 1
      alone = report.numbers[found("image", 2)]
      assert alone == report.numbers[found("k4", 0)] == (kind == "edit_identity")
  assert report.pictures["edits"].shape[2] == 3


@pytest.mark.parametrize(
  ("options", "changes", "message"),
  [
    ({}, dict(classes=("a",)), "it needs data.source='emoji'"),
    ({}, dict(captions=None), "takes no captions"),
    (dict(num_tokens=(9,)), {}, "num_tokens has 9"),
    (dict(prompts=dict(tones="{} *")), {}, "did you mean 'tone'"),
    (dict(prompts=dict(tone="{} dark")), {}, "one {} and one *"),
    (dict(prompts=dict(role="{} " + "a " * 12 + "*")), {}, "words fit next to 8 tokens"),
    (dict(text_guidance=()), {}, "text_guidance"),
  ],
)
def test_edits_that_cannot_be_evaluated(options, changes, message):
  with pytest.raises(UserError, match=message):
    run("emoji_edits", make_context({"encode": encode, "generate": edit}, **changes), **options)


# Both trace what they call


@pytest.mark.parametrize("kind", ["emoji", "emoji_edits"])
def test_calls_are_those_of_the_trace(kind):
  predict = {"encode": encode, "generate": edit} if kind == "emoji_edits" else {}
  predict = predict or {"generate": draw(), "reconstruct": blur}
  context = make_context(predict)
  calls = tiny.record_calls(context.predict)
  options = dict(num_images=4, num_pictures=2) | ({"text_guidance": (2.0,)} if "edits" in kind else {})
  run(kind, context, **options)
  called = set(calls)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), next(iter(serve("eval"))))
  traced = set()

  def call(name, batch, **given):
    shape = tuple(sorted((key, tuple(leaf.shape), str(leaf.dtype)) for key, leaf in batch.items()))
    traced.add((name, shape, tuple(sorted(given.items()))))
    return jax.ShapeDtypeStruct((BATCH, TOKENS, 4), jnp.float32)

  evaluators.trace(evaluators.build("it", {"type": kind, **options}, context), call, shapes)
  assert traced == called


def test_the_config_evaluates_tokenizer_and_words():
  config = config_lib.to_dict(config_lib.load("configs/emoji.py"))
  for stage in ("tokenizer", "mage_text"):
    assert "emoji" in {section["type"] for section in config[stage]["evals"].values()}
