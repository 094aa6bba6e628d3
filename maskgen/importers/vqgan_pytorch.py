"""The tokenizer of MAGE's PyTorch reference: MaskGIT's VQGAN with the names of taming-transformers."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from maskgen import tree
from maskgen.errors import UserError
from maskgen.importers import Converted, tensors
from maskgen.models.vqgan import VQGAN

NORM_GROUPS = 32
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# Prefixes of tensors that change what a tokenizer computes.
PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
# Our axes in their order: [in, out] and [h, w, in, out] to [out, in] and [out, in, h, w].
AXES = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
BLOCK = {
  "norm_0": "norm1",
  "conv_0": "conv1",
  "norm_1": "norm2",
  "conv_1": "conv2",
  "shortcut": "nin_shortcut",
}


def convert(path: epath.PathLike, image_size: int = 256) -> Converted:
  """Converts a file that contains only the tokenizer.

  Raises:
    UserError: if the file is of another kind, see `tensors.read` and `tensors.take`.
  """
  found = tensors.read(path)
  section = infer(path, found)
  network = VQGAN(**section)
  rename = functools.partial(to_reference, network=network)
  params = tensors.take(path, found, rename, shapes(network))
  unused = tuple(sorted(found.keys() - jax.eval_shape(rename, params).keys()))
  refuse_left_over(path, unused, PARTS)
  return tokenizer_export(section, params, image_size, unused)


def infer(path: epath.PathLike, found: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Infers the fields of `VQGAN` from a tokenizer's tensors."""
  need = functools.partial(tensors.need, path, found)
  first = need(f"{prefix}encoder.conv_in.weight", 4)
  channels = first.shape[0]
  down = re.escape(f"{prefix}encoder.down.")
  levels = tensors.count(found, rf"{down}(\d+)\.block\.")
  widths = [need(f"{prefix}encoder.down.{level}.block.0.conv1.weight", 4).shape[0] for level in range(levels)]
  codes = need(f"{prefix}quantize.embedding.weight", 2)
  blocks = tensors.count(found, rf"{down}0\.block\.(\d+)\.")
  return sections(path, channels, widths, blocks, codes.shape, first.shape[1])


def sections(
  path: epath.PathLike, channels: int, widths: list[int], blocks: int, codes: Any, image_channels: int
) -> dict[str, Any]:
  """The fields of `VQGAN` for a reference tokenizer of these sizes.

  Raises:
    UserError: if no such network has these sizes.
  """
  if not widths or not blocks or any(width % channels for width in widths):
    raise UserError(f"{path} is not a tokenizer of this format: its levels have {widths} channels")
  return dict(
    channels=channels,
    multipliers=tuple(width // channels for width in widths),
    strides=(2,) * (len(widths) - 1),
    blocks=blocks,
    codebook_size=codes[0],
    code_width=codes[1],
    normalize_codes=False,
    norm_groups=NORM_GROUPS,
    shortcut="reference",
    image_channels=image_channels,
  )


def shapes(network: VQGAN) -> Any:
  """The shapes of a tokenizer's parameters."""
  images = jax.ShapeDtypeStruct((1, network.factor, network.factor, network.image_channels), jnp.float32)
  return jax.eval_shape(network.init, jax.random.key(0), images)["params"]


def to_reference(params: Any, network: VQGAN) -> dict[str, Any]:
  """Renames our parameters to the reference's names and layout."""
  layers = {
    f"decoder/level_{i}_upsample": f"decoder.up.{i}.upsample.conv" for i in range(len(network.multipliers))
  }
  for part, direction in (("encoder", "down"), ("decoder", "up")):
    layers |= {f"{part}/{name}": f"{part}.{name}" for name in ("conv_in", "norm_out", "conv_out")}
    blocks = {f"{part}/middle_block_{i}": f"{part}.mid.block_{i + 1}" for i in range(2)}
    for level in range(len(network.multipliers)):
      for i in range(network.blocks):
        blocks[f"{part}/level_{level}_block_{i}"] = f"{part}.{direction}.{level}.block.{i}"
    for ours, theirs in blocks.items():
      layers |= {f"{ours}/{name}": f"{theirs}.{other}" for name, other in BLOCK.items()}
  flat = tree.flatten(params)
  codebook = flat.pop("codebook")
  return {"quantize.embedding.weight": codebook, **to_torch(flat, layers)}


def to_torch(flat: Mapping[str, Any], layers: Mapping[str, str]) -> dict[str, Any]:
  """Renames the parameters of layers to PyTorch's names and layout.

  Args:
    flat: our parameters by path name.
    layers: their name for each of our layers.

  Raises:
    UserError: for a layer without a name.
  """
  found = {}
  for path, value in flat.items():
    layer, _, leaf = path.rpartition("/")
    if layer not in layers:
      raise UserError(f"the reference has no parameter for '{path}'")
    found[f"{layers[layer]}.{LEAVES[leaf]}"] = value.transpose(AXES[value.ndim])
  return found


def refuse_left_over(path: epath.PathLike, unused: tuple[str, ...], parts: tuple[str, ...]) -> None:
  """Rejects a network that has more layers than ours.

  Raises:
    UserError: if an unused tensor belongs to a part of the network that is used.
  """
  odd = [name for name in unused if name.startswith(parts)]
  if odd:
    raise UserError(
      f"{path} has a tensor '{odd[0]}' for which this network has no layer: it is another network"
    )


def tokenizer_export(
  section: Mapping[str, Any], params: Any, image_size: int, unknown: tuple[str, ...]
) -> Converted:
  """A converted tokenizer as a model of the tokenizer objective.

  Raises:
    UserError: if the network does not support images of this size.
  """
  network = VQGAN(**section)
  network.token_grid((image_size, image_size, network.image_channels))
  objective = dict(
    name="tokenizer", image_size=(image_size, image_size), tokenizer=dict(section), adversarial_weight=0.0
  )
  usage = jnp.full((network.codebook_size,), 1.0 / network.codebook_size)
  variables = {"params": {"generator": params}, "frozen": {}, "extra": {"usage": usage}}
  return Converted({"objective": objective}, variables, unknown=unknown)
