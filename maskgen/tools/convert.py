"""Converts other people's weights: python -m maskgen.tools.convert --format=F --weights=FILE --out=DIR"""

import importlib
from collections.abc import Sequence

from maskgen import cli

FORMATS = ("mobilenet_v2",)


def main(argv: Sequence[str]) -> None:
  """Parses the command line and converts."""
  parser = cli.Parser(
    "Converts a weights file of another project to a folder that config.pretrained can name. "
    "mobilenet_v2: an .npz of quantized convolutions, the feature network of the perceptual loss.",
    "python -m maskgen.tools.convert --format=mobilenet_v2 --weights=mobilenet_v2_1.0_224_u8.npz "
    "--out=weights/mobilenet_v2",
  )
  parser.add_argument("--format", required=True, choices=FORMATS, help="what the file holds")
  parser.add_argument("--weights", required=True, help="the weights file")
  parser.add_argument("--out", required=True, help="new folder")
  args = parser.parse_args(argv)

  from maskgen import __version__, checkpoint, tree

  params = importlib.import_module(f"maskgen.importers.{args.format}").load(args.weights)
  config = {"network": args.format, "version": __version__}
  checkpoint.write_export(args.out, config, {"params": {"main": params}})
  print(f"wrote {tree.count(params):,} parameters to {args.out}")


if __name__ == "__main__":
  cli.run(main)
