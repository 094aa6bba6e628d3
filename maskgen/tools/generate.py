"""Writes a grid of generated images: python -m maskgen.tools.generate --model=DIR --out=FILE.png"""

from collections.abc import Sequence

import numpy as np

from maskgen import cli
from maskgen.errors import UserError
from maskgen.tools import sampling_flags

# The size of the picture of a trajectory, in images.
_ROWS, _COLUMNS = 8, 10
_GREY = 0.5


def main(argv: Sequence[str]) -> None:
  """Parses the command line and generates."""
  parser = cli.Parser(
    "Generates images with a trained model and writes them as one grid; with several classes or prompts, one "
    "row for each.",
    "python -m maskgen.tools.generate --model=runs/quickstart/mage --out=digits.png --count=64",
  )
  parser.add_model("workdir of a run, or an export")
  parser.add_argument("--out", required=True, help="PNG file to write")
  parser.add_argument("--count", type=int, default=64, help="number of images")
  parser.add_seed("random seed; image i depends only on it and i")
  parser.add_argument("--label", help="class ids such as 3 or 0,4,7 or all, for models with classes")
  parser.add_argument("--prompt", action="append", help="a text, for models with captions; can be repeated")
  parser.add_argument("--trajectory", help="PNG file for the intermediate steps of the first images")
  sampling_flags.add(parser, argv)
  args = parser.parse_args(argv)
  cli.check_out(args.out)
  if args.trajectory is not None:
    cli.check_out(args.trajectory, "trajectory")
  if args.count < 1:
    raise UserError(f"--count={args.count}: give at least 1")

  import maskgen
  from maskgen import images

  model = maskgen.load(args.model)
  given = sampling_flags.given(args, getattr(model.objective, "sampling", None))
  classes = None if args.label is None else parse_labels(args.label, model.objective.num_classes)
  if classes and args.prompt:
    raise UserError(f"--label={args.label} and --prompt={args.prompt[0]}: give one of them")
  name, wanted = ("label", classes) if classes else ("prompt", args.prompt or [])
  rows = max(len(wanted), 1)
  each = max(args.count // rows, 1)
  conditions = {name: [one for one in wanted for _ in range(each)]} if wanted else {}
  count, columns = rows * each, each if rows > 1 else None
  pictures = model.generate(seed=args.seed, batch=count, **conditions, **given)
  images.write_png(args.out, images.enlarge(images.grid(pictures, columns)))
  print(f"wrote {count} images to {args.out}")
  if args.trajectory is not None:
    shown = min(count, _ROWS)
    first = {name: values[:shown] for name, values in conditions.items()}
    made = model.trajectory(seed=args.seed, batch=shown, **first, **given)
    images.write_png(args.trajectory, images.enlarge(draw_trajectory(*made), smallest=1024))
    print(f"wrote the intermediate steps of {shown} images to {args.trajectory}")


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


def draw_trajectory(pictures: np.ndarray, unknown: np.ndarray) -> np.ndarray:
  """Draws each image as a row that starts in grey and ends with the image.

  Args:
    pictures: float [b, steps, h, w, c] in [0, 1], after each step.
    unknown: bool [b, steps, h', w']; the pixels of these tokens are grey, tinted with the latest samples.

  Returns:
    uint8 [H, W, 3]; at most 10 columns, evenly spaced over the steps, including the first and the last.
  """
  from maskgen import images

  steps = pictures.shape[1]
  shown = np.unique(np.linspace(0, steps - 1, min(steps, _COLUMNS)).round().astype(int))
  pictures, unknown = pictures[:, shown], unknown[:, shown]
  factor = np.array(pictures.shape[2:4]) // unknown.shape[2:]
  hidden = unknown.repeat(factor[0], axis=2).repeat(factor[1], axis=3)[..., None]
  faded = np.where(hidden, _GREY + 0.25 * (pictures - _GREY), pictures)
  return images.grid(faded.reshape(-1, *faded.shape[2:]), columns=len(shown))


if __name__ == "__main__":
  cli.run(main)
