"""MAE's PyTorch reference (facebookresearch/mae): an encoder, alone or with its decoder.

It stores its fixed position embeddings. Those of an encoder that was fine-tuned have changed: they are
learned ones.
"""

import functools
from typing import Any

import jax
from etils import epath

from maskgen import tree
from maskgen.errors import UserError
from maskgen.importers import Converted, mage, tensors, timm, towers, vqgan_pytorch
from maskgen.models import mae as models
from maskgen.models.imagenet import MEAN, STD
from maskgen.models.vit import ViT

# The encoder's names and layout, without fixed positions, are timm's.
to_reference = timm.to_timm
DECODER_HEADS = 16
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
  encoder = timm.infer(stored, encoder_heads) | dict(mean=MEAN, std=STD)
  if "decoder_embed.weight" not in found:
    model, params, unused = towers.take(stored, encoder, to_reference, timm.USED, FIXED)
    return towers.export(model, encoder, params, unused)
  width = tensors.need(path, found, "decoder_embed.weight", 2).shape[0]
  if not towers.is_fixed(tensors.need(path, found, "decoder_pos_embed", 3)[0], ViT(**encoder).grid):
    raise UserError(f"{path}: 'decoder_pos_embed' is not MAE's table of sines: give a checkpoint of MAE")
  depth, heads = tensors.count(found, r"decoder_blocks\.(\d+)\."), decoder_heads or DECODER_HEADS
  if width % heads:
    raise UserError(f"--decoder_heads={heads} does not divide the width of {width}: give one that does")
  model = ViT(**encoder)
  decoder = models.decoder_of(model, width, depth, heads)
  shapes = jax.eval_shape(lambda: models.init(model, decoder, jax.random.key(0)))
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


def whole_to_reference(params: Any, encoder: ViT, decoder: models.PixelDecoder) -> dict[str, Any]:
  """Renames the parameters of encoder and decoder."""
  flat = tree.flatten(params["decoder"])
  tokens = {"mask_token": flat.pop("mask_token")[None]}
  blocks = {f"decoder/block_{i}": f"decoder_blocks.{i}" for i in range(decoder.depth)}
  found = tokens | mage.rename_blocks(flat, DECODER_LAYERS, blocks)
  return to_reference(params["encoder"], encoder) | found
