"""LEASE and Sorcen, the heirs of MAGE in ImaGonEs/LEASE: MAGE's names, without the tokenizer.

What only trains them is dropped: projections, centroids, moving averages and an online classifier.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from maskgen import tree
from maskgen.errors import UserError
from maskgen.importers import Converted, mage, tensors, vqgan_pytorch
from maskgen.models.mage import Mage
from maskgen.numerics.positions import sines

PARTS = ("token_emb.", "blocks.", "norm.", "decoder_", "mlm_layer.")
# Beginnings of names that only training uses, and the fixed positions.
DEAD = (
  "blocks_momentum.",
  "classifier.",
  "dec_to_dino.",
  "dino_codebook",
  "momentum_projector.",
  "pos2d",
  "predictor.",
  "proj_to_dino.",
  "projector.",
)


def convert(
  path: epath.PathLike,
  tokenizer: epath.PathLike | None = None,
  encoder_heads: int | None = None,
  decoder_heads: int | None = None,
) -> Converted:
  """Converts a checkpoint to a model of the `mage` objective.

  Args:
    path: of the transformer.
    tokenizer: of MAGE's tokenizer, a file that `vqgan_pytorch` converts.
    encoder_heads: the number of heads, by default that of the published models.
    decoder_heads: likewise.

  Raises:
    UserError: if a file is of another kind, or they do not belong together.
  """
  if tokenizer is None:
    raise UserError(f"{path} has no tokenizer: give the file of MAGE's tokenizer as --tokenizer")
  codes = vqgan_pytorch.convert(tokenizer)
  found = tensors.read(path)
  section = _infer(path, found, codes.config["objective"]["tokenizer"], encoder_heads, decoder_heads)
  model, network = mage.networks(section)
  rows = tensors.need(path, found, "decoder_pos_embed_learned", 3).shape[1]
  rename = functools.partial(to_reference, model=model, rows=rows)
  params = tensors.take(path, found, rename, mage.shapes(model, network)["main"])
  unused = sorted(found.keys() - jax.eval_shape(rename, params).keys())
  dead = tuple(name for name in unused if mage.is_dead(name) or name.startswith(DEAD))
  unknown = tuple(name for name in unused if name not in dead)
  vqgan_pytorch.refuse_left_over(path, unknown, PARTS)
  frozen = {"tokenizer": codes.variables["params"]["generator"]}
  variables = {"params": {"main": params}, "frozen": frozen, "extra": {}}
  return Converted({"objective": section}, variables, dead, (*unknown, *codes.unknown))


def _infer(
  path: epath.PathLike,
  found: tensors.Tensors,
  tokenizer: Mapping[str, Any],
  encoder_heads: int | None,
  decoder_heads: int | None,
) -> dict[str, Any]:
  """The section `config.objective`."""
  need = functools.partial(tensors.need, path, found)
  rows, width = need("token_emb.word_embeddings.weight", 2).shape
  positions = need("token_emb.position_embeddings.weight", 2).shape[0]
  is_lease, classes = "proj_to_dino.0.weight" in found, rows - tokenizer["codebook_size"] - 1
  if classes < 1 or (not is_lease and classes != mage.CLASSES):
    raise UserError(
      f"{path} has {rows} token ids, which do not fit the {tokenizer['codebook_size']} codes of the "
      "tokenizer: give the one that it was trained with"
    )
  size = tensors.image_size(path, positions - 1, tokenizer["strides"])
  options: dict[str, Any] = dict(
    class_ids=classes,
    # The last id in front of [MASK] stands in LEASE's class position.
    null_class=classes - 1 if is_lease else mage.NULL_CLASS,
  )
  if is_lease:
    options |= dict(fixed_positions=True, add_visible=True)
    side = round((positions - 1) ** 0.5)
    if "pos2d" in found and np.abs(found["pos2d"][0] - sines((side, side), width)).max() > 1e-5:
      raise UserError(f"{path}: 'pos2d' is not the table of sines that LEASE has: give a checkpoint of LEASE")
  decoder_width = need("decoder_embed.weight", 2).shape[0]
  return dict(
    name="mage",
    image_size=(size, size),
    tokenizer=tokenizer,
    **options,
    width=width,
    depth=tensors.count(found, r"blocks\.(\d+)\."),
    heads=mage.check_heads(path, "encoder", width, encoder_heads),
    decoder_width=decoder_width,
    decoder_depth=tensors.count(found, r"decoder_blocks\.(\d+)\."),
    decoder_heads=mage.check_heads(path, "decoder", decoder_width, decoder_heads),
    dropout=0.1,
    mask_ratio=dict(mean=0.55, std=0.25, low=0.5, high=1.0),
    label_smoothing=0.1,
    sampling=dict(steps=20, schedule="cosine", temperature=6.0),
  )


def to_reference(params: Any, model: Mage, rows: int) -> dict[str, Any]:
  """Renames the parameters to the reference's names and layout.

  Args:
    params: the parameters.
    model: the network.
    rows: of its table of decoder positions; those that the network does not have are zero.
  """
  flat = tree.flatten(params)
  position = flat.pop("decoder_position")
  found = {
    "token_emb.word_embeddings.weight": flat.pop("embedding"),
    "token_emb.position_embeddings.weight": flat.pop("position"),
    "decoder_pos_embed_learned": jnp.pad(position, ((0, max(rows - len(position), 0)), (0, 0)))[None],
    "mlm_layer.bias": flat.pop("head_bias")[None, None],
  }
  blocks = {f"encoder/block_{i}": f"blocks.{i}" for i in range(model.depth)}
  blocks |= {f"decoder/block_{i}": f"decoder_blocks.{i}" for i in range(model.decoder_depth)}
  return found | mage.rename_blocks(flat, mage.LAYERS, blocks)
