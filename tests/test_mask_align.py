"""MaskAlign: the reference's numbers from its weights, and what a ViT teaches.

tests/golden/mask_align.npz holds random weights of OpenDriveLab/maskalign's network, outputs of a teacher,
and what its code computed from them in float64.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heirs_reference import assert_gradients, from_reference, read

from maskgen import objectives
from maskgen.errors import UserError
from maskgen.importers import mae
from maskgen.models.image_encoder import States, VitEncoder
from maskgen.models.transformer import Mlp
from maskgen.models.vit import ViT, block_states, class_attention
from maskgen.numerics import masking

ENCODER = dict(
  image_size=(32, 32), patch=8, width=32, depth=6, heads=4, pooling="class", fixed_positions=True
)
TEACHER = dict(name="vit", image_size=(32, 32), patch=8, width=20, depth=6, heads=2, pooling="class")
SECTION = dict(name="mask_align", encoder=ENCODER, teacher=TEACHER)


def to_reference(params, objective) -> dict[str, jax.Array]:
  """Parameters by the reference's names; it has a head and a mixture for each block of the teacher."""
  heads, first = dict(params["heads"]), objective.encoder.depth - objective.blocks
  found = mae.to_reference(params["encoder"], objective.encoder)
  found["distill_weights"] = jnp.pad(heads.pop("mixing"), ((first, 0), (0, 0)))
  for name, head in heads.items():
    number = first + int(name.removeprefix("head_"))
    found[f"distill_heads.{number}.weight"] = head["kernel"].T
    found[f"distill_heads.{number}.bias"] = head["bias"]
  return found


def test_loss_and_gradients_are_those_of_the_reference():
  golden = read("mask_align")
  plain = dict(activation="gelu", mean=(0.0,) * 3, std=(1.0,) * 3)  # its images are standardised
  objective = objectives.build(SECTION | dict(encoder=ENCODER | plain))
  shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())
  params = from_reference(golden, shapes["params"]["main"], lambda params: to_reference(params, objective))
  batch = {"image": golden["images_nchw"].transpose(0, 2, 3, 1)}
  kept, outputs = np.sort(golden["ids_keep"]).astype(np.int32), golden["teacher_hidden_states"][1:]

  @jax.jit
  def compute(params):
    def loss(params):
      return objective.errors({"main": params}, batch, outputs, kept).mean()

    value, grads = jax.value_and_grad(loss)(params)
    return value, to_reference(grads, objective)

  value, grads = compute(params)
  np.testing.assert_allclose(value, golden["loss"], rtol=1e-6)
  assert assert_gradients(golden, grads) == {"distill_heads.0.weight", "distill_heads.0.bias"}  # of no loss
  keys = jax.random.split(jax.random.key(0), 3)
  assert objective.choose(keys, States(outputs, golden["teacher_attention"])).shape == kept.shape


def test_what_a_vit_teaches():
  network = ViT((16, 16), 8, width=8, depth=2, heads=1, pooling="class", registers=1)
  encoder, norm = VitEncoder(network.clone(hidden=32)), nn.LayerNorm(epsilon=1e-6)
  shapes = jax.eval_shape(encoder.init, jax.random.key(0))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: np.float32(0.5 * rng.normal(size=leaf.shape)), shapes)
  batch = {"image": rng.uniform(size=(2, 16, 16, 3)).astype(np.float32)}

  @jax.jit
  def compute(params, batch):
    block = params["encoder"]["block_1"]
    states = block_states(network, params, batch["image"])
    y = norm.apply({"params": block["attention_norm"]}, states[1])
    value = nn.Dense(8).apply({"params": block["attention"]["value"]}, y)
    weights = class_attention(network.clone(registers=0), params, states)  # the register counts as a patch
    weights = jnp.concatenate([1.0 - weights.sum(axis=1, keepdims=True), weights], axis=1)
    seen = jnp.einsum("bk,bkc->bc", weights, value)
    x = states[1][:, 0] + nn.Dense(8).apply({"params": block["attention"]["out"]}, seen)
    mlp = Mlp(32, activation="gelu_tanh")
    x += mlp.apply({"params": block["mlp"]}, norm.apply({"params": block["mlp_norm"]}, x), train=False)
    taught = encoder.states(params, {}, batch)
    last = norm.apply({"params": params["encoder_norm"]}, taught.outputs[-1])
    return taught, weights, (x, states[2][:, 0]), (last[:, 1:], encoder.encode(params, {}, batch))

  taught, weights, outputs, patches = compute(params, batch)
  assert taught.outputs.shape == (encoder.num_states, 2, 1 + 4, 8) and encoder.looks
  np.testing.assert_allclose(weights[:, 2:], taught.attention, rtol=1e-5)
  # The output at the class position follows from the attention, of which patches do not get all.
  for found, expected in (outputs, patches):
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_patches_are_kept_in_proportion_to_their_weights():
  weights = jnp.tile(jnp.array([[0.4, 0.3, 0.2, 0.1]]), (8000, 1))
  keys = jax.random.split(jax.random.key(0), len(weights))
  choose = jax.jit(masking.weighted_mask, static_argnums=2)
  mask, kept = choose(keys, weights, 3)
  np.testing.assert_allclose(1 - mask.mean(axis=0), weights[0], atol=0.02)
  np.testing.assert_array_equal(~np.take_along_axis(np.asarray(mask), np.asarray(kept), 1), True)
  mask, kept = choose(keys, weights, 2)
  assert (np.diff(kept, axis=1) > 0).all() and (mask.sum(axis=1) == 2).all()
  # The first is kept first, or second after one of the others.
  second = sum(p * 0.4 / (1 - p) for p in (0.3, 0.2, 0.1))
  np.testing.assert_allclose(1 - mask[:, 0].mean(), 0.4 + second, atol=0.02)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (dict(teacher=TEACHER | dict(patch=16)), "the teacher has 2 x 2 patches and the encoder 4 x 4 patches"),
    (dict(teacher=TEACHER | dict(pooling="mean")), "set by_attention=False"),
    (dict(teacher=TEACHER | dict(depth=3)), "blocks=5, the teacher has 3, the encoder 6"),
    (dict(teacher=dict(name="tokenizer", image_size=(32, 32))), "no image encoder"),
    (dict(mask_ratio=0.99), "masks all 16 patches"),
    (dict(encoder=ENCODER | dict(pooling="attention")), "a head that no loss trains"),
  ],
)
def test_wrong_settings(change, words):
  with pytest.raises(UserError, match=words):
    objectives.build(SECTION | change)
