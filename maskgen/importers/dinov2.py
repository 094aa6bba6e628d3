"""DINOv2's vision transformers (Oquab et al. 2023), with and without registers, from transformers."""

import functools
from typing import Any

from etils import epath

from maskgen import tree
from maskgen.importers import Converted, tensors, towers, vqgan_pytorch
from maskgen.models.imagenet import MEAN, STD
from maskgen.models.transformer import SWIGLU
from maskgen.models.vit import ViT
from maskgen.numerics import resizing

# Head counts of the published models S, B, L and g by width.
HEADS = {384: 6, 768: 12, 1024: 16, 1536: 24}
PREFIXES = ("dinov2.", "dinov2_with_registers.")
LAYERS = {"patch_embedding": "embeddings.patch_embeddings.projection", "encoder_norm": "layernorm"}
TOKENS = {
  "position": "embeddings.position_embeddings",
  "class_token": "embeddings.cls_token",
  "register_tokens": "embeddings.register_tokens",
}
BLOCK = {
  "attention_norm": "norm1",
  "attention/query": "attention.attention.query",
  "attention/key": "attention.attention.key",
  "attention/value": "attention.attention.value",
  "attention/out": "attention.output.dense",
  "mlp_norm": "norm2",
  "mlp/up": "mlp.fc1",
  "mlp/down": "mlp.fc2",
}
GATED = {"mlp/down": "mlp.weights_out"}
SCALES = {"attention_scale": "layer_scale1.lambda1", "mlp_scale": "layer_scale2.lambda1"}
# The published preparation: the shorter side to 256 pixels, then the centre of 224.
PREPARATION = towers.Preparation(256, (224, 224))


def convert(
  path: epath.PathLike, encoder_heads: int | None = None, image_size: int | tuple[int, int] | None = None
) -> Converted:
  """Converts an image encoder, from a folder or a file of tensors.

  Args:
    path: of the folder or file.
    encoder_heads: the number of heads, by default that of config.json or the published models.
    image_size: the side or (height, width) of images, to which positions are interpolated; by default that of
      the tensors.

  Raises:
    UserError: if the tensors are those of another network, see `towers.take` and `towers.settle`.
  """
  _, section, model, params, unused = _open(path, encoder_heads)
  if image_size is not None:
    model, params = towers.resize(model, params, towers.square(image_size), _weigh(model))
    section["image_size"] = model.image_size
  return towers.export(model, section, params, unused)


def load(path: epath.PathLike) -> towers.Tower:
  """Loads the feature network, whose features are the outputs at the class position.

  Raises:
    UserError: as `convert`, or if preprocessor_config.json asks for something that is not supported.
  """
  stored, _, model, params, _ = _open(path, None)
  return towers.prepare(stored, model, params, PREPARATION, _weigh(model))


def _weigh(model: ViT) -> towers.Weigh:
  """How positions are interpolated: with registers, they are averaged where there will be fewer."""
  if not model.registers:
    return resizing.bicubic_torch_weights
  return functools.partial(resizing.antialiased_weights, filter="bicubic")


def to_transformers(params: Any, model: ViT) -> dict[str, Any]:
  """Renames our parameters to transformers' names, without prefix, and PyTorch's layout."""
  flat = tree.flatten(params)
  found = {TOKENS[name]: flat.pop(name)[None] for name in TOKENS if name in flat}
  layers = dict(LAYERS)
  for i in range(model.depth):
    ours, theirs = f"encoder/block_{i}", f"encoder.layer.{i}"
    names = BLOCK | GATED if model.activation == SWIGLU else BLOCK
    layers |= {f"{ours}/{name}": f"{theirs}.{other}" for name, other in names.items()}
    found |= {f"{theirs}.{other}": flat.pop(f"{ours}/{name}") for name, other in SCALES.items()}
    if model.activation == SWIGLU:
      both = towers.join(flat, f"{ours}/mlp", ("gate", "up"))
      found |= vqgan_pytorch.to_torch(both, {"joined": f"{theirs}.mlp.weights_in"})
  return found | vqgan_pytorch.to_torch(flat, layers)


def _open(
  path: epath.PathLike, heads: int | None
) -> tuple[towers.Stored, dict[str, Any], ViT, Any, tuple[str, ...]]:
  stored = towers.read(path, PREFIXES)
  found, need = stored.tensors, functools.partial(tensors.need, path, stored.tensors)
  width, _, patch, _ = need("embeddings.patch_embeddings.projection.weight", 4).shape
  count = need("embeddings.position_embeddings", 3).shape[1] - 1
  gated = "encoder.layer.0.mlp.weights_in.weight" in found
  hidden = need("encoder.layer.0.mlp.weights_out.weight", 2).shape[1] if gated else 0
  section: dict[str, Any] = dict(
    image_size=towers.side_of(stored.path, count, patch),
    patch=patch,
    width=width,
    depth=tensors.count(found, r"encoder\.layer\.(\d+)\."),
    hidden=hidden or need("encoder.layer.0.mlp.fc1.weight", 2).shape[0],
    pooling="class",
    activation=SWIGLU if gated else "gelu",
    epsilon=1e-6,
    layer_scale=True,
    mean=MEAN,
    std=STD,
  )
  if "embeddings.register_tokens" in found:
    section["registers"] = need("embeddings.register_tokens", 3).shape[1]
  section = towers.settle(stored, section, heads, HEADS)
  used, ignored = ("embeddings.", "encoder.", "layernorm."), ("embeddings.mask_token", "classifier.")
  return stored, section, *towers.take(stored, section, to_transformers, used, ignored)
