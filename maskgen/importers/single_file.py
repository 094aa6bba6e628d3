"""Text-to-image models in one safetensors file, with the names of Stable Diffusion's first code.

The U-Net's tensors begin with `model.diffusion_model.`, the autoencoder's with `first_stage_model.`, those of
text encoders with `cond_stage_model.` or, in XL, `conditioner.embedders.`. Stable Diffusion 2 and the second
text encoder of XL have OpenCLIP's names.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

import numpy as np

from maskgen.errors import UserError
from maskgen.importers.torch_tensors import Tensor
from maskgen.models.text_to_image import TEXT_PARTS, TextToImage

UNET, AUTOENCODER = "model.diffusion_model.", "first_stage_model."
_UNET = {
  "time_embed.0": "time_embedding.linear_1",
  "time_embed.2": "time_embedding.linear_2",
  "label_emb.0.0": "add_embedding.linear_1",
  "label_emb.0.2": "add_embedding.linear_2",
  "input_blocks.0.0": "conv_in",
  "middle_block.0": "mid_block.resnets.0",
  "middle_block.1": "mid_block.attentions.0",
  "middle_block.2": "mid_block.resnets.1",
  "out.0": "conv_norm_out",
  "out.2": "conv_out",
}
_RESNET = {
  "in_layers.0": "norm1",
  "in_layers.2": "conv1",
  "emb_layers.1": "time_emb_proj",
  "out_layers.0": "norm2",
  "out_layers.3": "conv2",
  "skip_connection": "conv_shortcut",
}
_AUTOENCODER = {
  "mid.block_1": "mid_block.resnets.0",
  "mid.block_2": "mid_block.resnets.1",
  "mid.attn_1": "mid_block.attentions.0",
  "norm_out": "conv_norm_out",
  "nin_shortcut": "conv_shortcut",
  "downsample": "downsamplers.0",
  "upsample": "upsamplers.0",
}
_AUTOENCODER_ATTENTION = {
  "norm": "group_norm",
  "q": "to_q",
  "k": "to_k",
  "v": "to_v",
  "proj_out": "to_out.0",
}
_OPEN_CLIP = {
  "token_embedding": "embeddings.token_embedding",
  "positional_embedding": "embeddings.position_embedding.weight",
  "transformer.resblocks": "encoder.layers",
  "ln_1": "layer_norm1",
  "ln_2": "layer_norm2",
  "ln_final": "final_layer_norm",
  "attn.out_proj": "self_attn.out_proj",
  "mlp.c_fc": "mlp.fc1",
  "mlp.c_proj": "mlp.fc2",
}


def split(what: str, stored: Mapping[str, Tensor], model: TextToImage) -> dict[str, dict[str, Tensor]]:
  """The tensors of each part of a model, by diffusers' names; others, such as averages, are left out.

  Args:
    what: names the file in errors.
    stored: its tensors.
    model: the modules, which decide how many blocks a level has.

  Raises:
    UserError: if a part has no tensors.
  """
  parts = {"unet": _part(stored, UNET, functools.partial(_unet, layers=model.unet.layers))}
  levels = len(model.autoencoder.channels)
  parts["vae"] = _part(stored, AUTOENCODER, functools.partial(_autoencoder, levels=levels))
  for i, (part, encoder) in enumerate(zip(TEXT_PARTS, model.text_encoders, strict=False)):
    prefix = "cond_stage_model." if len(model.text_encoders) == 1 else f"conditioner.embedders.{i}."
    parts[part] = _part(stored, f"{prefix}transformer.", str)
    if not parts[part]:
      tensors = _without_unused(_part(stored, f"{prefix}model.", str), encoder.depth, encoder.projection)
      parts[part] = _open_clip(tensors, encoder.width)
  for part, tensors in parts.items():
    if not tensors:
      raise UserError(f"{what} has no tensors of the part '{part}': give a whole model, or one for each part")
  return parts


def _part(stored: Mapping[str, Tensor], prefix: str, rename: Callable[[str], str]) -> dict[str, Tensor]:
  names = (name.removeprefix(prefix) for name in stored if name.startswith(prefix))
  return {rename(name): stored[f"{prefix}{name}"] for name in names}


def _replace(name: str, table: Mapping[str, str]) -> str:
  """Replaces names of modules by others."""
  for old, new in table.items():
    name = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", name, count=1)
  return name


def _unet(name: str, layers: int) -> str:
  found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", name)
  if found and name[:16] != "input_blocks.0.0":
    number, module, rest = int(found[2]), found[3], found[4]
    level, layer = divmod(number - (found[1] == "input"), layers + 1)
    block = f"{'down' if found[1] == 'input' else 'up'}_blocks.{level}"
    if rest.startswith("op."):
      return f"{block}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    if rest.startswith("conv."):
      return f"{block}.upsamplers.0.{rest}"
    name = f"{block}.{'attentions' if module == '1' else 'resnets'}.{layer}.{rest}"
  return _replace(_replace(name, _UNET), _RESNET)


def _autoencoder(name: str, levels: int) -> str:
  if ".attn_1." in name:
    name = _replace(name, _AUTOENCODER_ATTENTION)
  name = re.sub(r"\bdown\.(\d+)\.", r"down_blocks.\1.", name)
  name = re.sub(r"\bup\.(\d+)\.", lambda found: f"up_blocks.{levels - 1 - int(found[1])}.", name)
  return _replace(re.sub(r"\.block\.", ".resnets.", name), _AUTOENCODER)


def _without_unused(stored: Mapping[str, Tensor], depth: int, projection: int) -> dict[str, Tensor]:
  """Without what diffusers leaves out: the block behind the last one that is read, and a projection."""
  unused = (f"transformer.resblocks.{depth}.", "logit_scale", *(() if projection else ("text_projection",)))
  return {name: tensor for name, tensor in stored.items() if not name.startswith(unused)}


def _open_clip(stored: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
  """OpenCLIP's text encoder, whose projections to queries, keys and values are one tensor."""
  found = {}
  for name, tensor in stored.items():
    new = _replace(name, _OPEN_CLIP)
    if name == "text_projection":
      read = functools.partial(_transposed, tensor)
      found["text_projection.weight"] = dataclasses.replace(tensor, shape=tensor.shape[::-1], read=read)
    elif joined := re.fullmatch(r"(.+)\.attn\.in_proj_(weight|bias)", new):
      for i, kind in enumerate("qkv"):
        read = functools.partial(_rows, tensor, i * width, (i + 1) * width)
        piece = dataclasses.replace(tensor, shape=(tensor.shape[0] // 3, *tensor.shape[1:]), read=read)
        found[f"{joined[1]}.self_attn.{kind}_proj.{joined[2]}"] = piece
    else:
      found[new] = tensor
  return found


def _transposed(tensor: Tensor) -> np.ndarray:
  return tensor.read().T


def _rows(tensor: Tensor, start: int, stop: int) -> np.ndarray:
  return tensor.read()[start:stop]
