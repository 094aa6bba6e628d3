"""Text-to-image models in one file: the same parameters as from the folder that it was made of."""

import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest
import test_text_to_image
from safetensors.numpy import load_file, save_file

from maskgen.errors import UserError
from maskgen.importers import diffusers

folders = test_text_to_image.folders
RESNET = {
  "norm1": "in_layers.0",
  "conv1": "in_layers.2",
  "time_emb_proj": "emb_layers.1",
  "norm2": "out_layers.0",
  "conv2": "out_layers.3",
  "conv_shortcut": "skip_connection",
}
OUTER = {
  "conv_in": "input_blocks.0.0",
  "conv_norm_out": "out.0",
  "conv_out": "out.2",
  "time_embedding.linear_1": "time_embed.0",
  "time_embedding.linear_2": "time_embed.2",
  "add_embedding.linear_1": "label_emb.0.0",
  "add_embedding.linear_2": "label_emb.0.2",
}
MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
  "self_attn": "attn",
  "layer_norm1": "ln_1",
  "layer_norm2": "ln_2",
  "fc1": "c_fc",
  "fc2": "c_proj",
}


def of_unet(name, layers, depths):
  """The first code's name of a tensor of diffusers' U-Net."""
  head, leaf = name.rsplit(".", 1)
  if head in OUTER:
    return f"{OUTER[head]}.{leaf}"
  if found := re.fullmatch(r"mid_block\.((?:resnets|attentions)\.\d)\.(.+)", name):
    block, rest = f"middle_block.{MIDDLE[found[1]]}", found[2]
  else:
    way, level, kind, layer, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name).groups()
    level, layer = int(level), int(layer)
    if kind == "downsamplers":
      return f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{leaf}"
    if kind == "upsamplers":
      has_attention = depths[len(depths) - 1 - level] > 0
      return f"output_blocks.{level * (layers + 1) + layers}.{1 + has_attention}.conv.{leaf}"
    number = level * (layers + 1) + layer + (way == "down")
    block = f"{'input' if way == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}"
  first, _, others = rest.partition(".")
  return f"{block}.{RESNET.get(first, first)}.{others}"


def of_vae(name, levels):
  side, _, rest = name.partition(".")
  if side not in ("encoder", "decoder"):
    return name
  if found := re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", rest):
    way, level, kind, layer, rest = found.groups()
    level = int(level) if way == "down" else levels - 1 - int(level)
    part = f"block.{layer}" if kind == "resnets" else kind.removesuffix("rs")
    rest = f"{way}.{level}.{part}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
  elif rest.startswith("mid_block.resnets."):
    number, _, rest = rest.removeprefix("mid_block.resnets.").partition(".")
    rest = f"mid.block_{int(number) + 1}.{rest}"
  elif rest.startswith("mid_block.attentions.0."):
    module, leaf = rest.removeprefix("mid_block.attentions.0.").rsplit(".", 1)
    rest = f"mid.attn_1.{VAE_ATTENTION[module]}.{leaf}"
  return f"{side}.{rest.replace('conv_norm_out', 'norm_out')}"


def of_open_clip(tensors):
  """OpenCLIP's tensors, with a last block that is not used."""
  found = {"logit_scale": np.ones((), np.float32), "text_projection": np.ones((16, 16), np.float32)}
  for name, value in tensors.items():
    if name == "text_projection.weight":
      found["text_projection"] = np.ascontiguousarray(value.T)
    elif name.startswith("encoder.layers."):
      words = name.removeprefix("encoder.layers.").split(".")
      name = ".".join(["transformer.resblocks", *(OPEN_CLIP.get(word, word) for word in words)])
      if part := re.fullmatch(r"(.+)\.([qkv])_proj\.(weight|bias)", name):
        joined = f"{part[1]}.in_proj_{part[3]}"
        found[joined] = np.concatenate([found[joined], value]) if part[2] != "q" else value
      else:
        found[name] = value
    else:
      name = name.replace("embeddings.token_embedding", "token_embedding")
      name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
      found[name.replace("final_layer_norm", "ln_final")] = value
  last = max(int(name.split(".")[2]) for name in found if "resblocks" in name)
  extra = {name: value for name, value in found.items() if f"resblocks.{last}." in name}
  return found | {name.replace(f".{last}.", f".{last + 1}.", 1): value for name, value in extra.items()}


def single(folder, model, open_clip):
  """Moves the weights of a folder's parts into one file, and returns its tensors."""
  parts = {}
  for part, stem in diffusers.STEMS.items():
    file = folder / part / f"{stem}.safetensors"
    if file.exists():
      stored = load_file(file)
      # Query before key before value, as OpenCLIP joins them.
      parts[part] = {name: stored[name] for name in sorted(stored, key=lambda name: name.replace("q_", "a_"))}
      file.unlink()
  unet, levels = model.unet, len(model.autoencoder.channels)
  found = {"model_ema.decay": np.ones(1, np.float32), "betas": np.ones(3, np.float32)}
  for name, value in parts["unet"].items():
    found[f"model.diffusion_model.{of_unet(name, unet.layers, unet.depths)}"] = value
  for name, value in parts["vae"].items():
    if ".attentions." in name and value.ndim == 2:
      value = value[:, :, None, None]
    found[f"first_stage_model.{of_vae(name, levels)}"] = value
  for i, part in enumerate(("text_encoder", "text_encoder_2")[: len(model.text_encoders)]):
    prefix = "cond_stage_model." if len(model.text_encoders) == 1 else f"conditioner.embedders.{i}."
    if open_clip[i]:
      found |= {f"{prefix}model.{name}": value for name, value in of_open_clip(parts[part]).items()}
    else:
      named = {f"{prefix}transformer.text_model.{name}": value for name, value in parts[part].items()}
      found |= named | {f"{prefix}transformer.text_model.embeddings.position_ids": np.arange(6)[None]}
  save_file(found, folder / "model.safetensors")
  return found


@pytest.mark.parametrize(
  ("name", "open_clip"), [("sd", [False]), ("sd", [True]), ("xl", [False, True])], ids=["1", "2", "xl"]
)
def test_one_file_is_read_like_a_folder(folders, tmp_path, name, open_clip):
  folder = shutil.copytree(folders / name, tmp_path / name)
  before = diffusers.load(folder)
  tensors = single(folder, before.model, open_clip)
  after = diffusers.load(folder)
  assert dataclasses.replace(after.model) == before.model
  jax.tree.map(np.testing.assert_array_equal, after.params, before.params)

  odd = "model.diffusion_model.middle_block.1.proj_in.weight"
  for change, message in (
    (
      {f"{odd}_too": np.ones(1, np.float32)},
      "has a tensor .*proj_in.weight_too' that its config does not use",
    ),
    ({odd: np.ones((3, 3), np.float32)}, r"proj_in.weight' of shape \[3, 3\] does not fit the parameter"),
  ):
    save_file(tensors | change, folder / "model.safetensors")
    with pytest.raises(UserError, match=message):
      diffusers.load(folder)
  whole = {key: value for key, value in tensors.items() if not key.startswith("first_stage_model.")}
  save_file(whole, folder / "model.safetensors")
  with pytest.raises(UserError, match="has no tensors of the part 'vae': give a whole model"):
    diffusers.load(folder)
  save_file(whole, folder / "other.safetensors")
  with pytest.raises(UserError, match="has several safetensors files and no weights in its parts"):
    diffusers.load(folder)
