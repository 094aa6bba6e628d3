"""Text-to-image models from folders in the layout of diffusers: Stable Diffusion 1.5, 2.1 and XL.

```
model_index.json                  scheduler/scheduler_config.json
tokenizer/ (tokenizer_2/)         vocab.json, merges.txt, and a JSON file with the padding
text_encoder/ (text_encoder_2/)   config.json, model.safetensors
unet/ vae/                        config.json, diffusion_pytorch_model.safetensors
```

Instead of the weights of all parts, the folder may contain one safetensors file, see `single_file`.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from maskgen import storage
from maskgen.config import build_dataclass, check_dtype, fields
from maskgen.errors import UserError, nearest
from maskgen.importers import Converted, diffusers_configs, single_file, torch_tensors
from maskgen.importers.diffusers_layouts import LAYOUTS
from maskgen.importers.published import PUBLISHED
from maskgen.models.remat import REMAT
from maskgen.models.text_to_image import TEXT_PARTS, TextToImage
from maskgen.models.vilex import FrozenTextToImage
from maskgen.numerics import text
from maskgen.numerics.text import Captions, TextTokenizer, open_text_tokenizer

FAMILIES = {
  "sd15": "Stable Diffusion 1 (one CLIP text encoder, quick-GELU)",
  "sd21": "Stable Diffusion 2 (one OpenCLIP text encoder, GELU)",
  "sdxl": "Stable Diffusion XL (two text encoders)",
}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"} | dict.fromkeys(
  TEXT_PARTS, "model"
)
# Tensors of each part that are not parameters: CLIP used to save the numbers 0 .. 76.
BUFFERS = dict.fromkeys(TEXT_PARTS, ("embeddings.position_ids",))
# The autoencoder's attentions had these names until 2023.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# The content of a JSON file, and its name in errors.
Described = tuple[Mapping[str, Any], str]


class Loaded(NamedTuple):
  """A published model.

  Attributes:
    model: its modules.
    params: numpy arrays, `{part: tree}`.
    tokenizers: one per text encoder.
  """

  model: TextToImage
  params: dict[str, Any]
  tokenizers: tuple[TextTokenizer, ...]

  def tokenize(self, texts: Sequence[str]) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The ids of texts for each text encoder, int32 [b, l], and the positions of their ends, int32 [b]."""
    ids = tuple(
      np.stack([tokenizer.pad(text, encoder.positions) for text in texts])
      for tokenizer, encoder in zip(self.tokenizers, self.model.text_encoders, strict=True)
    )
    return ids, np.argmax(ids[0] == self.tokenizers[0].end_id, axis=-1).astype(np.int32)


def load(
  folder: str | os.PathLike, *, family: str = "", param_dtype: str = "float32", **options: Any
) -> Loaded:
  """Reads a model.

  Args:
    folder: on a local disk; weights are memory-mapped, not copied twice.
    family: one of `FAMILIES`, if the model must be of this family.
    param_dtype: of all arrays except the autoencoder's; frozen networks may use bfloat16.
    **options: `dtype`, `attention`, `remat` of U-Net and text encoders; the autoencoder only gets `remat` and
      stays in float32.

  Raises:
    UserError: if it is not such a model, a part or a tensor is missing, unused or of another shape, or an
      option in its configs is not supported. Configs and tokenizers are checked before weights are read.
  """
  check_dtype(param_dtype)
  root = pathlib.Path(os.path.expanduser(folder))
  model = read_model(root, family=family, **options)
  tokenizers = read_tokenizers(epath.Path(root), model)
  single, shapes_of = _single_file(root), model.shapes()
  if single is None:
    files = {part: torch_tensors.find(root / part, STEMS[part]) for part in shapes_of}
    stored = {part: torch_tensors.open_files(found) for part, found in files.items()}
  else:
    stored = single_file.split(str(single), torch_tensors.open_files([single]), model)
  params = {
    part: torch_tensors.load(
      stored[part],
      shapes,
      f"{single}, part {part}," if single else str(root / part),
      dtype=np.dtype("float32" if part == "vae" else param_dtype),
      rename=rename,
      buffers=BUFFERS.get(part, ()),
    )
    for part, shapes in shapes_of.items()
  }
  return Loaded(model, params, tokenizers)


def _single_file(root: pathlib.Path) -> pathlib.Path | None:
  """The only safetensors file in a folder whose U-Net has no weights of its own; None if there is none.

  Raises:
    UserError: if there are several.
  """
  found = [] if any((root / "unet").glob("*.safetensors*")) else sorted(root.glob("*.safetensors"))
  if len(found) > 1:
    raise UserError(f"{root} has several safetensors files and no weights in its parts: leave one there")
  return found[0] if found else None


def read_model(folder: str | os.PathLike, *, family: str = "", **options: Any) -> TextToImage:
  """Reads the modules from the JSON files only, also from a store; arguments and errors as for `load`."""
  root = epath.Path(os.path.expanduser(folder))
  if not (root / "model_index.json").exists():
    raise UserError(f"{root} has no model_index.json: give a text-to-image model in diffusers' layout")
  index = torch_tensors.read_json(root / "model_index.json")
  # The index lists a part as [library, class], and a missing optional part as [null, null].
  texts = [part for part in TEXT_PARTS if any(index.get(part) or ())] or TEXT_PARTS[:1]
  for part in ("unet", "vae", "scheduler", *texts):
    if not (root / part).is_dir():
      raise UserError(f"{root} has no part '{part}': give the complete folder of a text-to-image model")

  def config(part: str, name: str = "config.json") -> Described:
    path = root / part / name
    return torch_tensors.read_json(path), str(path)

  zero_null = bool(index.get("force_zeros_for_empty_prompt", len(texts) > 1))
  scheduler = config("scheduler", "scheduler_config.json")
  model = _assemble(map(config, texts), config("unet"), config("vae"), scheduler, zero_null, **options)
  _check_widths(model, root)
  if family:
    check_family(model, family, root)
  return model


def published_model(family: str, **options: Any) -> TextToImage:
  """The modules of a published model, without its folder; arguments as for `load`."""
  layout = LAYOUTS[family]
  texts = [(text, f"text encoder {i} of {family}") for i, text in enumerate(layout.text_encoders)]
  unet, vae, scheduler = (
    (getattr(layout, part), f"{part} of {family}") for part in ("unet", "vae", "scheduler")
  )
  return _assemble(texts, unet, vae, scheduler, len(texts) > 1, **options)


def read_tokenizers(root: epath.Path, model: TextToImage) -> tuple[TextTokenizer, ...]:
  """Reads the tokenizer of each text encoder; errors as for `load`."""
  parts = TEXT_PARTS[: len(model.text_encoders)]
  tokenizers = tuple(_tokenizer(root / part.replace("text_encoder", "tokenizer")) for part in parts)
  for part, encoder, tokenizer in zip(parts, model.text_encoders, tokenizers, strict=True):
    if tokenizer.vocabulary_size > encoder.vocabulary_size:
      raise UserError(
        f"{root}: the tokenizer of {part} has {tokenizer.vocabulary_size} ids, but the encoder embeds "
        f"{encoder.vocabulary_size}: give tokenizer and encoder of the same model"
      )
  return tokenizers


def local_files(folder: str | os.PathLike) -> fields.Files:
  """The files of a folder from which `Folder` is built, and its licence."""
  root = epath.Path(os.path.expanduser(folder))
  configs = [f"{part}/config.json" for part in ("unet", "vae", *TEXT_PARTS)]
  names = ["model_index.json", "scheduler/scheduler_config.json", *configs]
  for part in ("tokenizer", "tokenizer_2"):
    found = text.local_files(f"bpe:{root / part}") if (root / part).is_dir() else None
    names += [f"{part}/{name}" for name in found.names] if found else []
  names += [file.name for file in root.glob("LICENSE*") if file.is_file()]
  return fields.Files(str(folder), tuple(name for name in names if (root / name).exists()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder:
  """A model in a config; the folder's JSON files and tokenizers are read whenever it is used.

  Attributes:
    folder: with these files; its weights are not read. Without a folder, the model has the sizes of the
      published `family` and cannot read captions, which is enough to estimate a step.
    family: one of `FAMILIES`, if the model must be of this family.
    image_size: (h, w) of the images to generate.
    clean_text: whether texts are cleaned as for CLIP's training, see `numerics.text.BytePairTokenizer`.
    param_dtype: of all frozen parameters except the autoencoder's, which are float32.
    dtype, attention, remat: how it is run, see `load`.
  """

  folder: str = fields.local_files("", find=local_files)
  family: str = ""
  image_size: tuple[int, int]
  clean_text: bool = False
  param_dtype: str = fields.precision("float32")
  dtype: str = fields.precision("float32")
  attention: str = fields.operational("auto", plain="xla")
  remat: str = fields.operational("none", less_memory=REMAT[1:])

  def __post_init__(self):
    check_dtype(self.param_dtype)
    if self.family not in ("", *FAMILIES):
      raise UserError(f"family '{self.family}' does not exist{nearest(self.family, FAMILIES)}")
    if not (self.folder or self.family):
      raise UserError("give the folder of a text-to-image model, or the family of one")

  @property
  def root(self) -> epath.Path:
    """The path of the folder."""
    return epath.Path(os.path.expanduser(self.folder or self.family))


def read_frozen(section: Mapping[str, Any]) -> tuple[FrozenTextToImage, Captions]:
  """The model of a config section with name="diffusers", and the tokenizer of its captions.

  Raises:
    UserError: for a wrong section, or as for `load`.
  """
  options = {key: value for key, value in section.items() if key != "name"}
  return frozen(build_dataclass(Folder, options, "config.objective.decoder"))


def frozen(given: Folder) -> tuple[FrozenTextToImage, Captions]:
  """The model of a folder, and the tokenizer of its captions; errors as for `load`."""
  how = dict(dtype=given.dtype, attention=given.attention, remat=given.remat)
  if given.folder:
    model = read_model(given.root, family=given.family, **how)
    tokenizers = read_tokenizers(given.root, model)
    first, paddings = tokenizers[0], tuple(one.padding_id for one in tokenizers)
    start_id, end_id = first.start_id, first.end_id
  else:
    model, layout = published_model(given.family, **how), LAYOUTS[given.family]
    start_id, end_id, paddings = layout.start_id, layout.end_id, layout.padding_ids
  check_image_size(model, given.image_size)
  length = model.text_encoders[0].positions
  kind = text.CLEAN_BYTE_PAIRS if given.clean_text else text.BYTE_PAIRS
  captions = Captions(text_tokenizer=f"{kind}:{given.root / 'tokenizer'}", length=length)
  ids = (start_id, end_id, paddings)
  return FrozenTextToImage(model, given.image_size, length, *ids, given.param_dtype), captions


def check_image_size(model: TextToImage, size: tuple[int, ...]) -> None:
  """Checks the (height, width) of images that a model is to generate.

  Raises:
    UserError: if the U-Net cannot halve the latents of this size as often as it must.
  """
  side = model.autoencoder.factor * model.unet.factor
  if len(size) != 2 or any(length < 1 or length % side for length in size):
    raise UserError(f"image_size is {size}: give (height, width), multiples of {side}")


def section_of(path: str | os.PathLike, family: str) -> dict[str, Any]:
  """The fields of `Folder` that say which model this is, for `config.objective.decoder`.

  Args:
    path: the output of `maskgen.tools.convert`, or a name in `PUBLISHED`, whose folder is "".
    family: its family, one of `FAMILIES`.

  Raises:
    UserError: if it is not such a model.
  """
  root = epath.Path(os.path.expanduser(path))
  section = dict(name="diffusers", folder="", family=family, image_size=LAYOUTS[family].image_size)
  if str(path) in PUBLISHED and not root.exists():
    return section
  if (root / "model_index.json").exists():
    read_model(root, family=family)
    raise UserError(
      f"{path} is a folder of diffusers: convert it with maskgen.tools.convert --format=diffusers "
      f"--weights={path} --out=DIR, and give DIR"
    )
  own = storage.find_section(str(path))  # of a run that continues: the folder may be gone
  converted = own or storage.load_config(root).get("decoder", {})
  if converted.get("name") != "diffusers":
    raise UserError(
      f"{path} is not a text-to-image model from maskgen.tools.convert --format=diffusers: give one"
    )
  if not own:
    check_family(read_model(converted["folder"]), family, path)
  return section | {key: converted[key] for key in ("folder", "image_size")}


def convert(path: str | os.PathLike) -> Converted:
  """Converts a folder, to generate with or `config.pretrained.decoder` of ViLex; raises as `load` does."""
  root = pathlib.Path(os.path.expanduser(path)).absolute()
  loaded = load(root)
  side = torch_tensors.read_json(root / "unet" / "config.json").get("sample_size") or 64
  size = (side * loaded.model.autoencoder.factor,) * 2
  section = dict(name="diffusers", folder=str(root), image_size=size)
  config = {"network": "text_to_image", "decoder": section}
  return Converted(config, {"params": {"main": loaded.params}}, local_files={str(root): local_files(root)})


def family_of(model: TextToImage) -> str:
  """The key in `FAMILIES` of a model of any size."""
  if len(model.text_encoders) > 1:
    return "sdxl"
  return "sd15" if model.text_encoders[0].activation == "quick_gelu" else "sd21"


def check_family(model: TextToImage, family: str, what: Any) -> None:
  """Checks that a model is of a family.

  Raises:
    UserError: if it is of another family, or the family does not exist.
  """
  if family not in FAMILIES:
    raise UserError(f"family '{family}' does not exist{nearest(family, FAMILIES)}")
  found = family_of(model)
  if found != family:
    raise UserError(
      f"{what} is {FAMILIES[found]} with text of width {' and '.join(map(str, model.text_widths))}, but "
      f"{FAMILIES[family]} is needed: give its folder"
    )


def rename(name: str) -> str:
  """The current name of a tensor: without `text_model.`, and with attentions as in `to_q`."""
  name = name.removeprefix("text_model.")
  return re.sub(
    r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{_OLD_NAMES[m[2]]}.", name
  )


def _assemble(
  texts: Iterable[Described],
  unet: Described,
  vae: Described,
  scheduler: Described,
  zero_null: bool,
  **options: Any,
) -> TextToImage:
  remat = {key: value for key, value in options.items() if key == "remat"}
  return TextToImage(
    text_encoders=tuple(diffusers_configs.text_encoder(*text, **options) for text in texts),
    unet=diffusers_configs.unet(*unet, **options),
    autoencoder=diffusers_configs.autoencoder(*vae, **remat),
    schedule=diffusers_configs.schedule(*scheduler),
    zero_null=zero_null,
  )


def _check_widths(model: TextToImage, root: epath.Path) -> None:
  widths, unet = model.text_widths, model.unet
  if sum(widths) != unet.context_width:
    raise UserError(
      f"{root}: text of width {' and '.join(map(str, widths))} does not fit a U-Net for "
      f"{unet.context_width}: give parts of the same model"
    )
  pooled = model.text_encoders[-1].pooled_width
  if bool(unet.pooled_width) != (len(widths) > 1) or (unet.pooled_width and pooled != unet.pooled_width):
    raise UserError(
      f"{root}: {len(widths)} text encoders, the last pooling to {pooled}, do not fit a U-Net for a pooled "
      f"text of {unet.pooled_width}: give parts of the same model"
    )
  if not unet.in_channels == unet.out_channels == model.autoencoder.latent_channels:
    raise UserError(
      f"{root}: the U-Net has {unet.in_channels} input and {unet.out_channels} output channels, latents have "
      f"{model.autoencoder.latent_channels}: give a plain text-to-image model, not one for inpainting"
    )


def _tokenizer(folder: epath.Path) -> TextTokenizer:
  if not folder.is_dir():
    raise UserError(f"{folder} is missing: give the complete folder of a text-to-image model")
  return open_text_tokenizer(f"bpe:{folder}")
