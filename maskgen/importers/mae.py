"""MAE's PyTorch reference (facebookresearch/mae): an encoder, alone or with its decoder.

It stores its fixed position embeddings. Those of an encoder that was fine-tuned have changed: they are
learned ones.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from maskgen import tree
from maskgen.errors import UserError
from maskgen.importers import Converted, mage, tensors, towers, vqgan_pytorch
from maskgen.models import mae as models
from maskgen.models.image_encoder import IMAGE_CHANNELS
from maskgen.models.imagenet import MEAN, STD
from maskgen.models.vit import ViT
from maskgen.numerics.positions import sines

# Head counts of the published encoders B, L and H by width; their decoders have 16.
HEADS, DECODER_HEADS = {768: 12, 1024: 16, 1280: 16}, 16
LAYERS = {"patch_embedding": "patch_embed.proj", "encoder_norm": "norm"}
FIXED = ("pos_embed", "decoder_pos_embed")
DECODER_LAYERS = {"input": "decoder_embed", "norm": "decoder_norm", "head": "decoder_pred"}


def convert(
  path: epath.PathLike, encoder_heads: int | None = None, decoder_heads: int | None = None
) -> Converted:
  """Converts a checkpoint: to an image encoder, or with a decoder to a model of `masked_pixels`.

  Raises:
    UserError: if the tensors are those of another network, see `tensors.take`, or head counts are unknown.
  """
  stored = towers.read(path)
  found = stored.tensors
  encoder = _encoder(stored, encoder_heads)
  if "decoder_embed.weight" not in found:
    model, params, unused = towers.take(stored, encoder, to_reference, ("blocks.", "patch_embed."), FIXED)
    return towers.export(model, encoder, params, unused)
  width = tensors.need(path, found, "decoder_embed.weight", 2).shape[0]
  if not _is_fixed(tensors.need(path, found, "decoder_pos_embed", 3)[0], ViT(**encoder).grid):
    raise UserError(f"{path}: 'decoder_pos_embed' is not MAE's table of sines: give a checkpoint of MAE")
  depth, heads = tensors.count(found, r"decoder_blocks\.(\d+)\."), decoder_heads or DECODER_HEADS
  if width % heads:
    raise UserError(f"--decoder_heads={heads} does not divide the width of {width}: give one that does")
  model = ViT(**encoder)
  decoder = models.decoder_of(model, IMAGE_CHANNELS, width, depth, heads)
  shapes = jax.eval_shape(lambda: models.init(model, decoder, IMAGE_CHANNELS, jax.random.key(0)))
  rename = functools.partial(whole_to_reference, encoder=model, decoder=decoder)
  params = tensors.take(path, found, rename, shapes)
  rest = sorted(found.keys() - jax.eval_shape(rename, params).keys())
  dead = tuple(name for name in rest if name in FIXED)
  unknown = tuple(name for name in rest if name not in dead)
  vqgan_pytorch.refuse_left_over(path, unknown, ("blocks.", "decoder_", "patch_embed.", "norm."))
  variables = {"params": {"main": params}, "frozen": {}, "extra": {}}
  sizes = dict(decoder_width=width, decoder_depth=depth, decoder_heads=heads)
  section = dict(name="masked_pixels", encoder=encoder, **sizes)
  return Converted({"objective": section}, variables, dead, unknown)


def to_reference(params: Any, model: ViT) -> dict[str, Any]:
  """Renames the encoder's parameters to the reference's names and layout, without fixed positions."""
  flat = tree.flatten(params)
  tokens = {"cls_token": flat.pop("class_token")[None]}
  if "position" in flat:
    tokens["pos_embed"] = flat.pop("position")[None]
  blocks = {f"encoder/block_{i}": f"blocks.{i}" for i in range(model.depth)}
  return tokens | mage.rename_blocks(flat, LAYERS, blocks)


def whole_to_reference(params: Any, encoder: ViT, decoder: models.PixelDecoder) -> dict[str, Any]:
  """Renames the parameters of encoder and decoder."""
  flat = tree.flatten(params["decoder"])
  tokens = {"mask_token": flat.pop("mask_token")[None]}
  blocks = {f"decoder/block_{i}": f"decoder_blocks.{i}" for i in range(decoder.depth)}
  found = tokens | mage.rename_blocks(flat, DECODER_LAYERS, blocks)
  return to_reference(params["encoder"], encoder) | found


def _encoder(stored: towers.Stored, heads: int | None) -> dict[str, Any]:
  """The section of the encoder."""
  need = functools.partial(tensors.need, stored.path, stored.tensors)
  width, _, patch, _ = need("patch_embed.proj.weight", 4).shape
  table = need("pos_embed", 3)[0]
  size = towers.side_of(stored.path, len(table) - 1, patch)
  section: Mapping[str, Any] = dict(
    image_size=size,
    patch=patch,
    width=width,
    depth=tensors.count(stored.tensors, r"blocks\.(\d+)\."),
    hidden=need("blocks.0.mlp.fc1.weight", 2).shape[0],
    pooling="class",
    activation="gelu",
    fixed_positions=_is_fixed(table, (size[0] // patch, size[1] // patch)),
    mean=MEAN,
    std=STD,
  )
  return towers.settle(stored, section, heads, HEADS)


def _is_fixed(table: np.ndarray, grid: tuple[int, int]) -> bool:
  expected = np.pad(sines(grid, table.shape[-1]), ((1, 0), (0, 0)))
  return bool(np.abs(table - expected).max() < 1e-5)
