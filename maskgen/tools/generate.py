"""Writes a grid of generated images: python -m maskgen.tools.generate --model=DIR --out=FILE.png"""

from collections.abc import Sequence

from maskgen import cli
from maskgen.errors import UserError


def main(argv: Sequence[str]) -> None:
  """Parses the command line and generates."""
  parser = cli.Parser(
    "Generates images with a trained model and writes them as one grid; with several classes a row for each.",
    "python -m maskgen.tools.generate --model=runs/quickstart/mage --out=digits.png --count=64",
  )
  parser.add_argument("--model", required=True, help="workdir of a run, or an export")
  parser.add_argument("--out", required=True, help="PNG file to write")
  parser.add_argument("--count", type=int, default=64, help="how many images")
  parser.add_argument("--seed", type=int, default=0, help="seed; image i depends on seed and i alone")
  parser.add_argument("--steps", type=int, help="decoding steps, by default the config's")
  parser.add_argument("--temperature", type=float, help="choice temperature, by default the config's")
  parser.add_argument("--label", help="class ids, such as 3 or 0,4,7 or all, if it was trained with classes")
  parser.add_argument("--guidance", type=float, help="how much the class counts, by default the config's")
  parser.add_argument("--guidance_schedule", help="how guidance grows, by default the config's")
  args = parser.parse_args(argv)
  cli.check_out(args.out)
  if args.count < 1:
    raise UserError(f"--count={args.count}: give at least 1")

  from maskgen import api, images

  model = api.load(args.model)
  options = {name: getattr(args, name) for name in ("steps", "temperature", "guidance", "guidance_schedule")}
  labels = columns = None
  if args.label is not None:
    classes = parse_labels(args.label, model.objective.num_classes)
    each = max(args.count // len(classes), 1)
    labels = [label for label in classes for _ in range(each)]
    columns = each if len(classes) > 1 else None
  pictures = model.generate(
    seed=args.seed,
    batch=args.count if labels is None else None,
    label=labels,
    **{name: value for name, value in options.items() if value is not None},
  )
  images.write_png(args.out, images.enlarge(images.grid(pictures, columns)))
  print(f"wrote {len(pictures)} images to {args.out}")


def parse_labels(text: str, num_classes: int) -> list[int]:
  """The class ids of `--label`.

  Raises:
    UserError: if it is neither "all" nor a list of whole numbers, or the model has no classes.
  """
  if not num_classes:
    raise UserError(f"--label={text}: this model was trained without classes, leave it out")
  if text == "all":
    return list(range(num_classes))
  try:
    return [int(part) for part in text.split(",")]
  except ValueError:
    raise UserError(f"--label={text}: give class ids such as 3 or 0,4,7, or all") from None


if __name__ == "__main__":
  cli.run(main)
