"""MaskGIT's transformer, a Flax msgpack file with Linen's automatic names, together with its tokenizer's."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from maskgen import tree
from maskgen.errors import UserError
from maskgen.importers import Converted, maskgit_flax, tensors, vqgan_pytorch
from maskgen.models.maskgit import MaskGit
from maskgen.models.vqgan import VQGAN
from maskgen.numerics.vocab import Vocab

LAYERS = {
  "embedding_norm": "Embed_0/embeddings_ln",
  "head": "MlmLayer_0/mlm_dense",
  "head_norm": "MlmLayer_0/mlm_ln",
}
BLOCK = {
  "attention/query": "Attention_0/self_attention/query",
  "attention/key": "Attention_0/self_attention/key",
  "attention/value": "Attention_0/self_attention/value",
  "attention/out": "Attention_0/self_attention/out",
  "attention_norm": "Attention_0/attention_output_ln",
  "mlp/up": "Mlp_0/intermediate_output",
  "mlp/down": "Mlp_0/layer_output",
  "mlp_norm": "Mlp_0/layer_output_ln",
}
PARTS = ("Embed_0/", "TransformerLayer_", "MlmLayer_0/")


def convert(path: epath.PathLike, tokenizer: epath.PathLike | None = None) -> Converted:
  """Converts a checkpoint of the transformer; all sizes are inferred from its tensors and its tokenizer's.

  Args:
    path: of the transformer.
    tokenizer: of the tokenizer that it was trained with, a file that `maskgit_flax` converts.

  Raises:
    UserError: if a file is of another kind, or they do not belong together.
  """
  if tokenizer is None:
    raise UserError(f"{path} has no tokenizer: give the file of MaskGIT's tokenizer as --tokenizer")
  section, codes, others = maskgit_flax.read(tokenizer)
  found = tensors.read_msgpack(path)
  objective = _infer(path, found, section)
  model = network(objective)
  rename = functools.partial(to_reference, model=model)
  params = tensors.take(path, found, rename, shapes(model))
  unused = tuple(sorted(found.keys() - jax.eval_shape(rename, params).keys()))
  vqgan_pytorch.refuse_left_over(path, unused, PARTS)
  variables = {"params": {"main": params}, "frozen": {"tokenizer": codes}, "extra": {}}
  return Converted({"objective": objective}, variables, unknown=(*unused, *others))


def _infer(path: epath.PathLike, found: tensors.Tensors, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
  need = functools.partial(tensors.need, path, found)
  rows, width = need("Embed_0/word_embeddings/embedding", 2).shape
  positions = need("Embed_0/position_embeddings/embedding", 2).shape[0]
  _, heads, _ = need(f"TransformerLayer_0/{BLOCK['attention/query']}/kernel", 3).shape
  classes = rows - tokenizer["codebook_size"] - 1
  if classes < 1:
    raise UserError(
      f"{path} has {rows} token ids, too few for the {tokenizer['codebook_size']} codes of the tokenizer: "
      "give the tokenizer that it was trained with"
    )
  size = tensors.image_size(path, positions - 1, tokenizer["strides"])
  return dict(
    name="maskgit",
    image_size=(size, size),
    tokenizer=dict(tokenizer),
    classes=classes,
    width=width,
    depth=tensors.count(found, r"TransformerLayer_(\d+)/"),
    heads=heads,
    hidden=need(f"TransformerLayer_0/{BLOCK['mlp/up']}/bias", 1).shape[0],
    dropout=0.1,
    condition_dropout=0.0,
    label_smoothing=0.1,
    sampling=dict(steps=16, schedule="cosine", temperature=4.5),
  )


def network(section: Mapping[str, Any]) -> MaskGit:
  """The network of a section from `convert`."""
  tokenizer = VQGAN(**section["tokenizer"])
  grid = tokenizer.token_grid((*section["image_size"], tokenizer.image_channels))
  sizes = {name: section[name] for name in ("width", "depth", "heads", "hidden")}
  return MaskGit(Vocab(tokenizer.codebook_size, section["classes"]), grid[0] * grid[1], **sizes)


def shapes(model: MaskGit) -> Any:
  """The shapes of the network's parameters."""
  tokens = jax.ShapeDtypeStruct((1, model.num_tokens), jnp.int32)
  mask, label = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_), jax.ShapeDtypeStruct((1,), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), tokens, mask, label)["params"]


def to_reference(params: Any, model: MaskGit) -> dict[str, Any]:
  """Renames the parameters to MaskGIT's names, and gives attention an axis for the heads."""
  flat = tree.flatten(params)
  found = {
    "Embed_0/word_embeddings/embedding": flat.pop("embedding"),
    "Embed_0/position_embeddings/embedding": flat.pop("position"),
    "MlmLayer_0/mlm_bias/bias": flat.pop("head_bias"),
  }
  layers = dict(LAYERS)
  for i in range(model.depth):
    layers |= {f"encoder/block_{i}/{name}": f"TransformerLayer_{i}/{other}" for name, other in BLOCK.items()}
  for path, value in flat.items():
    layer, _, leaf = path.rpartition("/")
    kind = layer.rpartition("/")[2]
    if kind in ("query", "key", "value"):
      value = value.reshape(*value.shape[:-1], model.heads, -1)
    elif kind == "out" and leaf == "kernel":
      value = value.reshape(model.heads, -1, value.shape[-1])
    found[f"{layers[layer]}/{leaf}"] = value
  return found
