"""Rotary positions: what they depend on, and that they follow the patches that an encoder sees.

tests/test_towers.py compares them with transformers' DINOv3.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskgen import objectives
from maskgen.errors import UserError
from maskgen.models.vit import ViT
from maskgen.numerics import rotary

FIELDS = dict(image_size=(12, 16), patch=4, width=16, depth=2, heads=2, pooling="class", registers=2)
MODEL = ViT(**FIELDS, rotary_base=100.0, qkv_bias="qv")
GRID, BATCH = MODEL.grid, 2


def random(shapes):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.5).astype(np.float32), shapes)


def test_scores_depend_on_the_offset_of_two_patches():
  by = jnp.asarray(rotary.waves(GRID, 8, 100.0, leading=1))[None]
  rng = np.random.default_rng(1)
  query, key = (np.float32(rng.normal(size=(1, 1, 1, 8))).repeat(by.shape[1], axis=1) for _ in range(2))
  rotated = rotary.rotate(jnp.asarray(query), by)[0, :, 0], rotary.rotate(jnp.asarray(key), by)[0, :, 0]
  np.testing.assert_array_equal(rotated[0][0], query[0, 0, 0])  # in front: as it is
  scores = np.asarray(rotated[0] @ rotated[1].T)[1:, 1:].reshape(*GRID, *GRID)
  np.testing.assert_allclose(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1], atol=1e-5)
  assert np.abs(scores[0, 0] - scores[0, 0, 0, 0]).max() > 0.1


def test_the_box_has_the_shape_of_the_picture():
  """The middle row of any odd number of rows is at 0, and corners of large grids are at the ends."""
  waves = rotary.waves((3, 1), 4, 100.0)
  np.testing.assert_allclose(waves[:, 0, 0], np.cos(2 * np.pi * np.array([-2 / 3, 0, 2 / 3])), atol=1e-6)
  np.testing.assert_allclose(waves[:, 0, 1], 1.0)
  wide = rotary.waves((1, 1000), 8, 100.0)
  np.testing.assert_allclose(wide[-1, 1], np.sin(2 * np.pi * 0.999 * np.array([0, 0, 1, 0.1])), atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_positions_follow_the_patches_that_are_kept(scan):
  images = np.random.default_rng(2).random((BATCH, *MODEL.image_size, 3), np.float32)
  params = random(jax.eval_shape(MODEL.init, jax.random.key(0), images)["params"])
  assert not {"position", "bias"} & {*params, *params["encoder"]["block_0"]["attention"]["key"]}
  order = np.stack([np.random.default_rng(i).permutation(MODEL.num_patches) for i in range(BATCH)])
  model = MODEL.clone(scan=scan, remat="full" if scan else "none")

  @jax.jit
  def encode(kept):
    return model.apply({"params": params}, images, kept, method="encode_kept")

  whole, shuffled = np.asarray(encode(None)), np.asarray(encode(order.astype(np.int32)))
  first = MODEL.leading + MODEL.registers
  expected = np.take_along_axis(whole[:, first:], order[..., None], axis=1)
  np.testing.assert_allclose(shuffled[:, first:], expected, atol=1e-4)
  np.testing.assert_allclose(shuffled[:, :first], whole[:, :first], atol=1e-4)


def test_it_teaches_and_learns():
  """The network as teacher and as student, in an objective that reads its blocks and its attention."""
  fields = FIELDS | dict(rotary_base=100.0, qkv_bias="qv")
  section = dict(name="mask_align", encoder=fields, teacher=dict(name="vit", **fields), blocks=2)
  objective = objectives.build(section)
  assert objective.image_encoder.encoder.looks
  shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())
  batch = dict(
    image=np.zeros((BATCH, *MODEL.image_size, 3), np.uint8), key=jax.random.split(jax.random.key(1), 2)
  )

  inputs = shapes["params"], shapes["frozen"], {}, batch, jax.random.key(2), jnp.int32(0)
  losses, _, _ = jax.eval_shape(functools.partial(objective.losses, train=True), *inputs)
  assert losses["main"].shape == ()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(rotary_base=100.0, fixed_positions=True), "rotary_base is 100.0 and fixed_positions is True"),
    (dict(rotary_base=100.0, heads=8), "a width of 16 in 8 heads is no multiple of 4 each"),
    (dict(rotary_base=-1.0), "rotary_base is -1"),
    (dict(qkv_bias="vv"), "qkv_bias is 'vv': give some letters of 'qkv'"),
  ],
)
def test_wrong_fields(fields, message):
  with pytest.raises(UserError, match=message):
    ViT(**FIELDS | fields)
