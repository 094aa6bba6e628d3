"""Measures subjects in new contexts: python -m maskgen.tools.vilex subjects --model=DIR ..."""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from maskgen import cli, files, sheet
from maskgen import images as images_lib
from maskgen.errors import UserError, counted
from maskgen.tools import vilex_flags

if TYPE_CHECKING:
  from maskgen.evaluators.subjects import Networks, Subject
  from maskgen.serving import ImageWords

# Flags that do not change a number.
OUTPUTS = ("out", "json", "trust_code")
_TOGETHER = 8  # prompts that are drawn at once, however many there are
_SHOWN = 12  # prompts of each subject on the sheet


def main(argv: Sequence[str]) -> None:
  """Parses the command line, prints the scores, and writes the sheet and the receipt."""
  args = parser().parse_args(argv)
  check_flags(args)

  from maskgen.evaluators import receipts

  inputs = open_inputs(args)
  numbers, sections = measure(inputs)
  for name, value in numbers.items():
    print(f"{name} = {value:.4f}")
  if args.out is not None:
    images_lib.write_png(args.out, sheet.draw(sections))
    print(f"wrote {args.out}")
  if args.json is not None:
    receipt = {"metrics": numbers, **describe(inputs), **receipts.surroundings()}
    files.replace(epath.Path(args.json), json.dumps(receipt, indent=2))
    print(f"wrote {args.json}")


def parser() -> cli.Parser:
  """The flags."""
  made = vilex_flags.parser(
    "Generates each subject in each prompt, and measures likeness to its pictures by CLIP (clip_i) and DINO "
    "(dino) and to the words by CLIP (clip_t), as for DreamBooth; docs/vilex.md says how.",
    "subjects --model=runs/vilex_sd15 --subjects=dreambooth/dataset --prompts=prompts.txt "
    "--clip=weights/clip-vit-base-patch32 --dino=weights/dino-vits16 --out=subjects.png --json=subjects.json",
  )
  made.add_argument(
    "--subjects", type=files.absolute, required=True, help="folder with a folder of pictures for each subject"
  )
  made.add_argument(
    "--prompts",
    type=files.absolute,
    required=True,
    help="text file with a prompt on each line, with {} in place of the image; a prompts.txt in a subject's "
    "folder comes first",
  )
  made.add_argument(
    "--classes",
    type=files.absolute,
    help="CSV file of NAME,CLASS, the words for subjects in clip_t; default the names of their folders",
  )
  made.add_argument("--clip", type=files.absolute, help="folder of a whole CLIP model of transformers")
  made.add_argument("--dino", type=files.absolute, help="folder of a DINO model of transformers")
  made.add_argument("--out", help="PNG file to write: the first picture of each prompt")
  made.add_argument("--json", help="JSON file to write: the scores and their receipt")
  vilex_flags.add_num_tokens(made)
  made.add_argument("--count", type=int, default=4, help="number of pictures for each prompt; default 4")
  made.add_seed(
    "random seed; the i-th pictures of all prompts use seed + i, and the subject's pictures in turn"
  )
  vilex_flags.add_sampling(made)
  vilex_flags.add_words(made)
  return made


def check_flags(args: argparse.Namespace) -> None:
  """Checks the flags that need no file.

  Raises:
    UserError: if one is wrong.
  """
  if args.out is not None:
    cli.check_out(args.out)
  if args.json is not None:
    cli.check_out(args.json, "json", ".json")
  if args.count < 1:
    raise UserError(f"--count={args.count}: give at least 1")


class Inputs(NamedTuple):
  """What is measured.

  Attributes:
    args: the flags.
    model: that generates.
    subjects: the subjects.
    networks: that measure.
  """

  args: argparse.Namespace
  model: "ImageWords"
  subjects: "list[Subject]"
  networks: "Networks"


def open_inputs(args: argparse.Namespace) -> Inputs:
  """Opens what the flags name, and checks all prompts.

  Raises:
    UserError: if something is missing, or does not fit.
  """
  from maskgen.evaluators import subjects

  found = subjects.find(args.subjects, args.prompts, args.classes)
  networks = subjects.open_networks(args.clip, args.dino)
  model = vilex_flags.load_model(args.model)
  tokens = np.zeros((model.objective.tokens, 1), np.float32)
  for subject in found:
    for prompt in subject.prompts:
      model.lay_out(prompt, [tokens], args.num_tokens)
    if networks.text is not None:
      networks.text.captions.read(subject.texts())
  return Inputs(args, model, found, networks)


def measure(inputs: Inputs) -> tuple[dict[str, float], dict[str, list[sheet.Card]]]:
  """The scores by name, of all pictures and of each subject, and what the contact sheet shows."""
  parts: dict[str, dict[str, np.ndarray]] = {}
  sections = {}
  for subject in tqdm(inputs.subjects, desc="drawing", unit="subject", disable=None):
    real = subject.pictures(inputs.model.objective.image_shape[:2])
    made, count = draw(inputs, subject, real), inputs.args.count
    scores = inputs.networks.score(made, real, [text for text in subject.texts() for _ in range(count)])
    parts[subject.name] = scores
    cards = [
      sheet.Card([sheet.fit(real[0])], [f"the first of {counted(len(real), 'picture')}"], subject.name)
    ]
    for i, prompt in enumerate(subject.prompts[:_SHOWN]):
      each = {name: value[i * count] for name, value in scores.items() if not name.endswith("_real")}
      values = ", ".join(f"{name} {value:.2f}" for name, value in each.items())
      cards.append(sheet.Card([sheet.fit(made[i * count])], [prompt], values))
    sections[subject.name] = cards
  names = dict.fromkeys(name for scores in parts.values() for name in scores)
  numbers = {
    name: float(np.concatenate([scores[name] for scores in parts.values() if name in scores]).mean())
    for name in names
  }
  for subject, scores in parts.items():
    numbers |= {f"{name}/{subject}": float(value.mean()) for name, value in scores.items()}
  return numbers, sections


def draw(inputs: Inputs, subject: "Subject", real: np.ndarray) -> np.ndarray:
  """Generates a subject, uint8 [prompts * count, h, w, 3], the pictures of a prompt one after another.

  Args:
    inputs: the inputs.
    subject: the subject.
    real: its pictures, uint8 [r, h, w, 3]; the i-th of each prompt is made from the i-th of these, in turn.
  """
  args, prompts = inputs.args, list(subject.prompts)
  tokens = inputs.model.encode(real, args.num_tokens)
  rows: list[np.ndarray] = []
  for i in range(args.count):
    given = dict(seed=args.seed + i, images=[tokens[i % len(tokens)]], num_tokens=args.num_tokens)
    given |= vilex_flags.options(args)
    starts = range(0, len(prompts), _TOGETHER)
    parts = [inputs.model.generate(prompt=prompts[start : start + _TOGETHER], **given) for start in starts]
    rows.append(np.concatenate(parts))
  made = np.stack(rows, axis=1)
  return images_lib.to_uint8(made.reshape(-1, *made.shape[2:]))


def compute(inputs: Inputs) -> dict[str, float]:
  """The scores by name."""
  return measure(inputs)[0]


def describe(inputs: Inputs) -> Mapping[str, Any]:
  """The facts of the receipt, which is the JSON file; see `receipts`."""
  from maskgen import tree

  args, model = inputs.args, inputs.model
  given = {name: value for name, value in vars(args).items() if name not in OUTPUTS}
  sampling = {**vars(model.objective.sampling), **vilex_flags.options(args)}
  return {
    "model": {
      "path": files.absolute(args.model),
      "weights": tree.fingerprint(model.variables),
      "sampling": sampling,
    },
    "subjects": {subject.name: subject.facts() for subject in inputs.subjects},
    "networks": inputs.networks.facts(),
    "arguments": {name: files.absolute(value) if name == "model" else value for name, value in given.items()},
  }
