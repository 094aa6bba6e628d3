"""Classifiers of MAGE's PyTorch reference: an encoder that was fine-tuned with a head, and its tokenizer.

The encoder is that of `importers.mage` without the normalisation after its last block: the head normalises
the mean over the tokens.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from maskgen import tree
from maskgen.importers import Converted, mage, tensors, vqgan_pytorch
from maskgen.models.mage import Encoder
from maskgen.models.vqgan import VQGAN
from maskgen.numerics.vocab import Vocab

PARTS = ("vqgan.", "token_emb.", "blocks.", "norm.", "fc_norm.", "head.")
LAYERS = {"embedding_norm": "token_emb.LayerNorm", "head/norm": "fc_norm", "head/logits": "head"}


def convert(path: epath.PathLike, encoder_heads: int | None = None) -> Converted:
  """Converts a checkpoint; all sizes except the head count are inferred from its tensors.

  Raises:
    UserError: if the file is of another kind, or the head count is unknown or does not divide the width.
  """
  found = tensors.read(path)
  section = _infer(path, found, encoder_heads)
  encoder, tokenizer = networks(section["encoder"])
  rename = functools.partial(to_reference, encoder=encoder, tokenizer=tokenizer)
  params = tensors.take(path, found, rename, shapes(section["classes"], encoder, tokenizer))
  unused = sorted(found.keys() - jax.eval_shape(rename, params).keys())
  dead = tuple(name for name in unused if mage.is_dead(name))
  unknown = tuple(name for name in unused if name not in dead)
  vqgan_pytorch.refuse_left_over(path, unknown, PARTS)
  variables = {"params": {"main": params["main"]}, "frozen": {"tokenizer": params["tokenizer"]}, "extra": {}}
  return Converted({"objective": section}, variables, dead, unknown)


def _infer(path: epath.PathLike, found: Mapping[str, Any], encoder_heads: int | None) -> dict[str, Any]:
  need = functools.partial(tensors.need, path, found)
  tokenizer = vqgan_pytorch.infer(path, found, "vqgan.")
  rows, width = need("token_emb.word_embeddings.weight", 2).shape
  positions = need("token_emb.position_embeddings.weight", 2).shape[0]
  classes = need("head.weight", 2).shape[0]
  for name in ("blocks.0.norm1.weight", "fc_norm.weight"):
    need(name, 1)
  mage.check_rows(path, rows, tokenizer)
  size = tensors.image_size(path, positions - 1, tokenizer["strides"])
  encoder = dict(
    name="mage",
    image_size=(size, size),
    tokenizer=tokenizer,
    class_ids=mage.CLASSES,
    null_class=mage.NULL_CLASS,
    width=width,
    depth=tensors.count(found, r"blocks\.(\d+)\."),
    heads=mage.check_heads(path, "encoder", width, encoder_heads),
  )
  return dict(name="classify", encoder=encoder, classes=classes, trained="all", norm="layer")


def networks(section: Mapping[str, Any]) -> tuple[Encoder, VQGAN]:
  """The encoder and the tokenizer of a section `encoder`."""
  tokenizer = VQGAN(**section["tokenizer"])
  vocab = Vocab(tokenizer.codebook_size, section["class_ids"], section["null_class"])
  rows, columns = tokenizer.token_grid((*section["image_size"], tokenizer.image_channels))
  sizes = {name: section[name] for name in ("width", "depth", "heads")}
  return Encoder(vocab, rows * columns, **sizes), tokenizer


def shapes(classes: int, encoder: Encoder, tokenizer: VQGAN) -> dict[str, Any]:
  """The shapes of the parameters, `main` with the head, and `tokenizer`."""
  tokens = jax.ShapeDtypeStruct((1, encoder.num_tokens), "int32")
  main = jax.eval_shape(functools.partial(encoder.init, method="pool"), jax.random.key(0), tokens)["params"]
  widths = {"norm": (encoder.width,), "logits": (classes,)}
  head = {name: {"bias": jax.ShapeDtypeStruct(shape, "float32")} for name, shape in widths.items()}
  head["norm"]["scale"] = head["norm"]["bias"]
  head["logits"]["kernel"] = jax.ShapeDtypeStruct((encoder.width, classes), "float32")
  return {"main": {**main, "head": head}, "tokenizer": vqgan_pytorch.shapes(tokenizer)}


def to_reference(params: Mapping[str, Any], encoder: Encoder, tokenizer: VQGAN) -> dict[str, Any]:
  """Renames all parameters to the reference's names and layout."""
  flat = tree.flatten(params["main"])
  found = {
    "token_emb.word_embeddings.weight": flat.pop("embedding"),
    "token_emb.position_embeddings.weight": flat.pop("position"),
  }
  blocks = {f"encoder/block_{i}": f"blocks.{i}" for i in range(encoder.depth)}
  found |= mage.rename_blocks(flat, LAYERS, blocks)
  return found | mage.rename_tokenizer(params["tokenizer"], tokenizer)
