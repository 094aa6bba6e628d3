"""CropMAE: the reference's numbers from its weights, and what holds of any autoencoder of two views.

tests/golden/cropmae.npz holds random weights of alexandre-eymael/CropMAE's network, with MLPs of 20 in its
decoder in place of 2,048, and what its code computed from them in float64.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskgen import objectives, tree
from maskgen.data import ops
from maskgen.data.cpu_tf import tf
from maskgen.errors import UserError
from maskgen.importers import mae as mae_importer
from maskgen.models import mae
from maskgen.models.patches import patchify

GOLDEN = pathlib.Path(__file__).parent / "golden" / "cropmae.npz"
ENCODER = dict(
  image_size=(16, 16), patch=4, width=16, depth=1, heads=2, pooling="class", fixed_positions=True
)
SECTION = dict(
  name="two_view",
  encoder=ENCODER,
  decoder_width=16,
  decoder_depth=1,
  decoder_heads=2,
  decoder_hidden=8,
  mask_ratio=0.85,
)


def decoder_to_reference(params) -> dict[str, jax.Array]:
  """The decoder's parameters by the reference's names, in PyTorch's layout."""
  flat = tree.flatten(params)
  found = {"mask_token": flat.pop("mask_token")[None]}
  layers = {"input": "decoder_embed", "norm": "decoder_norm", "head": "decoder_pred"}
  parts = {"self_norm": "norm1", "cross_norm": "norm2", "mlp_norm": "norm3", "mlp/up": "linear1"}
  parts |= {"mlp/down": "linear2", "self_attention/out": "self_attn.out_proj"}
  parts |= {"cross_attention/out": "multihead_attn.out_proj"}
  attentions = {"self_attention": "self_attn", "cross_attention": "multihead_attn"}
  leaves = {"kernel": "weight", "scale": "weight", "bias": "bias"}
  for path, value in flat.items():
    layer, _, leaf = path.rpartition("/")
    value = value.T if leaf == "kernel" else value
    block, _, part = layer.partition("/")
    if layer in layers:
      found[f"{layers[layer]}.{leaves[leaf]}"] = value
    elif part in parts:
      found[f"decoder_blocks.{block.removeprefix('block_')}.{parts[part]}.{leaves[leaf]}"] = value
    elif part.endswith("/query"):
      start = f"{block}/{part.removesuffix('query')}"
      joined = jnp.concatenate([flat[f"{start}{name}/{leaf}"].T for name in ("query", "key", "value")])
      name = attentions[part.removesuffix("/query")]
      found[f"decoder_blocks.{block.removeprefix('block_')}.{name}.in_proj_{leaves[leaf]}"] = joined
  return found


def to_reference(params, objective):
  encoder = mae_importer.to_reference(params["encoder"], objective.encoder)
  return encoder | decoder_to_reference(params["decoder"])


def test_loss_and_gradients_are_those_of_the_reference():
  with np.load(GOLDEN) as archive:
    golden = dict(archive)
  plain = dict(activation="gelu", mean=(0.0,) * 3, std=(1.0,) * 3)  # its images are standardised
  sizes = dict(decoder_width=24, decoder_depth=2, decoder_heads=4, decoder_hidden=20)
  objective = objectives.build(SECTION | sizes | dict(encoder=ENCODER | plain))
  shapes = jax.eval_shape(objective.init, jax.random.key(0), {})["params"]["main"]
  names = jax.eval_shape(lambda params: to_reference(params, objective), shapes)
  rename = jax.linear_transpose(lambda params: to_reference(params, objective), shapes)
  (main,) = rename({name: jnp.asarray(golden[f"weights/{name}"]) for name in names})
  images = golden["images_pair_nchw"].transpose(0, 1, 3, 4, 2)
  mask = golden["mask"].astype(bool)
  kept = np.stack([np.flatnonzero(~row) for row in mask]).astype(np.int32)
  assert kept.shape == objective.mask(jax.random.split(jax.random.key(0), 3))[1].shape

  @jax.jit
  def compute(params):
    def loss(params):
      return objective.errors({"main": params}, images, mask, kept).mean()

    return jax.value_and_grad(loss)(params), objective.predict({"main": params}, images, kept)

  (loss, grads), predicted = compute(main)
  np.testing.assert_allclose(predicted, golden["pred"], atol=1e-5)
  np.testing.assert_allclose(loss, golden["loss"], rtol=1e-6)
  back = to_reference(grads, objective)
  numbers = zip(*(golden[f"grad_{kind}"] for kind in ("names", "norm", "dotcos")), strict=True)
  for name, norm, dotcos in numbers:
    found = np.asarray(back.pop(str(name)), np.float64).ravel()
    assert abs(np.linalg.norm(found) - norm) <= 1e-5 * norm + 1e-8, name
    assert abs(found @ np.cos(0.37 * np.arange(found.size) + 0.1) - dotcos) <= 1e-5 * norm + 1e-8, name
  assert not back


# One block, in NumPy


def normalise(x):
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def attend(params, x, others, heads=2):
  def project(name, y):
    y = y @ params[name]["kernel"] + params[name]["bias"]
    return y.reshape(len(y), heads, -1).transpose(1, 0, 2)

  query, key, value = (project(*pair) for pair in (("query", x), ("key", others), ("value", others)))
  scores = query @ key.transpose(0, 2, 1) / np.sqrt(query.shape[-1])
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  y = (weights @ value).transpose(1, 0, 2).reshape(x.shape)
  return y @ params["out"]["kernel"] + params["out"]["bias"]


def reference_block(params, x, others, order):
  for part in order:
    y = normalise(x)
    if part == "cross":
      x = x + attend(params["cross_attention"], y, normalise(others))
    elif part == "self":
      x = x + attend(params["self_attention"], y, y)
    else:
      up, down = params["mlp"]["up"], params["mlp"]["down"]
      y = np.asarray(jax.nn.gelu(y @ up["kernel"] + up["bias"], approximate=False))
      x = x + y @ down["kernel"] + down["bias"]
  return x


def test_a_block_of_croco():
  order = ("self", "cross", "mlp")
  block = mae.CrossBlock(2, 8, order, False, 0.5, 1e-6, "float32", "auto", train=False)
  rng = np.random.default_rng(0)
  x, others = (rng.normal(size=(1, n, 8)).astype(np.float32) for n in (5, 3))
  shapes = jax.eval_shape(block.init, jax.random.key(0), x, others)["params"]

  def draw(path, leaf):  # norms have scale 1 and bias 0
    norm = "norm" in tree.path_name(path)
    value = rng.normal(size=leaf.shape) / 3
    return np.float32(1.0 * tree.path_name(path).endswith("scale") if norm else value) + np.zeros(leaf.shape)

  params = jax.tree_util.tree_map_with_path(draw, shapes)
  found = jax.jit(block.apply)({"params": params}, x, others)
  np.testing.assert_allclose(found[0], reference_block(params, x[0], others[0], order), atol=1e-5)


def test_what_is_predicted_comes_from_both_views():
  objective = objectives.build(SECTION | {"normalize_targets": False})
  variables = jax.jit(objective.init)(jax.random.key(0), {})
  images = jax.random.uniform(jax.random.key(1), (2, 2, 16, 16, 3))
  mask, kept = objective.mask(jax.random.split(jax.random.key(2), 2))
  predict = jax.jit(objective.predict)
  predicted = predict(variables["params"], images, kept)
  pixels = jnp.repeat(jnp.repeat(mask.reshape(2, 4, 4), 4, 1), 4, 2)[..., None]
  hidden = images.at[:, 1].set(jnp.where(pixels, 1.0 - images[:, 1], images[:, 1]))
  np.testing.assert_array_equal(predict(variables["params"], hidden, kept), predicted)
  for changed in (images.at[:, 0].multiply(0.5), images.at[:, 1].multiply(0.5)):
    assert (predict(variables["params"], changed, kept) != predicted).any()
  target = patchify(2 * images[:, 1] - 1, 4).reshape(2, 16, -1)
  np.testing.assert_allclose(objective.targets(images)[0], target, atol=1e-6)
  dropped = predict(variables["params"], images, kept, jax.random.key(3))
  assert (dropped != predicted).any()
  # A picture alone is decoded beside itself.
  batch = {"image": images[:, 0]}
  both = {"image": images[:, 0], "image2": images[:, 0]}
  np.testing.assert_array_equal(objective.images(batch), objective.images(both))
  # Pictures show `image` above its reconstruction.
  reconstruct = jax.jit(objective.predict_fns()["reconstruct"])
  made = [reconstruct(variables, batch | more, jax.random.key(4)) for more in ({}, {"image2": images[:, 1]})]
  np.testing.assert_array_equal(*made)
  seen = (made[0] == images[:, 0]).all(axis=-1) | (jnp.abs(made[0] - images[:, 0]).max(axis=-1) < 1e-5)
  assert seen.mean() >= 1 / 8  # visible patches, 2 of 16, are shown as they are


def test_a_second_crop_lies_within_the_first():
  rows, columns = np.mgrid[:40, :50].astype(np.uint8)
  image = tf.constant(np.stack([rows, columns, 0 * rows], axis=-1))
  flips = 0
  for number in range(20):
    made = ops.second_crop(image, 8, (0.3, 0.6), "nearest", seed=tf.constant([0, number], tf.int64))
    np.testing.assert_array_equal(made["image"], image)
    view = made["image2"].numpy().astype(int)
    assert view.shape == (8, 8, 3) and np.ptp(view[..., 2]) == 0
    flipped = view[0, 0, 1] > view[0, -1, 1]
    flips += flipped
    steps = np.diff(view[:, :: -1 if flipped else 1], axis=1)[..., 1]
    area = np.ptp(view[..., 0]) * np.ptp(view[..., 1]) / (40 * 50)
    assert (steps > 0).all() and 0.15 < area < 0.6
  assert 4 <= flips <= 16
  with pytest.raises(ValueError, match="flip is 2"):
    ops.second_crop(image, 8, flip=2, seed=tf.constant([0, 0], tf.int64))


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (dict(decoder_order=("cross", "self")), "give cross, mlp, self in any order"),
    (dict(decoder_dropout=1.5), "decoder_dropout"),
    (dict(mask_ratio=0.99), "masks 16 of 16 patches"),
    (dict(encoder=ENCODER | dict(attention="cudnn", dtype="bfloat16")), "dropout 0, not bfloat16 and 0.1"),
  ],
)
def test_wrong_settings(change, words):
  with pytest.raises(UserError, match=words):
    objectives.build(SECTION | change)
