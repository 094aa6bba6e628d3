"""MaskGIT's tokenizer, a Flax msgpack file with Linen's automatic names, in the order of the forward pass."""

import functools
from typing import Any

import jax
from etils import epath

from maskgen import tree
from maskgen.errors import UserError
from maskgen.importers import Converted, tensors, vqgan_pytorch
from maskgen.models.vqgan import VQGAN

BLOCK = {
  "norm_0": "GroupNorm_0",
  "conv_0": "Conv_0",
  "norm_1": "GroupNorm_1",
  "conv_1": "Conv_1",
  "shortcut": "Conv_2",
}


def convert(path: epath.PathLike, image_size: int = 256) -> Converted:
  """Converts the published tokenizer, or one of the same kind with other sizes.

  Raises:
    UserError: if the file is of another kind, see `tensors.read_msgpack` and `tensors.take`.
  """
  section, params, unused = read(path)
  return vqgan_pytorch.tokenizer_export(section, params, image_size, unused)


def read(path: epath.PathLike) -> tuple[dict[str, Any], Any, tuple[str, ...]]:
  """The fields of `VQGAN`, the parameters, and the names of unknown tensors; raises like `convert`."""
  found = tensors.read_msgpack(path)
  section = _infer(path, found)
  network = VQGAN(**section)
  rename = functools.partial(to_reference, network=network)
  params = tensors.take(path, found, rename, vqgan_pytorch.shapes(network))
  unused = tuple(sorted(found.keys() - jax.eval_shape(rename, params).keys()))
  vqgan_pytorch.refuse_left_over(path, unused, ("encoder/", "decoder/", "quantizer/"))
  return section, params, unused


def _infer(path: epath.PathLike, found: tensors.Tensors) -> dict[str, Any]:
  need = functools.partial(tensors.need, path, found)
  first = need("encoder/Conv_0/kernel", 4)
  codes = need("quantizer/codebook", 2)
  # The decoder's convolutions outside blocks: the first, one after each up-sampling, the last.
  levels = tensors.count(found, r"decoder/Conv_(\d+)/") - 1
  residual = tensors.count(found, r"encoder/ResBlock_(\d+)/")
  blocks, rest = divmod(residual - 2, levels) if levels > 0 else (0, 1)
  if rest or blocks < 1:
    raise UserError(
      f"{path}: {residual} residual blocks are not two in the middle and the same number on each of {levels} "
      "levels: it is another network"
    )
  widths = [need(f"encoder/ResBlock_{i * blocks}/Conv_0/kernel", 4).shape[-1] for i in range(levels)]
  return vqgan_pytorch.sections(path, first.shape[-1], widths, blocks, codes.shape, first.shape[-2])


def to_reference(params: Any, network: VQGAN) -> dict[str, Any]:
  """Renames our parameters to MaskGIT's names; the layout is the same."""
  levels, blocks = len(network.multipliers), network.blocks
  encoder = [f"level_{level}_block_{i}" for level in range(levels) for i in range(blocks)]
  decoder = [f"level_{level}_block_{i}" for level in reversed(range(levels)) for i in range(blocks)]
  middle = ["middle_block_0", "middle_block_1"]
  upsample = [f"level_{level}_upsample" for level in reversed(range(1, levels))]
  layers = {}
  for part, residual, convolutions in (
    ("encoder", encoder + middle, ["conv_in", "conv_out"]),
    ("decoder", middle + decoder, ["conv_in", *upsample, "conv_out"]),
  ):
    layers[f"{part}/norm_out"] = f"{part}/GroupNorm_0"
    layers |= {f"{part}/{name}": f"{part}/Conv_{i}" for i, name in enumerate(convolutions)}
    for i, block in enumerate(residual):
      layers |= {f"{part}/{block}/{name}": f"{part}/ResBlock_{i}/{other}" for name, other in BLOCK.items()}
  flat = tree.flatten(params)
  found = {"quantizer/codebook": flat.pop("codebook")}
  for path, value in flat.items():
    layer, _, leaf = path.rpartition("/")
    found[f"{layers[layer]}/{leaf}"] = value
  return found
