"""Subjects in new contexts, measured as for DreamBooth (Ruiz et al. 2023, section 4.2).

Letters: m generated pictures of a subject, r real ones, d features.
"""

import csv
import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from maskgen import images as images_lib
from maskgen import tree
from maskgen.data.listing import SUFFIXES, is_hidden, is_picture
from maskgen.errors import UserError, nearest
from maskgen.evaluators import feature_spaces
from maskgen.evaluators.batches import gather
from maskgen.evaluators.feature_spaces import Space
from maskgen.importers.clip import TextTower, load_text
from maskgen.numerics.prompts import PLACE

# The file in a subject's folder with its own prompts.
PROMPTS = "prompts.txt"
_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Subject:
  """A subject.

  Attributes:
    name: of its folder.
    kind: the word for it in texts.
    prompts: with {} in place of the image.
    files: of its pictures.
  """

  name: str
  kind: str
  prompts: tuple[str, ...]
  files: tuple[pathlib.Path, ...]

  def pictures(self, size: tuple[int, int]) -> np.ndarray:
    """Its pictures, uint8 [r, h, w, 3]: the largest centred parts of the shape of `size`, (h, w), resized."""
    fitted = (ImageOps.fit(_open(file), size[::-1], Image.Resampling.BICUBIC) for file in self.files)
    return np.stack([np.asarray(one) for one in fitted])

  def texts(self) -> list[str]:
    """The prompts in words alone."""
    return [prompt.replace(PLACE, self.kind) for prompt in self.prompts]

  def facts(self) -> dict[str, Any]:
    """What it consists of, for receipts."""
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in self.files}
    return {"kind": self.kind, "prompts": list(self.prompts), "files": hashes}


def find(folder: str, prompts: str, kinds: str | None) -> list[Subject]:
  """Finds subjects, in the order of their names, and checks that their pictures can be read.

  Args:
    folder: with a folder for each subject, of its pictures, and perhaps with its own `PROMPTS`.
    prompts: a text file with a prompt on each line, for all other subjects.
    kinds: a CSV file with `NAME,KIND` on each line; without it a kind is the name, with spaces for
      underscores.

  Raises:
    UserError: if one of them is missing or wrong.
  """
  root = pathlib.Path(folder)
  parts = sorted(part for part in root.iterdir() if part.is_dir()) if root.is_dir() else []
  parts = [part for part in parts if not is_hidden(part.name)]
  if not parts:
    raise UserError(f"--subjects={folder}: give a folder with a folder of pictures for each subject")
  common = _read_prompts(pathlib.Path(prompts), f"--prompts={prompts}")
  named = {part.name: part.name.replace("_", " ") for part in parts}
  named = named if kinds is None else _read_kinds(kinds, list(named))
  found = []
  for part in parts:
    files = sorted(file for file in part.iterdir() if is_picture(file.name) and not is_hidden(file.name))
    if not files:
      raise UserError(
        f"--subjects={folder}: the folder {part.name} has no pictures, put {', '.join(SUFFIXES)} files there"
      )
    for file in files:
      _open(file)  # this checks it
    own = _read_prompts(part / PROMPTS, str(part / PROMPTS)) if (part / PROMPTS).exists() else common
    found.append(Subject(part.name, named[part.name], own, tuple(files)))
  return found


@dataclasses.dataclass(frozen=True)
class Networks:
  """The networks that measure; None for those without a number.

  Attributes:
    clip: CLIP's image tower.
    text: its text tower.
    dino: DINO's ViT.
  """

  clip: Space | None
  text: TextTower | None
  dino: Space | None

  def facts(self) -> dict[str, str]:
    """The fingerprint of each network's weights, for receipts."""
    found = {space.name: space.weights for space in (self.clip, self.dino) if space is not None}
    return found if self.text is None else {**found, "clip_text": tree.fingerprint(self.text.params)}

  def score(self, made: np.ndarray, real: np.ndarray, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Scores of generated pictures of a subject.

    Args:
      made: the pictures, uint8 [m, h, w, 3].
      real: those of the subject, uint8 [r, h, w, 3].
      texts: what each generated one should show.

    Returns:
      float64 [m]: "clip_i" and "dino", the mean cosine with the real pictures; "clip_t", the cosine with the
      text. float64 [1], if r > 1: "clip_i_real" and "dino_real", the mean cosine of different real pictures.
    """
    scores, count = {}, len(real)
    for name, space in (("clip_i", self.clip), ("dino", self.dino)):
      if space is None:
        continue
      ours, theirs = _directions(space, made), _directions(space, real)
      scores[name] = (ours @ theirs.T).mean(axis=1)
      if space is self.clip and self.text is not None:
        scores["clip_t"] = (ours * _unit(self.text.embed(texts))).sum(axis=1)
      if count > 1:
        scores[f"{name}_real"] = np.array([(np.sum(theirs @ theirs.T) - count) / (count * (count - 1))])
    return scores


def open_networks(clip: str | None, dino: str | None) -> Networks:
  """Opens CLIP, with its text tower, and DINO, whichever is given.

  Raises:
    UserError: if none is given, CLIP has no text tower, or importers raise it.
  """
  if not (clip or dino):
    raise UserError("give --clip=DIR, --dino=DIR, or both: without a network there is no score")
  text = load_text(clip) if clip else None
  image = feature_spaces.open_space(f"clip:{clip}", None) if clip else None
  return Networks(image, text, feature_spaces.open_space(f"dino:{dino}", None) if dino else None)


def _open(file: pathlib.Path) -> Image.Image:
  return images_lib.on_white(images_lib.open_picture(file, str(file)))


def _directions(space: Space, pictures: np.ndarray) -> np.ndarray:
  """Features of unit length, float64 [b, d]."""
  parts = []
  for start in range(0, len(pictures), _BATCH):
    rows = np.arange(start, start + _BATCH).clip(max=len(pictures) - 1)  # the surplus repeats the last one
    parts.append(gather(space(jnp.asarray(pictures[rows])))[: len(pictures) - start])
  return _unit(np.concatenate(parts))


def _unit(x: np.ndarray) -> np.ndarray:
  x = x.astype(np.float64)
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _read_prompts(file: pathlib.Path, what: str) -> tuple[str, ...]:
  try:
    prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{what} cannot be read ({error}): give a text file with a prompt on each line") from None
  for prompt in filter(None, prompts):
    if prompt.count(PLACE) != 1:
      raise UserError(f"{what}: the prompt '{prompt}' needs {PLACE} once, in place of the image")
  if not any(prompts):
    raise UserError(f"{what} has no prompts: write one on each line, such as 'a {PLACE} on the beach'")
  return tuple(filter(None, prompts))


def _read_kinds(file: str, names: list[str]) -> dict[str, str]:
  try:
    with open(file, encoding="utf-8", newline="") as opened:
      rows = [row for row in csv.reader(opened) if row]
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise UserError(f"--classes={file} cannot be read ({error}): give lines of NAME,CLASS") from None
  for row in rows:
    if len(row) != 2 or not row[1].strip():
      raise UserError(f"--classes={file}: '{','.join(row)}' is not NAME,CLASS, such as 'dog6,dog'")
  found = {name.strip(): kind.strip() for name, kind in rows}
  if missing := [name for name in names if name not in found]:
    known = nearest(missing[0], found)
    raise UserError(f"--classes={file} has no class of the subject '{missing[0]}'{known or ': add a line'}")
  return found
