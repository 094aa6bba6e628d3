"""Writes a run's model as safetensors and JSON: python -m maskgen.tools.export --model=DIR --out=DIR"""

from collections.abc import Sequence

from maskgen import cli


def main(argv: Sequence[str]) -> None:
  """Parses the command line and exports."""
  parser = cli.Parser(
    "Exports a trained model: weights.safetensors (averages in place, frozen parts included) and "
    "config.json, all that maskgen.load needs.",
    "python -m maskgen.tools.export --model=runs/quickstart/mage --out=exports/digits",
  )
  parser.add_argument("--model", required=True, help="workdir of a run")
  parser.add_argument("--out", required=True, help="new folder")
  args = parser.parse_args(argv)

  from maskgen import __version__, api, checkpoint, tree

  model = api.load(args.model)
  config = {"objective": model.config["objective"], "version": __version__}
  checkpoint.write_export(args.out, config, model.variables)
  print(f"wrote {tree.count(model.variables):,} parameters to {args.out}")


if __name__ == "__main__":
  cli.run(main)
