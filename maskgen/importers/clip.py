"""CLIP (Radford et al. 2021) from transformers: its image encoders, vision transformers, and its text tower.

`convert` and `load` drop the text tower, which `load_text` reads.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from maskgen import tree
from maskgen.errors import UserError
from maskgen.importers import Converted, siglip, tensors, torch_tensors, towers, vqgan_pytorch
from maskgen.models.text_encoder import Encoded, TextEncoder
from maskgen.models.vit import ViT
from maskgen.numerics import text

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
# Names of the text tower begin so. The width of each head of all published ones.
TEXT, _HEAD = "text_model.", 64


@dataclasses.dataclass(frozen=True, eq=False)
class TextTower:
  """The text tower of a CLIP model.

  Attributes:
    model: the network.
    params: its parameters, float32.
    captions: how texts are tokenized.
  """

  model: TextEncoder
  params: Any
  captions: text.Captions

  def embed(self, texts: Sequence[str]) -> np.ndarray:
    """The embeddings of texts, float32 [b, p], of any length.

    Raises:
      UserError: if a text is too long.
    """
    ids = self.captions.read(texts)
    end = (ids == self.captions.opened.end_id).argmax(axis=1).astype(np.int32)
    return np.asarray(self._encode({"params": self.params}, ids, end).pooled)

  @functools.cached_property
  def _encode(self) -> Callable[..., Encoded]:
    return jax.jit(self.model.apply)


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


def load_text(path: epath.PathLike) -> TextTower:
  """Loads the text tower of a whole CLIP model.

  Args:
    path: of the folder, with config.json, the tensors and the files of the tokenizer.

  Raises:
    UserError: if the folder has no text tower, or its tensors do not fit.
  """
  folder = pathlib.Path(path).expanduser()
  found: tensors.Tensors = {}
  for file in torch_tensors.find(folder, "model") if folder.is_dir() else [folder]:
    found |= tensors.read(file)
  if not folder.is_dir() or "text_projection.weight" not in found:
    raise UserError(f"{path} has no text tower: give the folder of a whole CLIP model, with its tokenizer")
  whole = torch_tensors.read_json(folder / towers.CONFIG)
  config, need = whole.get("text_config", whole), functools.partial(tensors.need, path, found)
  words, width = need(f"{TEXT}embeddings.token_embedding.weight", 2).shape
  model = TextEncoder(
    vocabulary_size=words,
    positions=need(f"{TEXT}embeddings.position_embedding.weight", 2).shape[0],
    width=width,
    depth=tensors.count(found, rf"{re.escape(TEXT)}encoder\.layers\.(\d+)\."),
    heads=config.get("num_attention_heads") or max(width // _HEAD, 1),
    hidden=need(f"{TEXT}encoder.layers.0.mlp.fc1.weight", 2).shape[0],
    activation=config.get("hidden_act", "quick_gelu"),
    projection=need("text_projection.weight", 2).shape[0],
    epsilon=config.get("layer_norm_eps", 1e-5),
  )
  ids, end = jnp.zeros((1, model.positions), jnp.int32), jnp.zeros((1,), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), ids, end)["params"]
  params = tensors.take(path, found, _text_to_transformers, shapes)
  tokenizer = f"{text.BYTE_PAIRS}:{folder}"
  return TextTower(model, params, text.Captions(text_tokenizer=tokenizer, length=model.positions))


def _text_to_transformers(params: Any) -> dict[str, Any]:
  """Renames our parameters of a text tower to transformers' names and PyTorch's layout."""
  flat = tree.flatten(params).items()
  found = {torch_tensors.torch_name(name): leaf.T if name.endswith("kernel") else leaf for name, leaf in flat}
  return {
    name if name.startswith("text_projection") else f"{TEXT}{name}": leaf for name, leaf in found.items()
  }


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
