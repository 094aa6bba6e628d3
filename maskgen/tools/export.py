"""Writes a run's model as safetensors: python -m maskgen.tools.export --model=DIR --out=DIR"""

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from maskgen import cli, files
from maskgen.errors import UserError

if TYPE_CHECKING:
  import maskgen

# Formats of an image encoder alone, and the modules of maskgen.importers that write them.
ENCODERS = {"siglip": "siglip", "timm": "timm", "transformers": "vit"}
FORMATS = ("maskgen", "mage", *ENCODERS)
NPZ = ".npz"


def main(argv: Sequence[str]) -> None:
  """Parses the command line and exports."""
  parser = cli.Parser(
    "Exports a trained model for maskgen.load: weights.safetensors (with moving averages in place of "
    "parameters, and frozen parts) and config.json. With --format=mage, writes one safetensors file with the "
    "parameter names of MAGE's PyTorch reference. With --format=timm or transformers, writes the image "
    "encoder alone, as a folder that these open; with siglip, likewise, or an .npz file of big_vision (see "
    "docs/weights.md).",
    "python -m maskgen.tools.export --model=runs/quickstart/mage --out=exports/digits",
  )
  parser.add_model("workdir of a run, or an export")
  parser.add_argument(
    "--out", required=True, help="new folder; mage: a .safetensors file; siglip: or an .npz file"
  )
  parser.add_argument("--format", default="maskgen", choices=FORMATS, help="parameter names, default maskgen")
  parser.add_argument(
    "--dtype",
    default="float32",
    choices=files.DTYPES,
    help="dtype of float32 parameters in the file; float16 halves its size, int8 quarters it",
  )
  args = parser.parse_args(argv)
  if args.format != "maskgen" and args.dtype != "float32":
    raise UserError(f"--dtype={args.dtype}: --format={args.format} writes float32, leave --dtype out")
  if args.format == "mage" or (args.format == "siglip" and args.out.endswith(NPZ)):
    cli.check_out(args.out, kind=NPZ if args.format == "siglip" else ".safetensors")
    if epath.Path(args.out).exists():
      raise UserError(f"--out={args.out} exists: give the name of a new file")
  else:
    cli.check_out_folder(args.out, new=True)

  import maskgen
  from maskgen import tree

  model = maskgen.load(args.model)
  if "objective" not in model.config:
    raise UserError(f"--model={args.model} is a published model without training: copy its folder instead")
  if args.format == "mage":
    written = _write_reference(model, args.model, args.out)
  elif args.format in ENCODERS:
    written = _write_encoder(model, args.model, args.out, args.format)
  else:
    written = model.variables
    model.save(args.out, dtype=args.dtype)
  print(f"wrote {tree.count(written):,} parameters to {args.out}")


def _write_reference(model: "maskgen.Model", path: str, out: str) -> Mapping[str, Any]:
  """Writes a model with the reference's parameter names and returns the tensors."""
  import safetensors.numpy

  from maskgen import storage
  from maskgen.importers import mage

  objective: Any = model.objective
  name = model.config["objective"]["name"]
  if name != "mage":
    raise UserError(f"{path} is a model of objective '{name}': --format=mage needs one of objective 'mage'")
  mage.check_expressible(objective.tokenizer, objective.grid, objective.model)
  params = {"main": model.variables["params"]["main"], "tokenizer": model.variables["frozen"]["tokenizer"]}
  tensors = storage.to_host(mage.to_reference(params, objective.model, objective.tokenizer))
  files.replace(epath.Path(out), safetensors.numpy.save(tensors, {"format": "pt"}))
  return tensors


def _write_encoder(model: "maskgen.Model", path: str, out: str, form: str) -> Mapping[str, Any]:
  """Writes a model's image encoder for other programs and returns the tensors."""
  from maskgen.importers import timm
  from maskgen.models.image_encoder import MageEncoder
  from maskgen.models.vit import ViT

  part: Any = getattr(model.objective, "image_encoder", None)
  encoder = None if part is None else part.encoder
  if isinstance(encoder, MageEncoder) and form == "timm":
    params = part.split(model.variables)[0]
    return timm.write_mage(out, encoder.network, encoder.positions.grid, params)
  if encoder is None or type(encoder.network) is not ViT or not encoder.pixels:
    raise UserError(
      f"{path} is a model of objective '{model.kind}' without a ViT on pixels: --format={form} needs a model "
      "with one, such as MAE or ViLex; timm also takes a MAGE"
    )
  params, shapes = (part.split(variables)[0] for variables in (model.variables, part.shapes()))
  writer = importlib.import_module(f"maskgen.importers.{ENCODERS[form]}")
  written: Mapping[str, Any] = writer.write(out, encoder.network, {name: params[name] for name in shapes})
  return written


if __name__ == "__main__":
  cli.run(main)
