"""CLIP's image encoders, vision transformers (Radford et al. 2021), from transformers.

The text encoder is dropped.
"""

import functools
from typing import Any

from etils import epath

from maskgen import tree
from maskgen.importers import Converted, siglip, tensors, towers, vqgan_pytorch
from maskgen.models.vit import ViT

# Head counts of the published models B, L, H and bigG by width.
HEADS = {768: 12, 1024: 16, 1280: 16, 1664: 16}
PREFIXES = ("vision_model.",)
LAYERS = {
  "patch_embedding": "embeddings.patch_embedding",
  "input_norm": "pre_layrnorm",
  "encoder_norm": "post_layernorm",
  "embedding": "visual_projection",
}
# Of OpenAI's pixels.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def convert(path: epath.PathLike, encoder_heads: int | None = None) -> Converted:
  """Converts an image encoder without its projection, from a folder or a file of tensors.

  Args:
    path: of the folder or file.
    encoder_heads: the number of heads, by default that of config.json or the published models.

  Raises:
    UserError: if the tensors are those of another network, see `towers.take` and `towers.settle`.
  """
  _, section, model, params, unused = _open(path, encoder_heads)
  return towers.export(model, section, params, unused)


def load(path: epath.PathLike) -> towers.Tower:
  """Loads the feature network, whose features are projected if the file has a projection.

  Raises:
    UserError: as `convert`, or if preprocessor_config.json asks for something that is not supported.
  """
  stored, _, model, params, _ = _open(path, None)
  side = model.image_size
  return towers.prepare(stored, model, params, towers.Preparation(side[0], side))


def to_transformers(params: Any, model: ViT) -> dict[str, Any]:
  """Renames our parameters to transformers' names, without prefix, and PyTorch's layout."""
  flat = tree.flatten(params)
  found = {
    "embeddings.position_embedding.weight": flat.pop("position"),
    "embeddings.class_embedding": flat.pop("class_token")[0],
  }
  layers = dict(LAYERS)
  for i in range(model.depth):
    layers |= {
      f"encoder/block_{i}/{ours}": f"encoder.layers.{i}.{name}" for ours, name in siglip.BLOCK.items()
    }
  return found | vqgan_pytorch.to_torch(flat, layers)


def _open(
  path: epath.PathLike, heads: int | None
) -> tuple[towers.Stored, dict[str, Any], ViT, Any, tuple[str, ...]]:
  stored = towers.read(path, PREFIXES)
  found, need = stored.tensors, functools.partial(tensors.need, path, stored.tensors)
  width, _, patch, _ = need("embeddings.patch_embedding.weight", 4).shape
  need("embeddings.class_embedding", 1)
  count = need("embeddings.position_embedding.weight", 2).shape[0] - 1
  section: dict[str, Any] = dict(
    image_size=towers.side_of(stored.path, count, patch),
    patch=patch,
    width=width,
    depth=tensors.count(found, r"encoder\.layers\.(\d+)\."),
    hidden=need("encoder.layers.0.mlp.fc1.weight", 2).shape[0],
    pooling="class",
    activation="quick_gelu",
    epsilon=1e-5,
    embedding_norm=True,
    patch_bias=False,
    mean=MEAN,
    std=STD,
  )
  if "visual_projection.weight" in found:
    section["projection"] = need("visual_projection.weight", 2).shape[0]
  section = towers.settle(stored, section, heads, HEADS)
  used = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "visual_projection.")
  ignored = ("embeddings.position_ids", "text_model.", "text_projection.", "logit_scale")
  return stored, section, *towers.take(stored, section, to_transformers, used, ignored)
