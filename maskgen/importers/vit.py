"""Vision transformers of transformers: those of its ViT, and the encoders of its ViTMAE."""

import functools
from typing import Any

from etils import epath

from maskgen import tree
from maskgen.importers import Converted, siglip, tensors, timm, towers, vqgan_pytorch, written_towers
from maskgen.models.imagenet import MEAN, STD
from maskgen.models.vit import ViT

PREFIXES = ("vit.",)
LAYERS = {"patch_embedding": "embeddings.patch_embeddings.projection", "encoder_norm": "layernorm"}
TOKENS = {"position": "embeddings.position_embeddings", "class_token": "embeddings.cls_token"}
BLOCK = {
  "attention_norm": "layernorm_before",
  "attention/query": "attention.attention.query",
  "attention/key": "attention.attention.key",
  "attention/value": "attention.attention.value",
  "attention/out": "attention.output.dense",
  "mlp_norm": "layernorm_after",
  "mlp/up": "intermediate.dense",
  "mlp/down": "output.dense",
}


def convert(path: epath.PathLike, encoder_heads: int | None = None) -> Converted:
  """Converts an image encoder, or that of a whole model.

  Args:
    path: of a folder of transformers, or of its file of tensors alone.
    encoder_heads: the number of heads, by default that of config.json or the published models.

  Raises:
    UserError: if the tensors are those of another network, see `towers.take` and `towers.settle`.
  """
  stored = towers.read(path, PREFIXES)
  found, need = stored.tensors, functools.partial(tensors.need, stored.path, stored.tensors)
  width, _, patch, _ = need("embeddings.patch_embeddings.projection.weight", 4).shape
  table, size = need("embeddings.position_embeddings", 3)[0], stored.config.get("image_size")
  if not isinstance(size, list):
    size = towers.side_of(stored.path, len(table) - 1, patch)
  section: dict[str, Any] = dict(
    image_size=tuple(size),
    patch=patch,
    width=width,
    depth=tensors.count(found, r"encoder\.layer\.(\d+)\."),
    hidden=need("encoder.layer.0.intermediate.dense.weight", 2).shape[0],
    pooling="class",
    activation="gelu",
    epsilon=1e-12,
    fixed_positions=towers.is_fixed(table, (size[0] // patch, size[1] // patch)),
  )
  if stored.config.get("model_type") == "vit_mae":
    section |= dict(mean=MEAN, std=STD)
  section = towers.settle(stored, section, encoder_heads, timm.HEADS)
  used = ("embeddings.cls_token", "embeddings.patch_embeddings.", "encoder.", "layernorm.")
  ignored = ("embeddings.mask_token", TOKENS["position"], "pooler.", "classifier.", "decoder.")
  model, params, unused = towers.take(stored, section, to_transformers, used, ignored)
  return towers.export(model, section, params, unused)


def to_transformers(params: Any, model: ViT) -> dict[str, Any]:
  """Renames our parameters to transformers' names, without prefix, and PyTorch's layout.

  Fixed positions are not among them.
  """
  flat, layers = tree.flatten(params), dict(LAYERS)
  found = {name: flat.pop(ours)[None] for ours, name in TOKENS.items() if ours in flat}
  for i in range(model.depth):
    layers |= {f"encoder/block_{i}/{ours}": f"encoder.layer.{i}.{name}" for ours, name in BLOCK.items()}
  return found | vqgan_pytorch.to_torch(flat, layers)


def write(path: epath.PathLike, model: ViT, params: Any) -> tensors.Tensors:
  """Writes an image encoder as a folder for `from_pretrained` of transformers.

  With a class position it is a `ViTModel` there, and else a `SiglipVisionModel`.

  Returns:
    The tensors, float32.

  Raises:
    UserError: if neither would compute the same.
  """
  if not model.leading:
    return siglip.write(path, model, params)
  fixed = dict(registers=0, layer_scale=False, embedding_norm=False, patch_bias=True)
  written_towers.check_expressible(model, "ViTModel of transformers", fixed)
  named = to_transformers(params, model)
  if model.fixed_positions:
    named[TOKENS["position"]] = towers.fixed_table(model.grid, model.width)[None]
  return written_towers.write(path, model, named, ("ViTModel", "vit", "ViTImageProcessor"))
