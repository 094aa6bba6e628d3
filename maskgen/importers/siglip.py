"""SigLIP's image encoder, from safetensors of transformers or an npz file of big_vision.

The text encoder and the head that pools patches to one vector are dropped.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath

from maskgen import tree
from maskgen.errors import UserError
from maskgen.importers import Converted, tensors, vqgan_pytorch
from maskgen.models.vit import ViT

# Head counts of the published models by width, which safetensors files do not contain.
HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}
PREFIX, TREE = "vision_model.", "params/img/"
LAYERS = {"patch_embedding": "embeddings.patch_embedding", "encoder_norm": "post_layernorm"}
BLOCK = {
  "attention_norm": "layer_norm1",
  "attention/query": "self_attn.q_proj",
  "attention/key": "self_attn.k_proj",
  "attention/value": "self_attn.v_proj",
  "attention/out": "self_attn.out_proj",
  "mlp_norm": "layer_norm2",
  "mlp/up": "mlp.fc1",
  "mlp/down": "mlp.fc2",
}
BIG_VISION_LAYERS = {"patch_embedding": "embedding", "encoder_norm": "Transformer/encoder_norm"}
BIG_VISION_BLOCK = {
  "attention_norm": "LayerNorm_0",
  "attention/query": "MultiHeadDotProductAttention_0/query",
  "attention/key": "MultiHeadDotProductAttention_0/key",
  "attention/value": "MultiHeadDotProductAttention_0/value",
  "attention/out": "MultiHeadDotProductAttention_0/out",
  "mlp_norm": "LayerNorm_1",
  "mlp/up": "MlpBlock_0/Dense_0",
  "mlp/down": "MlpBlock_0/Dense_1",
}


def convert(path: epath.PathLike, encoder_heads: int | None = None) -> Converted:
  """Converts an image encoder, or that of a whole model; all sizes except the head count are inferred.

  Raises:
    UserError: if the file is of another kind (see `tensors.read`, `read_npz` and `take`), or the head count
      is unknown or does not divide the width.
  """
  is_npz = str(path).endswith(".npz")
  found = _read_big_vision(path) if is_npz else _read_safetensors(path)
  section = (_infer_big_vision if is_npz else _infer)(path, found, encoder_heads)
  model = ViT(**section)
  rename = functools.partial(to_big_vision if is_npz else to_transformers, model=model)
  image = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  params = tensors.take(path, found, rename, shapes)
  unused = tuple(sorted(found.keys() - jax.eval_shape(rename, params).keys()))
  vqgan_pytorch.refuse_left_over(path, unused, ("encoder.", "embeddings.", "Transformer/", "embedding/"))
  return Converted({"network": "vit", "vit": section}, {"params": {"main": params}}, unknown=unused)


def to_transformers(params: Any, model: ViT) -> dict[str, Any]:
  """Renames our parameters to transformers' names, without prefix, and PyTorch's layout."""
  layers = dict(LAYERS)
  for i in range(model.depth):
    layers |= {f"encoder/block_{i}/{ours}": f"encoder.layers.{i}.{name}" for ours, name in BLOCK.items()}
  flat = tree.flatten(params)
  position = flat.pop("position")
  return {"embeddings.position_embedding.weight": position, **vqgan_pytorch.to_torch(flat, layers)}


def to_big_vision(params: Any, model: ViT) -> dict[str, Any]:
  """Renames our parameters to big_vision's names below `params/img/`, with an axis for heads."""
  layers = dict(BIG_VISION_LAYERS)
  for i in range(model.depth):
    block = f"Transformer/encoderblock_{i}"
    layers |= {f"encoder/block_{i}/{ours}": f"{block}/{name}" for ours, name in BIG_VISION_BLOCK.items()}
  flat = tree.flatten(params)
  found = {"pos_embedding": flat.pop("position")[None]}
  for path, value in flat.items():
    layer, _, leaf = path.rpartition("/")
    if layer.endswith("attention/out") and leaf == "kernel":
      value = value.reshape(model.heads, -1, model.width)
    elif layer.endswith(("/query", "/key", "/value")):
      value = value.reshape(*value.shape[:-1], model.heads, -1)
    found[f"{layers[layer]}/{leaf}"] = value
  return found


def _read_safetensors(path: epath.PathLike) -> tensors.Tensors:
  """The image encoder's tensors, without its head and the prefix in whole models."""
  found = tensors.read(path)
  if any(name.startswith(PREFIX) for name in found):
    found = {name.removeprefix(PREFIX): value for name, value in found.items() if name.startswith(PREFIX)}
  return {name: value for name, value in found.items() if not name.startswith("head.")}


def _read_big_vision(path: epath.PathLike) -> tensors.Tensors:
  """The image encoder's arrays without its head; stacked blocks of a scan are split."""
  found: tensors.Tensors = {}
  for name, value in tensors.read_npz(path).items():
    if not name.startswith(TREE) or name.startswith((f"{TREE}MAPHead_0/", f"{TREE}head/")):
      continue
    if value.dtype.kind == "V" and value.dtype.itemsize == 2:  # how numpy saves bfloat16
      value = value.view(ml_dtypes.bfloat16)
    name, value = name.removeprefix(TREE), value.astype(np.float32)
    if "/encoderblock/" in name:
      found |= {name.replace("encoderblock", f"encoderblock_{i}"): one for i, one in enumerate(value)}
    else:
      found[name] = value
  return found


def _infer(path: epath.PathLike, found: Mapping[str, np.ndarray], heads: int | None) -> dict[str, Any]:
  need = functools.partial(tensors.need, path, found)
  width, _, patch, _ = need("embeddings.patch_embedding.weight", 4).shape
  positions = need("embeddings.position_embedding.weight", 2).shape[0]
  hidden = need("encoder.layers.0.mlp.fc1.weight", 2).shape[0]
  depth = tensors.count(found, r"encoder\.layers\.(\d+)\.")
  return _section(path, patch, positions, width, depth, hidden, heads or HEADS.get(width, 0))


def _infer_big_vision(
  path: epath.PathLike, found: Mapping[str, np.ndarray], heads: int | None
) -> dict[str, Any]:
  need = functools.partial(tensors.need, path, found)
  patch, _, _, width = need("embedding/kernel", 4).shape
  positions = need("pos_embedding", 3).shape[1]
  block = "Transformer/encoderblock_0"
  hidden = need(f"{block}/MlpBlock_0/Dense_0/kernel", 2).shape[1]
  stored = need(f"{block}/MultiHeadDotProductAttention_0/query/kernel", 3).shape[1]
  if heads not in (None, stored):
    raise UserError(f"{path} has {stored} heads: remove --encoder_heads={heads}")
  depth = tensors.count(found, r"Transformer/encoderblock_(\d+)/")
  return _section(path, patch, positions, width, depth, hidden, stored)


def _section(
  path: epath.PathLike, patch: int, positions: int, width: int, depth: int, hidden: int, heads: int
) -> dict[str, Any]:
  """The fields of `ViT`."""
  if not heads:
    raise UserError(f"{path} has no head count, and none is known for width {width}: give --encoder_heads")
  if width % heads:
    raise UserError(f"--encoder_heads={heads} does not divide the width of {width}: give one that does")
  side = math.isqrt(positions)
  if side * side != positions:
    raise UserError(f"{path}: its {positions} positions do not form a square, as patches of images must")
  size = (side * patch, side * patch)
  return dict(image_size=size, patch=patch, width=width, depth=depth, heads=heads, hidden=hidden)
