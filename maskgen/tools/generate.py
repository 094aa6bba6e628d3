"""Writes a grid of generated images: python -m maskgen.tools.generate --model=DIR --out=FILE.png"""

from collections.abc import Sequence

from maskgen import cli
from maskgen.errors import UserError


def main(argv: Sequence[str]) -> None:
  """Parses the command line and generates."""
  parser = cli.Parser(
    "Generates images with a trained model and writes them as one grid.",
    "python -m maskgen.tools.generate --model=runs/quickstart/mage --out=digits.png --count=64",
  )
  parser.add_argument("--model", required=True, help="workdir of a run, or an export")
  parser.add_argument("--out", required=True, help="PNG file to write")
  parser.add_argument("--count", type=int, default=64, help="how many images")
  parser.add_argument("--seed", type=int, default=0, help="seed; image i depends on seed and i alone")
  parser.add_argument("--steps", type=int, help="decoding steps, by default the config's")
  parser.add_argument("--temperature", type=float, help="choice temperature, by default the config's")
  args = parser.parse_args(argv)
  cli.check_out(args.out)
  if args.count < 1:
    raise UserError(f"--count={args.count}: give at least 1")

  from maskgen import api, images

  model = api.load(args.model)
  options = {"steps": args.steps, "temperature": args.temperature}
  pictures = model.generate(
    seed=args.seed,
    batch=args.count,
    **{name: value for name, value in options.items() if value is not None},
  )
  images.write_png(args.out, images.enlarge(images.grid(pictures)))
  print(f"wrote {args.count} images to {args.out}")


if __name__ == "__main__":
  cli.run(main)
