"""Generates images: python -m maskgen.tools.generate --model=DIR --out=FILE.png, or --out_dir=DIR"""

import argparse
import dataclasses
import hashlib
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from maskgen import cli
from maskgen.errors import UserError, counted
from maskgen.tools import sampling_flags

# The size of the picture of a trajectory, in images.
_ROWS, _COLUMNS = 8, 10
LABELS = ("balanced", "random", "none")
# Flags of --out_dir and their defaults.
_OF_FOLDERS = {"format": "png", "start": 0, "batch_size": 64} | dict.fromkeys(
  ("labels", "process_index", "process_count")
)

log = logging.getLogger("maskgen")


def main(argv: Sequence[str]) -> None:
  """Parses the command line and generates."""
  parser = cli.Parser(
    "Generates images with a trained model and writes them as one grid, or, if there are several for each of "
    "several classes or prompts, one row for each; or any number of them to a folder, each in its own size. "
    "The same command continues a folder after an interruption, and several processes can share the work.",
    "python -m maskgen.tools.generate --model=runs/quickstart/mage --out=digits.png --count=64\n  "
    "python -m maskgen.tools.generate --model=digits --out_dir=digits --count=50000 --format=npz",
  )
  parser.add_model("workdir of a run, or an export")
  parser.add_argument("--out", help="PNG file to write")
  parser.add_argument("--out_dir", help="folder to write, or to continue; local or remote")
  parser.add_argument(
    "--count", type=int, default=64, help="number of images; at least one for each class or prompt"
  )
  parser.add_seed("random seed; image i depends only on it, i and its class or prompt")
  parser.add_argument(
    "--label", help="classes, for models with them: names or numbers such as cat,dog or 3 or all"
  )
  parser.add_argument("--prompt", action="append", help="a text, for models with captions; can be repeated")
  parser.add_argument("--negative_prompt", help="a text that guidance steers away from, with captions")
  parser.add_argument("--captions", help="text file with a prompt on each line")
  parser.add_argument("--trajectory", help="PNG file for the intermediate steps of the first images")
  folder = parser.add_argument_group("with --out_dir")
  folder.add_argument(
    "--format", choices=("png", "npz"), help="a file for each image, or one with all of them"
  )
  folder.add_argument(
    "--labels",
    choices=LABELS,
    help="with classes: image i is of class i mod their number, the default, or of a random one, or of none",
  )
  folder.add_argument("--start", type=int, help="number of the first image, by default 0")
  folder.add_argument("--batch_size", type=int, help="images per batch and device, by default 64")
  folder.add_argument("--process_index", type=int, help="index of this process, from 0")
  folder.add_argument("--process_count", type=int, help="number of processes; each makes its own share")
  sampling_flags.add(parser, argv)
  args = parser.parse_args(argv)
  _check(args)
  if args.out_dir is not None:
    write_folder(args)
  else:
    write_grid(args)


def _check(args: argparse.Namespace) -> None:
  """Checks flags, and sets the defaults of those of folders.

  Raises:
    UserError: if a value is wrong, or contradicts another.
  """
  if (args.out is None) == (args.out_dir is None):
    raise UserError("give --out=FILE.png for one picture, or --out_dir=DIR for a folder of images")
  if args.count < 1:
    raise UserError(f"--count={args.count}: give at least 1")
  if args.prompt and args.captions:
    raise UserError(f"--prompt={args.prompt[0]} and --captions={args.captions}: give one of them")
  if args.captions:
    args.prompt = read_captions(args.captions)
  for name in ("label", "labels"):
    if (value := getattr(args, name)) and args.prompt:
      raise UserError(f"--{name}={value} and --prompt={args.prompt[0]}: give one of them")
  if args.label and args.labels == "none":
    raise UserError(f"--label={args.label} and --labels=none: give one of them")
  given = [name for name in _OF_FOLDERS if getattr(args, name) is not None]
  if args.out is not None:
    if given:
      raise UserError(f"--{given[0]} is for --out_dir: leave it out")
    cli.check_out(args.out)
    if args.trajectory is not None:
      cli.check_out(args.trajectory, "trajectory")
    return
  if args.trajectory is not None:
    raise UserError(f"--trajectory={args.trajectory} is for --out: leave it out")
  vars(args).update({name: value for name, value in _OF_FOLDERS.items() if name not in given})
  cli.check_out_folder(args.out_dir, "out_dir")
  if args.batch_size < 1:
    raise UserError(f"--batch_size={args.batch_size}: give at least 1")
  if args.start < 0 or args.start + args.count > 2**31:
    raise UserError(f"--start={args.start}: give a whole number of at least 0, and less than 2**31 - --count")
  if ("process_index" in given) != ("process_count" in given):
    raise UserError("--process_index and --process_count are used together: give both or none")
  if "process_index" in given and not 0 <= args.process_index < args.process_count:
    raise UserError(f"--process_index={args.process_index}: give a number from 0 to --process_count - 1")


def write_grid(args: argparse.Namespace) -> None:
  """Writes the picture of `--out`, and of `--trajectory`."""
  import maskgen
  from maskgen import images

  model = maskgen.load(args.model)
  given = sampling_flags.given(args, getattr(model.objective, "sampling", None))
  classes = None if args.label is None else sampling_flags.read_labels(args.label, model)
  name, wanted = ("label", classes) if classes else ("prompt", args.prompt or [])
  rows = max(len(wanted), 1)
  each = max(args.count // rows, 1)
  conditions: dict[str, Any] = {name: [one for one in wanted for _ in range(each)]} if wanted else {}
  if args.negative_prompt is not None:
    _check_negative(args, model)
    conditions["negative_prompt"] = args.negative_prompt
  count, columns = rows * each, each if rows > 1 and each > 1 else None
  pictures = model.generate(seed=args.seed, batch=count, **conditions, **given)
  if count == 1:
    images.write_png(args.out, images.to_rgb(pictures[0]))
  else:
    images.write_png(args.out, images.enlarge(images.grid(pictures, columns)))
  print(f"wrote {counted(count, 'image')} to {args.out}")
  if args.trajectory is not None:
    shown = min(count, _ROWS)
    first = _first(conditions, shown)
    made = model.trajectory(seed=args.seed, batch=shown, **first, **given)
    images.write_png(args.trajectory, images.enlarge(draw_trajectory(*made), smallest=1024))
    print(f"wrote the intermediate steps of {counted(shown, 'image')} to {args.trajectory}")


def write_folder(args: argparse.Namespace) -> None:
  """Writes this process's share of the images of `--out_dir`, and completes the folder if it is the last."""
  from maskgen import processes

  if args.process_count is None:
    processes.start(None, None, None)

  import jax

  import maskgen
  from maskgen import objectives, tree
  from maskgen.serving import sample_set

  model: Any = maskgen.load(args.model)
  if not hasattr(model, "request"):
    raise UserError(
      f"--model={args.model} does not generate images: give a model of an objective such as 'mage'"
    )
  objective = model.objective
  sampling = getattr(objective, "sampling", None)
  options = sampling_flags.given(args, sampling)
  objectives.check_sampling(objective, options)
  numbers = range(args.start, args.start + args.count)
  conditions, described = _conditions(args, model, numbers)
  if args.negative_prompt is not None:
    _check_negative(args, model)
    conditions["negative_prompt"] = described["negative_prompt"] = args.negative_prompt
  manifest = {
    "model": args.model,
    "weights": tree.fingerprint(model.variables),
    "objective": model.kind,
    "seed": args.seed,
    "sampling": sampling and dataclasses.asdict(sampling) | options,
    **described,
    "start": args.start,
    "count": args.count,
    "format": args.format,
    "image_shape": model.generated_shape(options),
    "made_with": {
      "maskgen": maskgen.__version__,
      "jax": jax.__version__,
      "device": jax.local_devices()[0].device_kind,
    },
  }
  # What the model does not take is refused before the folder is begun.
  model.request(args.seed, 1, **_first(conditions, 1))
  labels, captions = conditions.get("label"), conditions.get("prompt")
  captions = [captions] * args.count if isinstance(captions, str) else captions
  made = sample_set.create(epath.Path(args.out_dir), manifest, labels, captions)
  index, count = args.process_index, args.process_count
  share = (jax.process_index(), jax.process_count()) if count is None else (index, count)
  sample_set.fill(made, model, args.seed, conditions, options, args.batch_size, share)
  left = int(made.missing().sum())
  if left:
    print(f"this process is done; other processes make {counted(left, 'image')} of {args.out_dir}")
    return
  made.finish()
  print(f"wrote {counted(args.count, 'image')} to {args.out_dir}: seed {args.seed}, {describe(described)}")


def _conditions(
  args: argparse.Namespace, model: Any, numbers: range
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The condition of each image, arguments of `model.request`, and what the manifest says of them."""
  from maskgen.serving import requests

  objective = model.objective
  described: dict[str, Any] = {"labels": None, "captions": None}
  if args.prompt:
    digest = hashlib.sha256("\n".join(args.prompt).encode()).hexdigest()
    described["captions"] = {"number": len(args.prompt), "sha256": digest}
    if len(args.prompt) == 1:
      return {"prompt": args.prompt[0]}, described
    return {"prompt": [args.prompt[i % len(args.prompt)] for i in numbers]}, described
  if args.labels is not None and not objective.num_classes:
    raise UserError(f"--labels={args.labels}: this model was trained without classes, leave it out")
  if args.label is None and (not objective.num_classes or args.labels == "none"):
    return {}, described
  rule = args.labels or LABELS[0]
  classes = sampling_flags.read_labels(args.label or "all", model)
  known = requests.labels(classes, len(classes), objective.num_classes)
  if rule == "random":
    which = requests.draws(args.seed, numbers, len(known))
  else:
    which = np.array(numbers) % len(known)
  described["labels"] = {"rule": rule, "classes": known.tolist()}
  return {"label": known[which]}, described


def _check_negative(args: argparse.Namespace, model: Any) -> None:
  if "negative_prompt" not in inspect.signature(model.generate).parameters:
    raise UserError(
      f"--negative_prompt={args.negative_prompt}: --model={args.model} takes none, leave it out"
    )


def _first(conditions: dict[str, Any], count: int) -> dict[str, Any]:
  """The conditions of the first images; a text is that of all."""
  return {name: values if isinstance(values, str) else values[:count] for name, values in conditions.items()}


def describe(conditions: dict[str, Any]) -> str:
  """A phrase for what a manifest says of labels and captions."""
  if conditions["labels"]:
    return f"{conditions['labels']['rule']} labels of {len(conditions['labels']['classes'])} classes"
  if conditions["captions"]:
    return f"{conditions['captions']['number']} captions in turn"
  return "without classes or captions"


def read_captions(path: str) -> list[str]:
  """The lines of `--captions` that are not empty.

  Raises:
    UserError: if there are none.
  """
  try:
    lines = [line.strip() for line in epath.Path(path).read_text().splitlines()]
  except (OSError, UnicodeError) as error:
    raise UserError(f"--captions={path} cannot be read ({error}): give a text file") from None
  if not any(lines):
    raise UserError(f"--captions={path} is empty: write a prompt on each line")
  return [line for line in lines if line]


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
  faded = images.shade(pictures[:, shown], unknown[:, shown])
  return images.grid(faded.reshape(-1, *faded.shape[2:]), columns=len(shown))


if __name__ == "__main__":
  cli.run(main)
