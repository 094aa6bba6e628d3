"""MAGE's PyTorch reference: tokenizer and transformer in one file, with its own parameter names.

Its vocabulary consists of the codes, 1000 class ids, of which it uses one (the null class of `Vocab`), and
[MASK]. Its table of position embeddings has 257 rows for any image size.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from maskgen import tree
from maskgen.errors import UserError
from maskgen.importers import Converted, tensors, vqgan_pytorch
from maskgen.models.mage import Mage
from maskgen.models.vqgan import VQGAN
from maskgen.numerics.vocab import Vocab

CLASSES, NULL_CLASS = 1000, 76
POSITIONS = 257
# Head counts (encoder, decoder) of the published models by width, which tensors do not determine.
HEADS = {768: (12, 16), 1024: (16, 16)}
# Never trained and never read by the reference.
DEAD = (
  "patch_embed.",
  "cls_token",
  "mask_token",
  "pos_embed",
  "decoder_pos_embed",
  "decoder_pred.",
  "token_emb.position_ids",
)
PARTS = ("vqgan.", "token_emb.", "blocks.", "norm.", "decoder_", "mlm_layer.")
LAYERS = {
  "embedding_norm": "token_emb.LayerNorm",
  "encoder_norm": "norm",
  "decoder_input": "decoder_embed",
  "decoder_norm": "decoder_norm",
  "head": "mlm_layer.fc",
  "head_norm": "mlm_layer.ln",
}
BLOCK = {
  "attention_norm": "norm1",
  "attention/query": "attn.query",
  "attention/key": "attn.key",
  "attention/value": "attn.value",
  "attention/out": "attn.proj",
  "mlp_norm": "norm2",
  "mlp/up": "mlp.fc1",
  "mlp/down": "mlp.fc2",
}


def convert(
  path: epath.PathLike, encoder_heads: int | None = None, decoder_heads: int | None = None
) -> Converted:
  """Converts a checkpoint; all sizes except the head counts are inferred from its tensors.

  Raises:
    UserError: if the file is of another kind (see `tensors.read` and `tensors.take`), or the head counts are
      unknown or do not divide the widths.
  """
  found = tensors.read(path)
  section = infer(path, found, encoder_heads, decoder_heads)
  model, tokenizer = networks(section)
  rename = functools.partial(to_reference, model=model, tokenizer=tokenizer)
  params = tensors.take(path, found, rename, shapes(model, tokenizer))
  unused = sorted(found.keys() - jax.eval_shape(rename, params).keys())
  dead = tuple(name for name in unused if is_dead(name))
  unknown = tuple(name for name in unused if name not in dead)
  vqgan_pytorch.refuse_left_over(path, unknown, PARTS)
  variables = {"params": {"main": params["main"]}, "frozen": {"tokenizer": params["tokenizer"]}, "extra": {}}
  return Converted({"objective": section}, variables, dead, unknown)


def is_dead(name: str) -> bool:
  """Whether the reference stores a tensor of this name, but does not use it."""
  return any(name.startswith(other) if other.endswith(".") else name == other for other in DEAD)


def infer(
  path: epath.PathLike, found: Mapping[str, np.ndarray], encoder_heads: int | None, decoder_heads: int | None
) -> dict[str, Any]:
  """The section `config.objective` of a checkpoint's model.

  Raises:
    UserError: if a tensor with a size is missing, or sizes or head counts are inconsistent.
  """
  need = functools.partial(tensors.need, path, found)
  tokenizer = vqgan_pytorch.infer(path, found, "vqgan.")
  rows, width = need("token_emb.word_embeddings.weight", 2).shape
  _, positions, decoder_width = need("decoder_pos_embed_learned", 3).shape
  for part in ("blocks", "decoder_blocks"):
    need(f"{part}.0.norm1.weight", 1)
  heads = {
    "encoder": check_heads(path, "encoder", width, encoder_heads),
    "decoder": check_heads(path, "decoder", decoder_width, decoder_heads),
  }
  check_rows(path, rows, tokenizer)
  size = tensors.image_size(path, positions - 1, tokenizer["strides"])
  return dict(
    name="mage",
    image_size=(size, size),
    tokenizer=tokenizer,
    class_ids=CLASSES,
    null_class=NULL_CLASS,
    width=width,
    depth=tensors.count(found, r"blocks\.(\d+)\."),
    heads=heads["encoder"],
    decoder_width=decoder_width,
    decoder_depth=tensors.count(found, r"decoder_blocks\.(\d+)\."),
    decoder_heads=heads["decoder"],
    dropout=0.1,
    mask_ratio=dict(mean=0.55, std=0.25, low=0.5, high=1.0),
    label_smoothing=0.1,
    sampling=dict(steps=20, schedule="cosine", temperature=6.0),
  )


def check_heads(path: epath.PathLike, part: str, width: int, given: int | None) -> int:
  """Returns the head count of the encoder or decoder, by default that of the published models.

  Raises:
    UserError: if it is unknown, or does not divide the width.
  """
  heads = given or HEADS.get(width, (0, 0))[part == "decoder"]
  if not heads:
    raise UserError(f"{path} has no head counts, and none are known for width {width}: give --{part}_heads")
  if heads < 1 or width % heads:
    raise UserError(
      f"--{part}_heads={heads} does not divide the {part}'s width of {width}: give one that does"
    )
  return heads


def check_rows(path: epath.PathLike, rows: int, tokenizer: Mapping[str, Any]) -> None:
  """Checks the number of token ids.

  Raises:
    UserError: if it is not that of codes, classes and [MASK].
  """
  codes = tokenizer["codebook_size"]
  if rows != codes + CLASSES + 1:
    raise UserError(
      f"{path}: tensor 'token_emb.word_embeddings.weight' has {rows} rows: {codes} codes, {CLASSES} classes "
      f"and [MASK] need {codes + CLASSES + 1}"
    )


def networks(section: Mapping[str, Any]) -> tuple[Mage, VQGAN]:
  """The networks of a section from `infer`."""
  tokenizer = VQGAN(**section["tokenizer"])
  names = ("width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads")
  vocab = Vocab(tokenizer.codebook_size, section["class_ids"], section["null_class"])
  grid = tokenizer.token_grid((*section["image_size"], tokenizer.image_channels))
  return Mage(vocab, math.prod(grid), **{name: section[name] for name in names}), tokenizer


def shapes(model: Mage, tokenizer: VQGAN) -> dict[str, Any]:
  """The shapes of both networks' parameters, `main` and `tokenizer`."""
  tokens = jax.ShapeDtypeStruct((1, model.num_tokens), jnp.int32)
  mask = jax.ShapeDtypeStruct((1, model.num_tokens), jnp.bool_)
  main = jax.eval_shape(model.init, jax.random.key(0), tokens, mask)["params"]
  return {"main": main, "tokenizer": vqgan_pytorch.shapes(tokenizer)}


def to_reference(params: Mapping[str, Any], model: Mage, tokenizer: VQGAN) -> dict[str, Any]:
  """Renames both networks' parameters to the reference's names and layout.

  Rows that only the reference has are zero: those of positions beyond the image and, for a model that was not
  converted from it, those of class ids.

  Args:
    params: `main` and `tokenizer`.
    model: the network of `main`.
    tokenizer: the network of `tokenizer`.

  Raises:
    UserError: for a parameter that the reference does not have.
  """
  flat = tree.flatten(params["main"])
  position = flat.pop("position")
  found = {
    "token_emb.word_embeddings.weight": _vocabulary(flat.pop("embedding"), model.vocab),
    "token_emb.position_embeddings.weight": _rows(position, max(POSITIONS, len(position)) - len(position)),
    "decoder_pos_embed_learned": flat.pop("decoder_position")[None],
    "mlm_layer.bias": _vocabulary(flat.pop("head_bias"), model.vocab)[None, None],
  }
  blocks = {f"encoder/block_{i}": f"blocks.{i}" for i in range(model.depth)}
  blocks |= {f"decoder/block_{i}": f"decoder_blocks.{i}" for i in range(model.decoder_depth)}
  return found | rename_blocks(flat, LAYERS, blocks) | rename_tokenizer(params["tokenizer"], tokenizer)


def rename_blocks(
  flat: Mapping[str, Any], layers: Mapping[str, str], blocks: Mapping[str, str]
) -> dict[str, Any]:
  """Renames the parameters of blocks, with one projection for query, key and value, and of other layers.

  Args:
    flat: our parameters by path name.
    layers: their name for each of our layers outside blocks.
    blocks: their name for each of our blocks.

  Raises:
    UserError: for a layer without a name.
  """
  known = dict(layers)
  for ours, theirs in blocks.items():
    known |= {f"{ours}/{name}": f"{theirs}.{other}" for name, other in BLOCK.items()}
  found = vqgan_pytorch.to_torch(flat, known)
  for block in blocks.values():
    for leaf in ("weight", "bias"):
      fused = [found.pop(f"{block}.attn.{name}.{leaf}") for name in ("query", "key", "value")]
      found[f"{block}.attn.qkv.{leaf}"] = jnp.concatenate(fused)
  return found


def rename_tokenizer(params: Any, tokenizer: VQGAN) -> dict[str, Any]:
  """Renames the parameters of the tokenizer within a file of the reference."""
  return {f"vqgan.{name}": value for name, value in vqgan_pytorch.to_reference(params, tokenizer).items()}


def _rows(table: jax.Array, count: int) -> jax.Array:
  """Appends `count` rows of zeros to a table."""
  return jnp.pad(table, ((0, count), *((0, 0) for _ in table.shape[1:])))


def _vocabulary(table: jax.Array, vocab: Vocab) -> jax.Array:
  """Converts a table of our vocabulary to theirs, moving the null class and [MASK]."""
  if (vocab.classes, vocab.null_class) == (CLASSES, NULL_CLASS):
    return table
  codes, null = table[: vocab.codebook], table[vocab.null_class_id : vocab.null_class_id + 1]
  before = _rows(codes, NULL_CLASS)
  return jnp.concatenate([before, _rows(null, CLASSES - NULL_CLASS - 1), table[vocab.mask_id :]])


def check_expressible(tokenizer: VQGAN, grid: tuple[int, int], model: Mage | None = None) -> None:
  """Checks that the reference's code can run one of our models.

  Raises:
    UserError: if it does not support the tokenizer, the token grid (h', w') or an option of the network.
  """
  reason = ""
  if tokenizer.shortcut != "reference" and len(set(tokenizer.multipliers)) > 1:
    reason = f"a tokenizer with shortcut='{tokenizer.shortcut}'"
  elif tokenizer.normalize_codes:
    reason = "a tokenizer with normalize_codes=True"
  elif tokenizer.norm_groups != vqgan_pytorch.NORM_GROUPS:
    reason = f"a tokenizer with norm_groups={tokenizer.norm_groups}"
  elif set(tokenizer.strides) - {2}:
    reason = f"a tokenizer with strides={tokenizer.strides}"
  elif grid[0] != grid[1]:
    reason = f"a token grid of {grid[0]}x{grid[1]}"
  elif model is not None and (model.fixed_grid is not None or model.add_visible):
    reason = "fixed positions or visible tokens that are added"
  if reason:
    raise UserError(f"the reference cannot express {reason}: export with --format=maskgen instead")
