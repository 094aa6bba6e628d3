"""Generates images from prompts of images and words: python -m maskgen.tools.vilex COMMAND --model=DIR ..."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image, ImageOps
from tqdm import tqdm

from maskgen import cli, sheet
from maskgen import images as images_lib
from maskgen.errors import UserError, counted
from maskgen.tools import vilex_flags, vilex_subjects

if TYPE_CHECKING:
  from maskgen.serving import ImageWords

FILE_OF_TOKENS = ".safetensors"


class GivenImage(NamedTuple):
  """An image as the model sees it.

  Attributes:
    name: the name of the file, as given.
    picture: uint8 [h, w, c], of the model's size; a placeholder if the image was given as tokens.
    tokens: float32 [k, d], the requested tokens.
    number: k if it was given; None for as many as fit.
  """

  name: str
  picture: np.ndarray
  tokens: np.ndarray
  number: int | None


# The caption of a picture on a contact sheet, with a given image or with arguments of `generate`.
Entry = tuple[str, GivenImage | dict[str, Any]]


def main(argv: Sequence[str]) -> None:
  """Parses the command line and runs the command.

  Raises:
    UserError: if an argument, a file or the model is wrong.
  """
  parser = cli.Parser(
    "Turns images into words for a text-to-image model, with a model of the vilex objective. Each command "
    "has its own --help.\n" + "".join(f"\n  {name:<12} {what}" for name, (_, what) in COMMANDS.items()),
    "python -m maskgen.tools.vilex prompt --model=runs/vilex_digits/vilex --image=in.png "
    '--prompt="{} on a red background" --out=out.png',
  )
  parser.add_argument("command", choices=COMMANDS, help="command to run")
  run, _ = COMMANDS[parser.parse_args(argv[:1]).command]
  run(argv[1:])


def reconstruct(argv: Sequence[str]) -> None:
  """Reconstructs images from their tokens only."""
  parser = _parser(
    "Reconstructs images from their first tokens. Each row of the contact sheet shows an image next to its "
    "reconstructions from 1, 2, 4, ... tokens, with one seed.",
    "reconstruct --model=runs/vilex_digits/vilex --image=in.png --count=3 --out=out.png",
  )
  parser.add_argument(
    "--num_tokens", help="numbers of tokens, such as 4 or 1,4,8; default powers of two and all"
  )
  parser.add_argument("--count", type=int, default=1, help="number of seeds")
  parser.add_seed("the first random seed; the others follow")
  vilex_flags.add_sampling(parser)
  args = _parse(parser, argv, ".png")
  numbers = None if args.num_tokens is None else _whole_numbers("num_tokens", args.num_tokens)
  model, given = _load(args)

  from maskgen.numerics import prompts

  powers = prompts.TailDrop("powers")
  sections: dict[str, list[Entry]] = {}
  for image in given:
    wanted = numbers or [int(k) for k in powers.choices(len(image.tokens))]
    chosen = [image.number] if image.number else wanted
    for k in chosen:
      model.lay_out("", [image.tokens], k)  # this checks k
    for seed in range(args.seed, args.seed + args.count):
      drawn = [(counted(k, "token"), dict(seed=seed, images=[image.tokens], num_tokens=k)) for k in chosen]
      sections[f"{image.name}, --seed={seed}"] = [("the image", image), *drawn]
  _draw(args, model, sections)


def prompt(argv: Sequence[str]) -> None:
  """Generates images from a prompt with images."""
  parser = _parser(
    "Generates images from a prompt with {} in place of each image. Without {}, images precede the words.",
    'prompt --model=runs/vilex_digits/vilex --prompt="{} on a red background" --image=in.png:4 --count=8 '
    "--text_guidance=3 --out=out.png",
    image_is_required=False,
  )
  parser.add_argument("--prompt", default="", help="text, with {} in place of each --image")
  vilex_flags.add_num_tokens(parser)
  parser.add_argument("--count", type=int, default=1, help="number of pictures")
  parser.add_seed("random seed; picture i uses seed + i")
  vilex_flags.add_sampling(parser)
  vilex_flags.add_words(parser)
  args = _parse(parser, argv, ".png")
  if not args.prompt and not args.image:
    raise UserError("neither --prompt nor --image is given: give at least one of them")
  model, given = _load(args, args.num_tokens)
  tokens, numbers = [image.tokens for image in given], [image.number for image in given]
  used = model.lay_out(args.prompt, tokens, numbers).get("number", ())
  sections: dict[str, list[Entry]] = {}
  if given:
    sections["images"] = [(counted(k, "token"), image) for image, k in zip(given, used, strict=True)]
  sections[args.prompt or "images only"] = [
    (f"--seed={seed}", dict(seed=seed, prompt=args.prompt, images=tokens, num_tokens=numbers))
    for seed in range(args.seed, args.seed + args.count)
  ]
  _draw(args, model, sections)


def interpolate(argv: Sequence[str]) -> None:
  """Interpolates between two images."""
  parser = _parser(
    "Interpolates between two images, with the same noise for all pictures.",
    "interpolate --model=runs/vilex_digits/vilex --image=first.png --image=second.png --out=out.png",
  )
  parser.add_argument("--prompt", default="", help='words around them, such as "a {} on a red background"')
  vilex_flags.add_num_tokens(parser)
  parser.add_argument(
    "--count", type=int, default=7, help="number of pictures, including both ends; default 7"
  )
  parser.add_seed("random seed of all pictures")
  vilex_flags.add_sampling(parser)
  vilex_flags.add_words(parser)
  args = _parse(parser, argv, ".png")
  if args.count < 2:
    raise UserError(f"--count={args.count}: give at least 2, for both ends")
  model, given = _load(args, args.num_tokens)
  if len(given) != 2:
    raise UserError(
      f"--image gives {counted(len(given), 'image')}: give the two images to interpolate between"
    )

  from maskgen.serving import image_words

  tokens = image_words.between(given[0].tokens, given[1].tokens, args.count)
  model.lay_out(args.prompt, [tokens[0]])  # this checks the prompt
  drawn: list[Entry] = [
    (f"{share:.0%}", dict(seed=args.seed, prompt=args.prompt, images=[one]))
    for share, one in zip(np.linspace(0.0, 1.0, args.count), tokens, strict=True)
  ]
  title = f"{args.prompt or 'images only'}, from the first to the second"
  _draw(
    args, model, {"images": [(counted(tokens.shape[1], "token"), image) for image in given], title: drawn}
  )


def encode(argv: Sequence[str]) -> None:
  """Writes tokens of images."""
  parser = _parser(
    "Writes the tokens of images to a file that can be used in place of the images.",
    "encode --model=runs/vilex_digits/vilex --image=a.png --image=b.png --num_tokens=4 --out=ab.safetensors",
  )
  vilex_flags.add_num_tokens(parser)
  args = _parse(parser, argv, FILE_OF_TOKENS)
  model, given = _load(args, args.num_tokens)
  tokens = [image.tokens for image in given]
  if len({len(one) for one in tokens}) > 1:
    numbers = ", ".join(str(len(one)) for one in tokens)
    raise UserError(f"--image gives {numbers} tokens: give the same number for all with --num_tokens")
  model.write_tokens(args.out, np.stack(tokens))
  k, d = tokens[0].shape
  print(
    f"wrote {counted(k, 'token')} of {d:,} numbers for each of {counted(len(tokens), 'image')} to {args.out}"
  )


def embedding(argv: Sequence[str]) -> None:
  """Writes an image as a textual inversion."""
  parser = _parser(
    "Writes an image as a textual inversion, which other programs for the same text-to-image model load as a "
    "new word; see docs/vilex.md.",
    "embedding --model=runs/vilex_sd15 --image=dog.png:16 --out=dog.safetensors",
  )
  vilex_flags.add_num_tokens(parser)
  args = _parse(parser, argv, FILE_OF_TOKENS)
  model, given = _load(args, args.num_tokens)
  if len(given) != 1:
    raise UserError(f"--image gives {counted(len(given), 'image')}: give one, because a file holds one word")
  model.write_embedding(args.out, given[0].tokens)
  print(f"wrote {counted(len(given[0].tokens), 'vector')} to {args.out}")


def words(argv: Sequence[str]) -> None:
  """Shows the nearest words of tokens."""
  parser = _parser(
    "Shows the words of the vocabulary that are nearest to each token of images, with their cosines.",
    "words --model=runs/vilex_digits/vilex --image=in.png --num_tokens=4 --out=out.png",
  )
  vilex_flags.add_num_tokens(parser)
  parser.add_argument("--count", type=int, default=5, help="number of words for each token; default 5")
  args = _parse(parser, argv, ".png")
  model, given = _load(args, args.num_tokens)
  sections = {}
  for image in given:
    shown = sheet.fit(image.picture)
    cards = [sheet.Card([shown], ["the image"], image.name)]
    for i, nearest in enumerate(model.nearest_words(image.tokens, args.count), 1):
      text = ", ".join(f"{word}={cosine:.2f}" for word, cosine in nearest)
      print(f"{image.name}, token {i}: {text}")
      cards.append(sheet.Card([sheet.page(text, *shown.shape[:2])], [f"token {i}"], ""))
    sections[image.name] = cards
  _write_sheet(args, sections)


def look(argv: Sequence[str]) -> None:
  """Shows where the pooling looks."""
  parser = _parser(
    "Shows where in pictures the attention pooling looks for each token: red is where it looks most, grey "
    "where no more than on average.",
    "look --model=runs/vilex_digits/vilex --image=in.png --num_tokens=4 --out=out.png",
  )
  vilex_flags.add_num_tokens(parser)
  args = _parse(parser, argv, ".png")
  for path, picture, _ in map(_open, args.image):
    if picture is None:
      raise UserError(f"--image={path} is a file of tokens: give the picture, which the pooling looks at")
  model, given = _load(args, args.num_tokens)
  sections = {}
  for image in given:
    shown = sheet.fit(image.picture)
    weights = model.look(image.picture[None])[0, : len(image.tokens)]
    parts = {"all": weights.mean(axis=0)} | {f"token {i}": one for i, one in enumerate(weights, 1)}
    cards = [
      sheet.Card([sheet.heat(shown, one)], [text, f"up to {one.max() / one.mean():.1f} x the mean"], "")
      for text, one in parts.items()
    ]
    sections[image.name] = [sheet.Card([shown], ["the image"], image.name), *cards]
  _write_sheet(args, sections)


COMMANDS: Mapping[str, tuple[Callable[[Sequence[str]], None], str]] = {
  "reconstruct": (reconstruct, "reconstructs images from increasing numbers of tokens"),
  "prompt": (prompt, "generates images from a prompt of images and words"),
  "interpolate": (interpolate, "interpolates between two images"),
  "encode": (encode, "writes the tokens of images to a file"),
  "embedding": (embedding, "writes an image as a word for other programs"),
  "subjects": (vilex_subjects.main, "measures subjects in new contexts"),
  "words": (words, "shows the nearest words of each token"),
  "look": (look, "shows where the pooling looks for each token"),
}


def _parser(what: str, example: str, *, image_is_required: bool = True) -> cli.Parser:
  """Returns a parser with the arguments of all commands."""
  parser = vilex_flags.parser(what, example)
  parser.add_argument(
    "--image",
    action="append",
    required=image_is_required,
    metavar="FILE[:k]",
    help="a picture of any size, which is cropped to its centre, or a token file with one or more images; :k "
    "uses the first k tokens; can be repeated",
  )
  parser.add_argument("--out", required=True, help="file to write")
  return parser


def _parse(parser: cli.Parser, argv: Sequence[str], kind: str) -> argparse.Namespace:
  """Parses the command line of a command whose output has the extension `kind`."""
  args = parser.parse_args(argv)
  cli.check_out(args.out, kind=kind)
  if getattr(args, "count", 1) < 1:
    raise UserError(f"--count={args.count}: give at least 1")
  return args


def _whole_numbers(name: str, text: str) -> list[int]:
  try:
    return [int(part) for part in text.split(",")]
  except ValueError:
    raise UserError(f"--{name}={text}: give whole numbers, such as 4 or 1,4,8") from None


def _load(args: argparse.Namespace, num_tokens: int | None = None) -> tuple["ImageWords", list[GivenImage]]:
  """Loads the model and the images, with `num_tokens` tokens of each image without its own number.

  Pictures are checked before the model is loaded.
  """
  opened = [_open(text) for text in args.image or ()]
  model = vilex_flags.load_model(args.model)
  given = []
  for path, picture, number in tqdm(opened, desc="reading images", disable=len(opened) < 2):
    given += _read_images(model, path, picture, num_tokens if number is None else number)
  return model, given


def _open(text: str) -> tuple[str, Image.Image | None, int | None]:
  """The path, the picture (None for a token file), and the number of tokens of an --image."""
  found = None if epath.Path(text).exists() else re.fullmatch(r"(.+):(-?\d+)", text)
  path, number = (found[1], int(found[2])) if found else (text, None)
  what = f"--image={path}"
  if not path.endswith(FILE_OF_TOKENS):
    return path, images_lib.on_white(images_lib.open_picture(path, what)), number
  if not epath.Path(path).is_file():
    raise UserError(f"{what}: there is no such file")
  return path, None, number


def _read_images(
  model: "ImageWords", path: str, picture: Image.Image | None, number: int | None
) -> list[GivenImage]:
  """The image of a picture file, or the images of a token file."""
  height, width, _ = model.objective.image_shape
  if picture is not None:
    pixels = np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC))
    return [GivenImage(path, pixels, model.encode(pixels[None], number)[0], number)]
  tokens = model.read_tokens(path)
  held = tokens.shape[1]
  if number is not None and not 1 <= number <= held:
    raise UserError(
      f"--image={path}:{number}: the file has {counted(held, 'token')} per image, give 1 to {held}"
    )
  shown = sheet.fit(np.zeros((height, width, 1), np.uint8)).shape
  drawn = sheet.page(f"{path}, {counted(held, 'token')}", shown[0], shown[1])
  names = [path] if len(tokens) == 1 else [f"{path}, image {i}" for i in range(len(tokens))]
  return [GivenImage(name, drawn, one[:number], number) for name, one in zip(names, tokens, strict=True)]


def _write_sheet(args: argparse.Namespace, sections: Mapping[str, Sequence[sheet.Card]]) -> None:
  images_lib.write_png(args.out, sheet.draw(sections))
  print(f"wrote {args.out}")


def _draw(args: argparse.Namespace, model: "ImageWords", sections: Mapping[str, Sequence[Entry]]) -> None:
  """Generates and writes pictures: each in a file, and if there are several, all on a contact sheet."""
  options = vilex_flags.options(args)
  total = sum(isinstance(what, dict) for cards in sections.values() for _, what in cards)
  stem = args.out.removesuffix(".png")
  files = [f"{stem}_{i}.png" for i in range(total)] if total > 1 else [args.out]
  drawn: dict[str, list[sheet.Card]] = {title: [] for title in sections}
  waiting = iter(files)
  with tqdm(total=total, desc="drawing", unit="picture") as progress:
    for title, cards in sections.items():
      for text, what in cards:
        if isinstance(what, GivenImage):
          picture, name = what.picture, what.name
        else:
          picture, file = model.generate(batch=1, **what, **options)[0], next(waiting)
          name = epath.Path(file).name
          images_lib.write_png(file, picture)
          progress.update()
        drawn[title].append(sheet.Card([sheet.fit(picture)], [text], name))
  if total > 1:
    images_lib.write_png(args.out, sheet.draw(drawn))
    print(f"wrote {files[0]} to {files[-1]}, and a contact sheet to {args.out}")
  else:
    print(f"wrote {args.out}")


if __name__ == "__main__":
  cli.run(main)
