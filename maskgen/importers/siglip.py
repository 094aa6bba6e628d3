"""SigLIP's image encoder, from and to folders of transformers and npz files of big_vision.

Reading drops the text encoder and, except from feature networks, the head that pools patches to one vector.
"""

import functools
import io
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from maskgen import files, tree
from maskgen.errors import UserError
from maskgen.importers import Converted, tensors, towers, vqgan_pytorch, written_towers
from maskgen.models.vit import ViT

# Head counts of the published models by width, which safetensors files do not contain.
HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}
PREFIXES, TREE = ("vision_model.",), "params/img/"
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
HEAD = {
  "attention/out": "attention.out_proj",
  "norm": "layernorm",
  "mlp/up": "mlp.fc1",
  "mlp/down": "mlp.fc2",
}
# The tensor that reads pixels, [d, c, h, w].
KERNEL = "embeddings.patch_embedding.weight"
BIG_VISION_LAYERS = {"patch_embedding": "embedding", "encoder_norm": "Transformer/encoder_norm"}
# Beginnings of the names of the encoder's tensors, and of others in whole models.
USED = ("embeddings.", "encoder.", "post_layernorm.")
IGNORED = ("embeddings.position_ids", "text_model.", "logit_scale", "logit_bias")
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
BIG_VISION_HEAD = {ours: name for ours, name in BIG_VISION_BLOCK.items() if "norm" not in ours}
BIG_VISION_HEAD |= {"norm": "LayerNorm_0"}
# Fields of `ViT` that SigLIP's networks share.
FIXED = ("pooling", "fixed_positions", "layer_scale", "embedding_norm", "patch_bias")
# And those that a folder states.
STATED = ("activation", "epsilon", "mean", "std")


def convert(path: epath.PathLike, encoder_heads: int | None = None) -> Converted:
  """Converts an image encoder, or that of a whole model.

  Args:
    path: of a folder or file of transformers, or an npz file of big_vision.
    encoder_heads: the number of heads, by default that of config.json or the published models.

  Raises:
    UserError: if the tensors are those of another network, see `towers.take` and `towers.settle`.
  """
  if str(path).endswith(".npz"):
    stored = towers.Stored(str(path), _read_big_vision(path), {}, {})
    section = _infer_big_vision(stored, encoder_heads)
    taken = towers.take(stored, section, to_big_vision, ("Transformer/", "embedding/"), ())
  else:
    stored = towers.read(path, PREFIXES)
    section = infer(stored, encoder_heads)
    taken = towers.take(stored, section, to_transformers, USED, ("head.", *IGNORED))
  return towers.export(taken[0], section, *taken[1:])


def load(path: epath.PathLike) -> towers.Tower:
  """Loads the feature network, whose features are those of the head.

  Raises:
    UserError: as `convert`, or if preprocessor_config.json asks for something that is not supported.
  """
  stored = towers.read(path, PREFIXES)
  model, params = with_head(stored)
  return towers.prepare(stored, model, params, towers.Preparation(model.image_size, None))


def with_head(stored: towers.Stored) -> tuple[ViT, Any]:
  """The network and its parameters, with the head if there is one."""
  section = infer(stored, None)
  if any(name.startswith("head.") for name in stored.tensors):
    section["pooling"] = "attention"
  model, params, _ = towers.take(stored, section, to_transformers, (*USED, "head."), IGNORED)
  return model, params


def write(path: epath.PathLike, model: ViT, params: Any) -> tensors.Tensors:
  """Writes an image encoder for other programs.

  Args:
    path: an npz file for big_vision, or a new folder for `SiglipVisionModel.from_pretrained` of transformers.
    model: the network; `pooling="mean"` is written without a head.
    params: its parameters.

  Returns:
    The tensors, float32, by the names in the file.

  Raises:
    UserError: if SigLIP's code would compute something else.
  """
  pooling = "attention" if model.pooling == "attention" else "mean"
  is_file = str(path).endswith(".npz")
  plain = ViT(pooling=pooling)
  fixed = (*FIXED, *STATED) if is_file else FIXED
  written_towers.check_expressible(model, "SigLIP", {name: getattr(plain, name) for name in fixed})
  if len(set(model.image_size)) > 1:
    raise UserError(
      f"SigLIP takes square images, not {model.image_size}: export with --format=maskgen instead"
    )
  if is_file:
    named = {f"{TREE}{name}": value for name, value in jax.device_get(to_big_vision(params, model)).items()}
    found = {name: np.ascontiguousarray(value, np.float32) for name, value in named.items()}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **found)
    files.replace(epath.Path(path), buffer.getvalue())
    return found
  named = {f"{PREFIXES[0]}{name}": value for name, value in to_transformers(params, model).items()}
  kind = ("SiglipVisionModel", "siglip_vision_model", "SiglipImageProcessor")
  return written_towers.write(path, model, named, kind, dict(vision_use_head=pooling == "attention"))


def to_transformers(params: Any, model: ViT) -> dict[str, Any]:
  """Renames our parameters to transformers' names, without prefix, and PyTorch's layout."""
  layers = dict(LAYERS)
  for i in range(model.depth):
    layers |= {f"encoder/block_{i}/{ours}": f"encoder.layers.{i}.{name}" for ours, name in BLOCK.items()}
  flat = tree.flatten(params)
  found = {"embeddings.position_embedding.weight": flat.pop("position")}
  if model.pooling == "attention":
    layers |= {f"attention_head/{ours}": f"head.{name}" for ours, name in HEAD.items()}
    found["head.probe"] = flat.pop("attention_head/probe")[None]
    joined = towers.join(flat, "attention_head/attention", ("query", "key", "value"))
    found["head.attention.in_proj_weight"] = joined["joined/kernel"].T
    found["head.attention.in_proj_bias"] = joined["joined/bias"]
  return found | vqgan_pytorch.to_torch(flat, layers)


def to_big_vision(params: Any, model: ViT) -> dict[str, Any]:
  """Renames our parameters to big_vision's names below `params/img/`, with an axis for heads."""
  layers = dict(BIG_VISION_LAYERS)
  for i in range(model.depth):
    block = f"Transformer/encoderblock_{i}"
    layers |= {f"encoder/block_{i}/{ours}": f"{block}/{name}" for ours, name in BIG_VISION_BLOCK.items()}
  flat = tree.flatten(params)
  found = {"pos_embedding": flat.pop("position")[None]}
  if model.pooling == "attention":
    layers |= {f"attention_head/{ours}": f"MAPHead_0/{name}" for ours, name in BIG_VISION_HEAD.items()}
    found["MAPHead_0/probe"] = flat.pop("attention_head/probe")[None]
  for path, value in flat.items():
    layer, _, leaf = path.rpartition("/")
    if layer.endswith("attention/out") and leaf == "kernel":
      value = value.reshape(model.heads, -1, model.width)
    elif layer.endswith(("/query", "/key", "/value")):
      value = value.reshape(*value.shape[:-1], model.heads, -1)
    found[f"{layers[layer]}/{leaf}"] = value
  return found


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


def infer(stored: towers.Stored, heads: int | None) -> dict[str, Any]:
  """The fields of `ViT` by transformers' names.

  Raises:
    UserError: as `convert`.
  """
  found, need = stored.tensors, functools.partial(tensors.need, stored.path, stored.tensors)
  if getattr(found.get(KERNEL), "ndim", 4) == 2:
    raise UserError(f"{stored.path} is a NaFlex variant of SigLIP 2: give --format=siglip2, or siglip2:PATH")
  width, _, patch, _ = need(KERNEL, 4).shape
  positions = need("embeddings.position_embedding.weight", 2).shape[0]
  hidden = need("encoder.layers.0.mlp.fc1.weight", 2).shape[0]
  depth = tensors.count(found, r"encoder\.layers\.(\d+)\.")
  return _section(stored, patch, positions, width, depth, hidden, heads)


def _infer_big_vision(stored: towers.Stored, heads: int | None) -> dict[str, Any]:
  found, need = stored.tensors, functools.partial(tensors.need, stored.path, stored.tensors)
  patch, _, _, width = need("embedding/kernel", 4).shape
  positions = need("pos_embedding", 3).shape[1]
  block = "Transformer/encoderblock_0"
  hidden = need(f"{block}/MlpBlock_0/Dense_0/kernel", 2).shape[1]
  own = need(f"{block}/MultiHeadDotProductAttention_0/query/kernel", 3).shape[1]
  if heads not in (None, own):
    raise UserError(f"{stored.path} has {own} heads: remove --encoder_heads={heads}")
  depth = tensors.count(found, r"Transformer/encoderblock_(\d+)/")
  return _section(stored, patch, positions, width, depth, hidden, own)


def _section(
  stored: towers.Stored, patch: int, positions: int, width: int, depth: int, hidden: int, heads: int | None
) -> dict[str, Any]:
  """The fields of `ViT`."""
  size = towers.side_of(stored.path, positions, patch)
  section = dict(image_size=size, patch=patch, width=width, depth=depth, hidden=hidden)
  return towers.settle(stored, section, heads, HEADS)
