"""Writes a run's model as safetensors: python -m maskgen.tools.export --model=DIR --out=DIR"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from maskgen import cli
from maskgen.errors import UserError

if TYPE_CHECKING:
  import maskgen

FORMATS = ("maskgen", "mage", "siglip")
NPZ = ".npz"
DTYPES = ("float32", "float16")


def main(argv: Sequence[str]) -> None:
  """Parses the command line and exports."""
  parser = cli.Parser(
    "Exports a trained model for maskgen.load: weights.safetensors (with moving averages in place of "
    "parameters, and frozen parts) and config.json. With --format=mage, writes one safetensors file with the "
    "parameter names of MAGE's PyTorch reference. With --format=siglip, writes the image encoder alone, as a "
    "folder of transformers or an .npz file of big_vision (see docs/weights.md).",
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
    choices=DTYPES,
    help="dtype of float32 parameters in the file; float16 halves its size and rounds",
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
  elif args.format == "siglip":
    written = _write_siglip(model, args.model, args.out)
  else:
    written = model.variables
    model.save(args.out, half=args.dtype == "float16")
  print(f"wrote {tree.count(written):,} parameters to {args.out}")


def _write_reference(model: "maskgen.Model", path: str, out: str) -> Mapping[str, Any]:
  """Writes a model with the reference's parameter names and returns the tensors."""
  import safetensors.numpy

  from maskgen import files, storage
  from maskgen.importers import mage

  objective: Any = model.objective
  name = model.config["objective"]["name"]
  if name != "mage":
    raise UserError(f"{path} is a model of objective '{name}': --format=mage needs one of objective 'mage'")
  mage.check_expressible(objective.tokenizer, objective.grid)
  params = {"main": model.variables["params"]["main"], "tokenizer": model.variables["frozen"]["tokenizer"]}
  tensors = storage.to_host(mage.to_reference(params, objective.model, objective.tokenizer))
  files.replace(epath.Path(out), safetensors.numpy.save(tensors, {"format": "pt"}))
  return tensors


def _write_siglip(model: "maskgen.Model", path: str, out: str) -> Mapping[str, Any]:
  """Writes a model's image encoder for other programs and returns the tensors."""
  from maskgen.importers import siglip
  from maskgen.models.vit import ViT

  part = getattr(model.objective, "image_encoder", None)
  if part is None or type(part.encoder.network) is not ViT:
    raise UserError(
      f"{path} is a model of objective '{model.kind}' without a ViT on pixels: --format=siglip needs a model "
      "with one, such as ViLex"
    )
  params, shapes = (part.split(variables)[0] for variables in (model.variables, part.shapes()))
  return siglip.write(out, part.encoder.network, {name: params[name] for name in shapes})


if __name__ == "__main__":
  cli.run(main)
