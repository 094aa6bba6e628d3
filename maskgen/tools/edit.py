"""Edits a picture: python -m maskgen.tools.edit --model=DIR --image=FILE --mask=FILE --out=FILE.png"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from maskgen import cli, images, sheet
from maskgen.errors import UserError
from maskgen.numerics import editing
from maskgen.tools import sampling_flags

_HOLE_COLOUR = (255, 0, 255)  # magenta: rare in images
# Alpha values below this are transparent; mask values from this on are white.
_HALF = 128


def main(argv: Sequence[str]) -> None:
  """Parses the command line and edits.

  Raises:
    UserError: if an argument or a file is wrong.
  """
  args = _parse(argv)
  stem = args.out.removesuffix(".png")
  picture = images.open_picture(args.image, f"--image={args.image}")
  metadata = images.metadata(picture)
  image, hole = _find_hole(args, picture)

  import maskgen

  model = maskgen.load(args.model)
  if model.objective.image_shape[-1] == 1:
    image = np.asarray(Image.fromarray(image).convert("L"))[..., None]
  options = sampling_flags.given(args, getattr(model.objective, "sampling", None))
  labels = [None] if args.label is None else sampling_flags.read_labels(args.label, model)
  if len(labels) > 1:
    raise UserError(f"--label={args.label}: give one class")
  edited = [
    model.inpaint(image, hole, args.seed + i, labels[0], args.prompt, feather=args.feather, **options)
    for i in tqdm(range(args.candidates), desc="editing", disable=args.candidates == 1)
  ]
  if args.candidates == 1:
    _write(args.out, edited[0], metadata)
    print(f"wrote {args.out}: {image.shape[1]} x {image.shape[0]} pixels, {hole.mean():.1%} of them new")
    return
  for i, candidate in enumerate(edited):
    _write(f"{stem}_{i}.png", candidate, metadata)
  holed = np.where(hole[..., None], np.array(_HOLE_COLOUR, np.uint8), image)
  shown = {"input": image, "hole": holed} | {f"{i}: --seed={args.seed + i}": e for i, e in enumerate(edited)}
  cards = [sheet.Card([sheet.fit(shown[text])], [text], "") for text in shown]
  title = f"{args.image}, {hole.mean():.1%} regenerated"
  _write(args.out, sheet.draw({title: cards}), metadata)
  print(f"wrote {stem}_0.png to {stem}_{args.candidates - 1}.png, and a contact sheet to {args.out}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
  parser = cli.Parser(
    "Regenerates a part of a picture: a hole (--mask, --box, or transparent pixels of the picture) or the "
    "area beyond its sides (--outpaint). The picture may have any size. All other pixels keep their values.",
    "python -m maskgen.tools.edit --model=runs/quickstart/mage --image=in.png --mask=mask.png --out=out.png",
  )
  parser.add_model("workdir of a run, or an export")
  parser.add_argument("--image", required=True, help="picture file to edit")
  parser.add_argument("--out", required=True, help="PNG file to write")
  parser.add_argument("--mask", help="picture file of the same size, white for pixels to regenerate")
  parser.add_argument("--box", metavar="X0,Y0,X1,Y1", help="box to regenerate; X1 and Y1 are exclusive")
  parser.add_argument(
    "--outpaint",
    metavar="TOP,RIGHT,BOTTOM,LEFT",
    help="extend the sides: pixels such as 64, or fractions such as 0.5; one number for all four sides",
  )
  parser.add_argument("--grow", type=int, default=0, help="enlarge the hole by this number of pixels")
  parser.add_argument(
    "--feather", type=int, default=0, help="width in pixels of the band around the hole that is blended"
  )
  parser.add_argument(
    "--candidates", type=int, default=1, help="number of results; each in a file, and all on a contact sheet"
  )
  parser.add_seed("random seed; candidate i uses seed + i")
  parser.add_argument("--label", help="class of the new content, a name or a number, for models with classes")
  parser.add_argument("--prompt", help="a text for the new content, for models with captions")
  sampling_flags.add(parser, argv)
  args = parser.parse_args(argv)
  cli.check_out(args.out)
  for name, least in (("candidates", 1), ("grow", 0), ("feather", 0)):
    if getattr(args, name) < least:
      raise UserError(f"--{name}={getattr(args, name)}: give at least {least}")
  given = [f"--{name}" for name in ("mask", "box", "outpaint") if getattr(args, name) is not None]
  if len(given) > 1:
    raise UserError(f"{' and '.join(given)} contradict each other: give one of them")
  if args.label is not None and args.prompt is not None:
    raise UserError(f"--label={args.label} and --prompt={args.prompt}: give one of them")
  if args.box is not None:
    args.box = _numbers("box", args.box, "four whole numbers, X0,Y0,X1,Y1", (4,), whole=True)
  if args.outpaint is not None:
    what = "one number or four, pixels such as 64 or fractions such as 0.5"
    args.outpaint = _numbers("outpaint", args.outpaint, what, (1, 4), whole=False)
  return args


def _numbers(name: str, text: str, what: str, counts: Sequence[int], *, whole: bool) -> list[int | float]:
  """The numbers of a flag; those with a decimal point are floats."""
  try:
    numbers = [float(part) if "." in part and not whole else int(part) for part in text.split(",")]
  except ValueError:
    numbers = []
  if len(numbers) not in counts:
    raise UserError(f"--{name}={text}: give {what}")
  return numbers


def _find_hole(args: argparse.Namespace, picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
  """The picture on white, uint8 [h, w, 3], extended by outpainting; and what to regenerate, bool [h, w]."""
  image = np.asarray(images.on_white(picture))
  shape = image.shape[:2]
  if args.outpaint is not None:
    sides = args.outpaint * (4 // len(args.outpaint))
    source = f"--outpaint={','.join(map(str, sides))}"
    try:
      (image,), hole = editing.extend(image[None], sides)
    except UserError as error:
      raise UserError(f"{source}: {error}") from None
  elif args.box is not None:
    hole, source = editing.box_hole(args.box, shape), "--box"
  elif args.mask is not None:
    hole, source = _read_mask(args.mask), f"--mask={args.mask}"
    if hole.shape != shape:
      raise UserError(
        f"{source} has {hole.shape[1]} x {hole.shape[0]} pixels, the picture has {shape[1]} x {shape[0]}: "
        "make them equal"
      )
  else:
    hole = np.asarray(picture.convert("RGBA").getchannel("A")) < _HALF
    source = f"--image={args.image}"
    if not hole.any():
      raise UserError(f"{source} has no transparent pixels to regenerate: give --mask, --box or --outpaint")
  if not hole.any():
    raise UserError(f"{source} is black everywhere: make the pixels to regenerate white")
  hole = editing.grow(hole, args.grow)
  if hole.all():
    raise UserError(f"{source} leaves no pixel known: make it smaller, or use maskgen.tools.generate")
  return image, hole


def _read_mask(path: str) -> np.ndarray:
  """The white pixels of a picture, bool [h, w]; transparent pixels count as black."""
  mask = images.open_picture(path, f"--mask={path}").convert("RGBA")
  mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask)
  return np.asarray(mask.convert("L")) >= _HALF


def _write(path: str, image: np.ndarray, metadata: Mapping[str, Any]) -> None:
  images.write_png(path, np.broadcast_to(image, (*image.shape[:2], 3)), **metadata)


if __name__ == "__main__":
  cli.run(main)
