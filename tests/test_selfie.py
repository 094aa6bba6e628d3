"""Selfie: the right patch for each masked position, by the paper's equations in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskgen import objectives
from maskgen.errors import UserError

ENCODER = dict(
  image_size=(16, 16), patch=4, width=16, depth=1, heads=2, pooling="class", fixed_positions=True
)
SECTION = dict(
  name="selfie", encoder=ENCODER, decoder_width=8, decoder_depth=1, decoder_heads=2, mask_ratio=0.3
)


def build(**changes):
  """Objective, random parameters, images, and what of them is masked."""
  objective = objectives.build(SECTION | changes)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(objective.init, jax.random.key(0), {})["params"]
  params = jax.tree.map(lambda leaf: np.float32(0.5 * rng.normal(size=leaf.shape)), shapes)
  images = rng.uniform(size=(2, 16, 16, 3)).astype(np.float32)
  return objective, params, images, objective.mask(jax.random.split(jax.random.key(1), 2))


def keys_of(main, objective, images):
  """Keys of all patches [b, n, d], one layer after the other."""
  squares = (images.reshape(2, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(2, 16, -1) - 0.5) / 0.5
  embedding, keys = main["encoder"]["patch_embedding"], main["keys"]
  x = squares @ embedding["kernel"].reshape(-1, 16) + embedding["bias"]
  for i in range(3):
    x = x @ keys[f"layer_{i}"]["kernel"] + keys[f"layer_{i}"]["bias"]
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + objective.encoder.epsilon)
    if i < 2:
      x = jax.nn.gelu(x * keys[f"norm_{i}"]["scale"] + keys[f"norm_{i}"]["bias"], approximate=False)
  return x @ keys["out"]["kernel"] + keys["out"]["bias"]


@pytest.mark.parametrize("pooled", [False, True])
def test_loss_and_gradients_are_those_of_the_equations(pooled):
  objective, params, images, (mask, kept) = build(pooled=pooled)
  masked = [np.flatnonzero(row) for row in np.asarray(mask)]
  assert [len(row) for row in masked] == [5, 5]

  def expected(params):
    main = params["main"]
    latents = objective.encoder.apply({"params": main["encoder"]}, images, kept, method="encode_kept")
    if not pooled:
      predicted = objective.decoder.apply({"params": main["decoder"]}, latents, kept)
    keys, total = keys_of(main, objective, images), 0.0
    for b, row in enumerate(masked):
      for j in row:
        query = latents[b, 0] + main["rows"][j // 4] + main["columns"][j % 4] if pooled else predicted[b, j]
        scores = jnp.stack([query @ keys[b, i] for i in row]) / 4.0
        total += jnp.log(jnp.exp(scores - keys[b, j] @ query / 4.0).sum())
    return total / 10

  def loss(params):
    return objective.scores(params, images, mask, kept)["loss"].mean()

  found = jax.jit(jax.value_and_grad(loss))(params)
  with jax.numpy_rank_promotion("allow"):
    right = jax.jit(jax.value_and_grad(expected))(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, right)
  assert found[0] > 0.1


def test_what_is_visible_does_not_change_the_best_arrangement_of_pooled_queries():
  """It adds the same number to all scores of a patch, of which every arrangement has one."""
  objective, params, images, (mask, kept) = build(pooled=True)
  row = np.flatnonzero(np.asarray(mask)[0])
  changed = images.copy()
  visible = np.repeat(np.repeat(~np.asarray(mask).reshape(2, 4, 4), 4, 1), 4, 2)
  changed[visible] = 1.0 - changed[visible]
  logits = [np.asarray(objective.compare(params, one, mask, kept)[0][0]) for one in (images, changed)]
  assert np.abs(logits[0] - logits[1]).max() > 0.01
  np.testing.assert_allclose(*(one - one.mean(axis=0, keepdims=True) for one in logits), atol=1e-4)
  places = range(len(row))
  best = [max(itertools.permutations(places), key=lambda p: sum(one[places, p])) for one in logits]
  assert best[0] == best[1]


def test_chosen_patches_are_shown_in_their_places():
  objective, params, images, _ = build()
  fns = objective.predict_fns()
  shown = np.asarray(fns["reconstruct"]({"params": params}, {"image": images}, jax.random.key(3)))
  found = fns["loss"]({"params": params}, {"image": images}, jax.random.key(3))
  mask, kept = objective.mask(jax.random.split(jax.random.key(3), 2))
  chosen = objective.compare(params, images, mask, kept)[0].argmax(axis=-1)

  def squares(images):
    return np.asarray(images).reshape(2, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(2, 16, -1)

  expected = squares(images).copy()
  for b, row in enumerate(np.asarray(mask)):
    (places,) = np.nonzero(row)
    expected[b, places] = squares(images)[b, places[np.asarray(chosen[b])]]
    assert found["accuracy"][b] == pytest.approx((np.asarray(chosen[b]) == np.arange(5)).mean())
  np.testing.assert_allclose(squares(shown), expected, atol=1e-6)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (dict(mask_ratio=0.05), "masks one patch"),
    (dict(pooled=True, encoder=ENCODER | dict(pooling="mean")), "pooled queries need a class position"),
    (dict(normalize_targets=True), "no key 'normalize_targets'"),
  ],
)
def test_wrong_settings(change, words):
  with pytest.raises(UserError, match=words):
    objectives.build(SECTION | change)
