"""DINOv3's vision transformers (Siméoni et al. 2025), from transformers or facebookresearch/dinov3.

Their rotary positions are no parameters, so that a network takes images of any height and width that its
patches divide.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from maskgen import tree
from maskgen.errors import UserError
from maskgen.importers import Converted, tensors, towers, vqgan_pytorch
from maskgen.models.imagenet import MEAN, STD
from maskgen.models.transformer import QKV, SWIGLU
from maskgen.models.vit import ViT

# Head counts of the published models S, B, L, H+ and 7B by width.
HEADS = {384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32}
BASE, SIDE, PREFIXES = 100.0, 224, ("model.",)
# The published preparation: nothing is cropped.
PREPARATION = towers.FloatPreparation((SIDE, SIDE), None, "bilinear")
PROJECTIONS = ("query", "key", "value")


class Layout(NamedTuple):
  """The names of a project.

  Attributes:
    tokens: of parameters outside layers.
    layers: of layers outside blocks.
    blocks: of the list of blocks.
    block: of the layers of a block.
    gated: of those of its MLP, if that has a gate.
    scales: of the scales of a block's branches.
    ignored: beginnings of the names of what only training uses.
  """

  tokens: Mapping[str, str]
  layers: Mapping[str, str]
  blocks: str
  block: Mapping[str, str]
  gated: Mapping[str, str]
  scales: Mapping[str, str]
  ignored: tuple[str, ...]


TRANSFORMERS = Layout(
  tokens={"class_token": "embeddings.cls_token", "register_tokens": "embeddings.register_tokens"},
  layers={"patch_embedding": "embeddings.patch_embeddings", "encoder_norm": "norm"},
  blocks="layer",
  block={
    "attention_norm": "norm1",
    "attention/query": "attention.q_proj",
    "attention/key": "attention.k_proj",
    "attention/value": "attention.v_proj",
    "attention/out": "attention.o_proj",
    "mlp_norm": "norm2",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
  },
  gated={"mlp/gate": "mlp.gate_proj", "mlp/up": "mlp.up_proj", "mlp/down": "mlp.down_proj"},
  scales={"attention_scale": "layer_scale1.lambda1", "mlp_scale": "layer_scale2.lambda1"},
  ignored=("embeddings.mask_token",),
)
# Its queries, keys and values are one projection.
REFERENCE = Layout(
  tokens={"class_token": "cls_token", "register_tokens": "storage_tokens"},
  layers={"patch_embedding": "patch_embed.proj", "encoder_norm": "norm"},
  blocks="blocks",
  block={
    "attention_norm": "norm1",
    "attention/qkv": "attn.qkv",
    "attention/out": "attn.proj",
    "mlp_norm": "norm2",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
  },
  gated={"mlp/gate": "mlp.w1", "mlp/up": "mlp.w2", "mlp/down": "mlp.w3"},
  scales={"attention_scale": "ls1.gamma", "mlp_scale": "ls2.gamma"},
  ignored=("mask_token", "local_cls_norm."),
)


def convert(
  path: epath.PathLike, encoder_heads: int | None = None, image_size: int | tuple[int, int] | None = None
) -> Converted:
  """Converts an image encoder.

  Args:
    path: of a folder or file of transformers, or a file of facebookresearch/dinov3.
    encoder_heads: the number of heads, by default that of config.json or the published models.
    image_size: the side or (height, width) of images, by default that of config.json, or 224.

  Raises:
    UserError: if the tensors are those of another network, see `towers.take` and `towers.settle`.
  """
  _, section, model, params, unused = _open(path, encoder_heads, image_size)
  return towers.export(model, section, params, unused)


def load(path: epath.PathLike) -> towers.Tower:
  """Loads the feature network, whose features are the outputs at the class position.

  Raises:
    UserError: as `convert`, or if preprocessor_config.json asks for something that is not supported.
  """
  stored, _, model, params, _ = _open(path, None, None)
  return towers.prepare(stored, model, params, PREPARATION)


def rename(params: Any, model: ViT, layout: Layout = TRANSFORMERS) -> dict[str, Any]:
  """Renames our parameters to the names of `layout`, and PyTorch's layout of arrays."""
  flat, layers = tree.flatten(params), dict(layout.layers)
  found = {name: flat.pop(ours)[None] for ours, name in layout.tokens.items() if ours in flat}
  block = {**layout.block, **(layout.gated if model.activation == SWIGLU else {})}
  for i in range(model.depth):
    ours, theirs = f"encoder/block_{i}", f"{layout.blocks}.{i}"
    layers |= {f"{ours}/{name}": f"{theirs}.{other}" for name, other in block.items()}
    found |= {f"{theirs}.{other}": flat.pop(f"{ours}/{name}") for name, other in layout.scales.items()}
    if "attention/qkv" in block:
      flat |= _join(flat, f"{ours}/attention", model)
  return found | vqgan_pytorch.to_torch(flat, layers)


def _join(flat: dict[str, Any], attention: str, model: ViT) -> dict[str, Any]:
  """Takes queries, keys and values, whose biases are zero if they have none, as one projection."""
  kernels = [flat.pop(f"{attention}/{name}/kernel") for name in PROJECTIONS]
  found = {f"{attention}/qkv/kernel": jnp.concatenate(kernels, axis=1)}
  if model.qkv_bias:
    zeros = jnp.zeros(model.width)
    biases = [flat.pop(f"{attention}/{name}/bias", zeros) for name in PROJECTIONS]
    found[f"{attention}/qkv/bias"] = jnp.concatenate(biases)
  return found


def _open(
  path: epath.PathLike, heads: int | None, size: int | tuple[int, int] | None
) -> tuple[towers.Stored, dict[str, Any], ViT, Any, tuple[str, ...]]:
  stored = towers.read(path, PREFIXES)
  stored = stored._replace(tensors=_without_buffers(stored))
  layout = REFERENCE if "cls_token" in stored.tensors else TRANSFORMERS
  found, need = stored.tensors, functools.partial(tensors.need, path, stored.tensors)
  width, _, patch, _ = need(f"{layout.layers['patch_embedding']}.weight", 4).shape
  first = f"{layout.blocks}.0"
  gated = f"{first}.{layout.gated['mlp/gate']}.weight" in found
  if gated and stored.config.get("hidden_act", "silu") != "silu":
    raise UserError(f"{path} has gates of {stored.config['hidden_act']}: this network has those of silu")
  up = (layout.gated if gated else layout.block)["mlp/up"]
  size = size or stored.config.get("image_size", SIDE)
  section: dict[str, Any] = dict(
    image_size=towers.square(size if isinstance(size, int) else tuple(size)),
    patch=patch,
    width=width,
    depth=tensors.count(found, rf"{layout.blocks}\.(\d+)\."),
    hidden=need(f"{first}.{up}.weight", 2).shape[0],
    pooling="class",
    rotary_base=float(stored.config.get("rope_theta", BASE)),
    activation=SWIGLU if gated else "gelu",
    epsilon=1e-5,
    layer_scale=True,
    qkv_bias=_biases(found, first),
    mean=MEAN,
    std=STD,
  )
  if (registers := layout.tokens["register_tokens"]) in found:
    section["registers"] = need(registers, 3).shape[1]
  section = towers.settle(stored, section, heads, HEADS)
  used = (*layout.tokens.values(), *layout.layers.values(), f"{layout.blocks}.", "embeddings.", "cls_norm.")
  renamed = functools.partial(rename, layout=layout)
  return stored, section, *towers.take(stored, section, renamed, used, layout.ignored)


def _biases(found: tensors.Tensors, block: str) -> str:
  """`ViT.qkv_bias`; joined projections have none of keys if those of all blocks are zero."""
  joined = [value for name, value in found.items() if name.endswith(".attn.qkv.bias")]
  if joined:
    of_keys = (bias[len(bias) // 3 : 2 * len(bias) // 3] for bias in joined)
    return QKV if any(bias.any() for bias in of_keys) else "qv"
  return "".join(letter for letter in QKV if f"{block}.attention.{letter}_proj.bias" in found)


def _without_buffers(stored: towers.Stored) -> tensors.Tensors:
  """The tensors, without the reference's periods of positions and its masks of biases, which are applied.

  Without registers, there is an empty tensor of them, which is not among the result.

  Raises:
    UserError: if the periods are others.
  """
  masks = {f"{name}_mask" for name in stored.tensors} & stored.tensors.keys()
  found = {name: value for name, value in stored.tensors.items() if value.size and name not in masks}
  periods = found.pop("rope_embed.periods", None)
  if periods is not None:
    expected = BASE ** (np.arange(len(periods)) / len(periods))
    if not np.allclose(periods, expected, rtol=1e-2):
      raise UserError(
        f"{stored.path} has rope_embed.periods of a base that is not {BASE:g}: give a published file"
      )
  for mask in masks:
    bias = mask.removesuffix("_mask")
    found[bias] = np.where(stored.tensors[mask] == 0, np.float32(0), found[bias])
  return found
