"""DMJD: the reference's numbers from its weights, its masks, and gradients by hand.

tests/golden/dmjd.npz and dmjd_random.npz hold random weights of mx-mark/DMJD's decoder and head, the output
of its encoder, which has convolutions, and what its code computed from them in float64; the former with masks
of blocks.
"""

import jax
import numpy as np
import pytest
from heirs_reference import assert_gradients, from_reference, read

from maskgen import objectives, tree
from maskgen.errors import UserError
from maskgen.importers import mae, mage
from maskgen.numerics import hog, masking

ENCODER = dict(image_size=(64, 64), patch=16, width=32, depth=1, heads=4)
SECTION = dict(
  name="dmjd", encoder=ENCODER, decoder_width=24, decoder_depth=2, decoder_heads=4, decoder_hidden=48
)
HEAD = {"layer_0": "proj_embed.0", "norm_0": "proj_embed.1", "layer_1": "proj_embed.3"}
HEAD |= {"norm_1": "proj_embed.4", "layer_2": "proj_embed.6", "out": "predictor.0"}


def to_reference(params, depth: int) -> dict[str, jax.Array]:
  """The parameters of decoder and head by the reference's names."""
  flat = tree.flatten(params["decoder"])
  token = {"mask_token": flat.pop("mask_token")[None]}
  blocks = {f"decoder/block_{i}": f"decoder_blocks.{i}" for i in range(depth)}
  decoder = mage.rename_blocks(flat, mae.DECODER_LAYERS, blocks)
  return token | decoder | mage.rename_blocks(tree.flatten(params["head"]), HEAD, {})


@pytest.mark.parametrize(
  ("name", "changes"),
  [("dmjd", {}), ("dmjd_random", dict(mask_ratio=0.75, block=1, decoder_depth=1))],
)
def test_loss_and_gradients_are_those_of_the_reference(name, changes):
  golden = read(name)
  objective = objectives.build(SECTION | dict(shuffle_visible=True) | changes)
  images = golden["images_u8_nhwc"]
  target, _, _ = jax.jit(objective.targets)(images / np.float32(255.0))
  np.testing.assert_allclose(target, golden["target"], atol=2e-5)
  target = np.tile(golden["target"], (2, 1, 1))
  kept, mask = golden["ids_keep"].astype(np.int32), golden["mask"].astype(bool)
  order = np.argsort(kept)[..., None]
  latents = np.take_along_axis(golden["latent"], order, axis=1)
  shapes = jax.eval_shape(objective.init, jax.random.key(0), {})["params"]["main"]
  shapes = {part: shapes[part] for part in ("decoder", "head")}
  params = from_reference(golden, shapes, lambda params: to_reference(params, objective.decoder_depth))

  @jax.jit
  def compute(params, latents):
    def loss(params, latents):
      return objective.compare({"main": params}, latents, target, mask, kept).mean()

    value, (grads, back) = jax.value_and_grad(loss, (0, 1))(params, latents)
    aligned = objectives.build(SECTION | changes).compare({"main": params}, latents, target, mask, kept)
    return value, to_reference(grads, objective.decoder_depth), back, aligned.mean()

  value, grads, back, aligned = compute(params, latents)
  np.testing.assert_allclose(value, golden["loss"], rtol=1e-6)
  assert not assert_gradients(golden, grads)
  expected = np.take_along_axis(golden["grad_wrt_latent"], order, axis=1)
  np.testing.assert_allclose(back, expected, atol=1e-5 * np.abs(expected).max())
  parts = golden["loss_masked"] + golden["loss_visible_if_order_were_aligned"]
  np.testing.assert_allclose(aligned, parts, rtol=1e-6)


def test_what_is_in_front_of_the_patches_is_not_predicted():
  objective = objectives.build(SECTION | dict(encoder=ENCODER | dict(pooling="class", registers=2)))
  params = jax.eval_shape(objective.init, jax.random.key(0), {})["params"]

  def errors(params, images):
    return objective.errors(params, images, *objective.mask(jax.random.split(jax.random.key(0), 3)))

  images = jax.ShapeDtypeStruct((3, 64, 64, 3), "float32")
  assert jax.eval_shape(errors, params, images).shape == (3,)


def test_views_are_disjoint_and_blocks_whole():
  keys = jax.random.split(jax.random.key(0), 50)
  ratio = masking.MaskRatio(mean=0.6, low=0.6, high=0.6)
  draw = jax.jit(masking.disjoint_masks, static_argnums=(1, 2, 3))
  mask, kept = (np.asarray(x) for x in draw(keys, (4, 6), ratio, 2))
  assert mask.shape == (50, 2, 24) and kept.shape == (50, 2, 8)  # 2 of 6 squares are visible
  np.testing.assert_array_equal(np.take_along_axis(mask, kept, axis=2), False)
  assert (mask.sum(axis=2) == 16).all() and mask.any(axis=1).all()
  squares = mask.reshape(50, 2, 2, 2, 3, 2)
  np.testing.assert_array_equal(squares.all(axis=(3, 5)), squares.any(axis=(3, 5)))
  np.testing.assert_allclose(mask.mean(axis=(0, 1)), 2 / 3, atol=0.2)
  low = masking.MaskRatio(mean=0.25, low=0.25, high=0.25)
  mask, _ = draw(keys, (4, 4), low)
  assert (np.asarray(~mask).all(axis=1).sum(axis=1) == 8).all()  # of 12 visible ones


def test_orientations_of_ramps():
  rows, columns = np.mgrid[:8.0, :8.0]
  images = np.stack([columns, rows, columns - 2 * rows, -3 * columns])[..., None]
  found = np.asarray(jax.jit(hog.histograms, static_argnums=1)(images, 4))
  assert found.shape == (4, 2, 2, 1, 9)
  # 0, 90, 180 - 63.4 and 180 degrees; 12 of 16 pixels of a cell at a corner are not on one of its two sides.
  for i, (bin_of, size) in enumerate([(0, 2 * 12), (4, 2 * 12), (5, np.hypot(2, 4) * 9), (0, 6 * 12)]):
    cell = found[i, 0, 0, 0]
    assert cell.argmax() == bin_of
    assert cell[bin_of] == pytest.approx(size / 16, rel=1e-5)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (dict(cells=3), "cells is 3: a patch has 16 pixels"),
    (dict(block=3), "block is 3: there are 4 x 4 patches"),
    (dict(mask_ratio=0.8), "masks 4 of 4 blocks"),
    (dict(encoder=ENCODER | dict(pooling="attention")), "a head that no loss trains"),
  ],
)
def test_wrong_settings(change, words):
  with pytest.raises(UserError, match=words):
    objectives.build(SECTION | change)
