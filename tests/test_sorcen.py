"""Sorcen: the reference's numbers from its weights, its echoes, and its teacher."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heirs_reference import assert_gradients, from_reference, read, to_reference

from maskgen import config, objectives
from maskgen.errors import UserError
from maskgen.models.mage import Prediction
from maskgen.numerics import losses, masking
from maskgen.training import optim

NETWORK = dict(
  channels=8, multipliers=(1, 1), strides=(4,), blocks=1, norm_groups=2, codebook_size=1024, code_width=4
)
# The sizes and options of the golden file.
SECTION = dict(
  name="sorcen",
  image_size=(32, 32),
  tokenizer=NETWORK,
  class_ids=1000,
  null_class=76,
  width=32,
  depth=2,
  heads=4,
  decoder_width=24,
  decoder_depth=1,
  decoder_heads=4,
  projection_hidden=40,
  projection_width=16,
  predictor_hidden=24,
  share_embedding=True,
)
HEADS = {
  f"{ours}{layer}": f"{theirs}.projector.{number}"
  for ours, theirs in (("projection", "projector"), ("predictor", "predictor"))
  for layer, number in (("/up", 0), ("", 1), ("/down", 3))
}
TEACHER = {"blocks.": "blocks_momentum.", "projector.": "momentum_projector."}


def theirs_of_teacher(name: str) -> str:
  return next((name.replace(own, other, 1) for own, other in TEACHER.items() if name.startswith(own)), name)


def test_loss_and_gradients_are_those_of_the_reference():
  golden, objective = read("sorcen"), objectives.build(SECTION)
  rename = functools.partial(to_reference, depths={"encoder": 2, "decoder": 1}, layers=HEADS)
  shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())["params"]["main"]
  student = from_reference(golden, shapes, rename)
  before = golden | {
    f"weights/{name}": golden[f"weights/{theirs_of_teacher(name)}"]
    for name in (key.removeprefix("weights/") for key in golden if key.startswith("weights/"))
    if f"weights/{theirs_of_teacher(name)}" in golden
  }
  beta = float(golden["ema_beta"])
  teacher = jax.tree.map(
    lambda old, new: beta * old + (1 - beta) * new, from_reference(before, shapes, rename), student
  )
  tokens = golden["vq_idx"].astype(np.int32)
  kept = np.sort(golden["noise"].argsort(axis=1)[:, 32:], axis=1).astype(np.int32)
  mask = golden["all_mask"][:, 1:].astype(bool)
  at = np.arange(8)
  rows, columns = (
    (at >= golden[name][:, None]) & (at < golden[name][:, None] + 5) for name in ("crop_row", "crop_col")
  )
  window = (rows[:, :, None] & columns[:, None]).reshape(4, 64)

  def loss(params, average):
    params, frozen = {"main": params}, {"average": {"main": average}}
    latents = objective.latents(params, {}, tokens, mask, kept)
    logits = objective.logits(params, {}, {}, latents, mask, kept)
    found = Prediction(tokens, mask, kept, latents, logits)
    target = objective.teach(params, frozen, golden["echo_ids"].astype(np.int32), window)
    parts = (
      objective.scores(params, {}, {}, found)["loss"].mean(),
      objective.uniformity_weight * losses.uniformity(latents.mean(axis=1)),
      objective.contrastive_weight * objective.contrast(params, latents, target)[0].mean(),
    )
    return sum(parts), (*parts, target)

  compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  (total, (*parts, target)), (gradients, to_teacher) = compute(student, teacher)
  names = ("", "_reconstruction_only", "_uniformity", "_contrastive_weighted")
  np.testing.assert_allclose([total, *parts], [golden[f"loss{name}"] for name in names], rtol=1e-5)
  np.testing.assert_allclose(target, golden["teacher_projection"], atol=1e-5)
  # In their code, the teacher's head is also trained: of the gradients to a teacher, only its own count here.
  found = rename(gradients) | {
    theirs_of_teacher(name): value
    for name, value in rename(to_teacher).items()
    if name.startswith("projector.")
  }
  left = assert_gradients(golden, found)
  unread = {str(name) for name in golden["grad_names"][~golden["grad_reached"]]}
  biases = {f"{head}.projector.0.bias" for head in ("projector", "momentum_projector", "predictor")}
  assert left == unread | biases  # a bias in front of a batch normalisation has no effect


def predictions(objective, b=64):
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(b, objective.num_tokens, objective.codebook_size)), jnp.float32)
  return Prediction(logits.argmax(axis=-1), None, None, None, logits)


def test_echoes_are_likely_codes_but_not_the_likeliest():
  objective = objectives.build(SECTION | dict(tokenizer=NETWORK | dict(codebook_size=40), echo_choices=3))
  found, keys = predictions(objective), jax.random.split(jax.random.key(1), 64)
  echo = jax.jit(lambda keys, logits: objective.echo(keys, found._replace(logits=logits)))
  codes, _ = echo(keys, found.logits)
  ranks = (found.logits > jnp.take_along_axis(found.logits, codes[..., None], axis=-1)).sum(axis=-1)
  assert set(np.unique(ranks)) == {1, 2, 3}
  np.testing.assert_array_equal(echo(keys[5:6], found.logits[5:6])[0][0], codes[5])


@pytest.mark.parametrize("grid", [(8, 8), (4, 6)])
def test_windows_are_rectangles_of_every_size_and_place(grid):
  draw = jax.jit(masking.random_window, static_argnums=(1, 2))
  windows = np.asarray(draw(jax.random.split(jax.random.key(0), 800), grid, 0.5))
  windows = windows.reshape(-1, *grid)
  rows, columns = windows.any(axis=2), windows.any(axis=1)
  np.testing.assert_array_equal(windows, rows[:, :, None] & columns[:, None])
  sizes = {tuple(pair) for pair in np.stack([rows.sum(axis=1), columns.sum(axis=1)], axis=1)}
  height, width = grid
  assert sizes == {(side, -(-side * width // height)) for side in range(height // 2, height + 1)}
  assert windows.any(axis=0).all() and not windows.all(axis=0).any()
  starts = set(zip(rows.argmax(axis=1), columns.argmax(axis=1), strict=True))
  assert max(starts)[0] == height // 2 and (0, 0) in starts


def test_info_nce_and_uniformity_are_their_definitions():
  rng = np.random.default_rng(0)
  anchors, positives = rng.normal(size=(2, 6, 5)).astype(np.float32) * 3.0
  loss, nearest = losses.info_nce(anchors, positives, positives, 0.3)
  unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (anchors, positives)]
  cosines = unit[0] @ unit[1].T
  p = np.exp(cosines / 0.3) / np.exp(cosines / 0.3).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(loss, -np.log(np.diag(p)), rtol=1e-5)
  np.testing.assert_array_equal(nearest, cosines.argmax(axis=1) == np.arange(6))
  np.testing.assert_allclose(losses.uniformity(anchors), np.square(unit[0] @ unit[0].T).mean(), rtol=1e-5)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (dict(echo_choices=1024), "without the likeliest, 1023 codes remain"),
    (dict(echo_window=0.0), "echo_window is 0.0"),
    (dict(temperature=0.0), "temperature is 0"),
  ],
)
def test_wrong_settings(change, words):
  with pytest.raises(UserError, match=words):
    objectives.build(SECTION | change)


def test_the_decay_of_the_moving_average_is_that_of_the_reference():
  """In its epoch 100 of 1,600."""
  decay = optim.average_decay((0.996, 1.0), 1600)
  np.testing.assert_allclose(decay(100), read("sorcen")["ema_beta"], rtol=1e-7)
  assert decay(0) == pytest.approx(0.996) and decay(1600) == pytest.approx(1.0)
  assert optim.average_decay(0.9, 10)(5) == pytest.approx(0.9)


def test_a_teacher_needs_its_moving_average():
  with pytest.raises(UserError, match=r"config\.ema\.main is missing: a moving average teaches"):
    optim.check_groups(("main",), ("main",), (), objectives.build(SECTION).averages)
  with pytest.raises(UserError, match="two decays that rise"):
    config.RunConfig(objective={}, data={}, optimizer={}, batch_size=1, ema={"main": (0.9, 0.5)})
