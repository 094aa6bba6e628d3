"""Vision transformers of timm, from and to the folders that it keeps on the Hugging Face Hub.

The encoder of a MAGE becomes one whose embedding of patches is a table of codes.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from etils import epath

from maskgen import tree
from maskgen.errors import UserError
from maskgen.importers import Converted, mage, tensors, towers, written_towers
from maskgen.models.mage import Encoder
from maskgen.models.vit import ViT

# Head counts of the published models Ti, S, B, L, H, g and G by width.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
LAYERS = {"patch_embedding": "patch_embed.proj", "input_norm": "norm_pre", "encoder_norm": "norm"}
HEAD = {
  "attention/query": "q",
  "attention/out": "proj",
  "norm": "norm",
  "mlp/up": "mlp.fc1",
  "mlp/down": "mlp.fc2",
}
SCALES = {"attention_scale": "ls1.gamma", "mlp_scale": "ls2.gamma"}
POOLING = {"class": "token", "mean": "avg", "attention": "map"}
# Beginnings of the names of a network's tensors.
USED = ("blocks.", "patch_embed.", "norm", "fc_norm.", "attn_pool.", "cls_token", "reg_token")
# A name of timm whose settings are those of `infer` unless config.json has others. Our sizes replace its own.
_PLAIN, _ARCHITECTURE = r"vit_[a-z]+_patch\d+_\d+", "vit_base_patch16_224"


def convert(path: epath.PathLike, encoder_heads: int | None = None) -> Converted:
  """Converts an image encoder.

  Args:
    path: of a folder, or of its file of tensors alone.
    encoder_heads: the number of heads, by default that of config.json or the published models.

  Raises:
    UserError: if the tensors are those of another network, see `towers.take` and `towers.settle`.
  """
  stored = towers.read(path)
  architecture = stored.config.get("architecture", _ARCHITECTURE)
  if not re.fullmatch(_PLAIN, architecture):
    raise UserError(
      f"{path} is timm's {architecture}: this format reads those with a name like {_ARCHITECTURE}"
    )
  section = infer(stored, encoder_heads)
  model, params, unused = towers.take(stored, section, to_timm, USED, ("head.", "pos_embed"))
  return towers.export(model, section, params, unused)


def infer(stored: towers.Stored, heads: int | None) -> dict[str, Any]:
  """The fields of `ViT`.

  Raises:
    UserError: as `towers.settle`, or if patches form neither a square nor the grid of config.json.
  """
  found, need = stored.tensors, functools.partial(tensors.need, stored.path, stored.tensors)
  args, pixels = (stored.config.get(name, {}) for name in ("model_args", "pretrained_cfg"))
  width, _, patch, _ = need("patch_embed.proj.weight", 4).shape
  leading, table = int("cls_token" in found), need("pos_embed", 3)[0]
  size = args.get("img_size")
  if not isinstance(size, list):
    size = towers.side_of(stored.path, len(table) - leading, patch)
  section: dict[str, Any] = dict(
    image_size=tuple(size),
    patch=patch,
    width=width,
    depth=tensors.count(found, r"blocks\.(\d+)\."),
    hidden=need("blocks.0.mlp.fc1.weight", 2).shape[0],
    pooling="class" if leading else "attention" if "attn_pool.latent" in found else "mean",
    activation=args.get("act_layer", "gelu"),
    fixed_positions=bool(leading) and towers.is_fixed(table, (size[0] // patch, size[1] // patch)),
  )
  optional = dict(
    layer_scale="blocks.0.ls1.gamma" in found,
    embedding_norm="norm_pre.weight" in found,
    patch_bias="patch_embed.proj.bias" in found,
    **{name: tuple(pixels[name]) for name in ("mean", "std") if name in pixels},
  )
  section |= {name: value for name, value in optional.items() if value != getattr(ViT, name)}
  return towers.settle(stored, section, heads or args.get("num_heads"), HEADS)


def to_timm(params: Any, model: ViT) -> dict[str, Any]:
  """Renames our parameters to timm's names and PyTorch's layout, without fixed positions."""
  flat, found, layers = tree.flatten(params), {}, dict(LAYERS)
  if model.leading:
    found["cls_token"] = flat.pop("class_token")[None]
  if "position" in flat:
    found["pos_embed"] = flat.pop("position")[None]
  blocks = {f"encoder/block_{i}": f"blocks.{i}" for i in range(model.depth)}
  if model.layer_scale:
    for block, theirs in blocks.items():
      found |= {f"{theirs}.{other}": flat.pop(f"{block}/{name}") for name, other in SCALES.items()}
  if model.pooling == "attention":
    layers |= {f"attention_head/{ours}": f"attn_pool.{name}" for ours, name in HEAD.items()}
    found["attn_pool.latent"] = flat.pop("attention_head/probe")[None]
    joined = towers.join(flat, "attention_head/attention", ("key", "value"))
    flat |= {f"attention_head/kv/{leaf}": joined[f"joined/{leaf}"] for leaf in ("kernel", "bias")}
    layers["attention_head/kv"] = "attn_pool.kv"
  return found | mage.rename_blocks(flat, layers, blocks)


def write(path: epath.PathLike, model: ViT, params: Any) -> tensors.Tensors:
  """Writes an image encoder as a folder for `timm.create_model("local-dir:PATH", pretrained=True)`.

  Returns:
    The tensors, float32.

  Raises:
    UserError: if timm's code would compute something else.
  """
  fixed = dict(epsilon=1e-6, registers=0, patch_bias=not model.embedding_norm)
  fixed |= {} if model.leading else dict(fixed_positions=False)
  written_towers.check_expressible(model, "timm", fixed)
  named = to_timm(params, model)
  if model.fixed_positions:
    named["pos_embed"] = towers.fixed_table(model.grid, model.width)[None]
  args = dict(
    img_size=model.image_size,
    patch_size=model.patch,
    in_chans=model.channels,
    class_token=bool(model.leading),
    act_layer=model.activation,
    init_values=1.0 if model.layer_scale else None,
    pre_norm=model.embedding_norm,
  )
  return _write(path, named, model, model.hidden or 4 * model.width, POOLING[model.pooling], args)


def write_mage(path: epath.PathLike, network: Encoder, grid: tuple[int, int], params: Any) -> tensors.Tensors:
  """Writes the encoder of a MAGE, whose input are codes; see docs/weights.md.

  Row c of the tensor `patch_embed.weight`, [codebook + 1, d], embeds the code c, the last row [MASK]. Images
  are grids of codes with patches of one code. What timm pools equals `Encoder.pool`; the final normalisation,
  which is not part of that, is not written.

  Args:
    path: of a new folder.
    network: the encoder.
    grid: the token grid (h', w').
    params: its parameters, and maybe others.

  Returns:
    The tensors, float32.

  Raises:
    UserError: if timm's code would compute something else.
  """
  if network.fixed_grid is not None:
    raise UserError("timm has no encoder with two kinds of positions: export with --format=maskgen instead")
  known = ("embedding_norm/", "encoder/")
  flat = {name: value for name, value in tree.flatten(params).items() if name.startswith(known)}
  blocks = {f"encoder/block_{i}": f"blocks.{i}" for i in range(network.depth)}
  table, vocab = params["embedding"], network.vocab
  named = {
    "patch_embed.weight": jnp.concatenate([table[: vocab.codebook], table[vocab.mask_id][None]]),
    "cls_token": table[vocab.null_class_id][None, None],
    "pos_embed": params["position"][None],
    **mage.rename_blocks(flat, {"embedding_norm": "norm_pre"}, blocks),
  }
  args = dict(img_size=grid, patch_size=1, in_chans=3, act_layer="gelu", pre_norm=True, final_norm=False)
  return _write(path, named, network, 4 * network.width, "avg", args)


def _write(
  path: epath.PathLike,
  named: Mapping[str, Any],
  network: Any,
  hidden: int,
  pooling: str,
  args: Mapping[str, Any],
) -> tensors.Tensors:
  width = network.width
  sizes = dict(
    embed_dim=width,
    depth=network.depth,
    num_heads=network.heads,
    # timm rounds the product of both down.
    mlp_ratio=hidden / width if hidden % width == 0 else (hidden + 0.5) / width,
    global_pool=pooling,
    fc_norm=False,
  )
  pixels = dict(
    input_size=(args["in_chans"], *args["img_size"]),
    fixed_input_size=True,
    interpolation="bicubic",
    crop_pct=1.0,
    num_classes=0,
    first_conv="patch_embed.proj",
    classifier="head",
    **{name: getattr(network, name) for name in ("mean", "std") if hasattr(network, name)},
  )
  config = dict(
    architecture=_ARCHITECTURE,
    num_classes=0,
    num_features=width,
    global_pool=pooling,
    model_args={**args, **sizes},
    pretrained_cfg=pixels,
  )
  return written_towers.write_folder(path, named, {towers.CONFIG: config})
