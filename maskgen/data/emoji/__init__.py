"""Noto emoji with their names: what is held out, captions, and which picture is the right one. No TensorFlow.

A name is a base and, for people and hands, a skin tone, as in "woman firefighter, dark skin tone". Every
combination is drawn, so that a generated picture of a combination that was never trained on can be compared
with the one right picture. Sources and licences: the file NOTICE in this folder.
"""

import collections
import dataclasses
import functools
import pathlib
import re
import zlib

import numpy as np

FILE = pathlib.Path(__file__).parent / "emoji32.npz"
SIDE = 32
TONES = tuple(f"{name} skin tone" for name in ("light", "medium-light", "medium", "medium-dark", "dark"))
SPLITS = ("train", "test")
# Why a combination is held out: its base stands in training in four other tones, or its base is absent, but
# stands there as a man if it is a woman, or vice versa.
HELD_OUT = ("tone", "form")

# The number of bases of which all pictures are held out.
_HELD_OUT_FORMS = 12
_OTHER_FORM = {"man": "woman", "woman": "man"}
# The samples of skin colours, which are in no split.
_LEFT_OUT = "Component"


@dataclasses.dataclass(frozen=True, eq=False)
class Emoji:
  """All pictures and what they are called.

  Attributes:
    images: uint8 [n, 32, 32, 3], on white.
    names: the Unicode names, nearly all of them unique.
    bases: the names without skin tones.
    tones: the skin tones: empty, one of `TONES`, or two of them, as of couples.
    categories, subcategories: the Unicode groups.
  """

  images: np.ndarray
  names: tuple[str, ...]
  bases: tuple[str, ...]
  tones: tuple[str, ...]
  categories: tuple[str, ...]
  subcategories: tuple[str, ...]

  @property
  def classes(self) -> tuple[str, ...]:
    """The categories, which are the classes of the data set."""
    return tuple(dict.fromkeys(category for category in self.categories if category != _LEFT_OUT))

  def split(self, name: str) -> np.ndarray:
    """The indices of the pictures of a split, increasing."""
    test = np.array(self.held_out) != ""
    return np.flatnonzero((test == (name == "test")) & (np.array(self.categories) != _LEFT_OUT))

  @functools.cached_property
  def variants(self) -> dict[str, dict[str, int]]:
    """The index of the picture in each tone, "" included, of bases whose pictures and names are unique."""
    pictures = collections.Counter(picture.tobytes() for picture in self.images)
    names = collections.Counter(self.names)
    found: dict[str, dict[str, int]] = {}
    for i, (base, tone) in enumerate(zip(self.bases, self.tones, strict=True)):
      if tone in ("", *TONES) and names[self.names[i]] == 1 and pictures[self.images[i].tobytes()] == 1:
        found.setdefault(base, {})[tone] = i
    return {base: tones for base, tones in found.items() if len(tones) == 1 + len(TONES)}

  @functools.cached_property
  def held_out(self) -> tuple[str, ...]:
    """Why each picture is in the split "test", one of `HELD_OUT`; "" for all others."""
    found = [""] * len(self.names)
    # A checksum orders names in a way that has nothing to do with what they say.
    bases = sorted(self.variants, key=lambda base: zlib.crc32(base.encode()))
    whole: list[str] = []
    for base in bases:
      if len(whole) < _HELD_OUT_FORMS and self.other_form(base) and self.other_form(base) not in whole:
        whole.append(base)
    for base in whole:
      for i in self.variants[base].values():
        found[i] = "form"
    for rank, base in enumerate(base for base in bases if base not in whole):
      found[self.variants[base][TONES[rank % len(TONES)]]] = "tone"
    return tuple(found)

  def other_form(self, base: str) -> str:
    """The same as a man if it is a woman, and vice versa; "" if there is none."""
    form, role = form_of(base)
    other = _OTHER_FORM.get(form, "") + role
    return other if form and other in self.variants else ""

  def captions(self, index: int) -> tuple[str, ...]:
    """What a picture may be called; its name comes first."""
    return describe(self.bases[index], self.tones[index], self.subcategories[index])

  @functools.cached_property
  def words(self) -> tuple[str, ...]:
    """The words and punctuation marks of all captions."""
    texts = " ".join(caption for i in range(len(self.names)) for caption in self.captions(i))
    return tuple(sorted(set(re.findall(r"[^\W_]+|[^\w\s]", texts.lower()))))


def form_of(base: str) -> tuple[str, str]:
  """Splits a base such as "woman cook" or "man: beard" into "man", "woman" or "", and the rest."""
  match = re.fullmatch("(man|woman)(:? .+)", base)
  return (match[1], match[2]) if match else ("", base)


def describe(base: str, tone: str, subcategory: str = "") -> tuple[str, ...]:
  """The captions of a base in a tone: its Unicode name, then other ways to say the same."""
  name = f"{base}, {tone}" if tone else base
  if subcategory.endswith("flag") and base.endswith(" flag"):
    return name, f"flag of {base.removesuffix(' flag')}"
  plain = base.replace(": beard", " with a beard").replace(": bald", " without hair")
  plain = re.sub(": (.*hair)", r" with \1", plain)
  article = "a " if re.match("(man|woman|person) ", f"{plain} ") else ""
  if not tone:
    return (name,) if article + plain == base else (name, article + plain)
  if tone not in TONES:
    return (name,)
  colour = tone.removesuffix(" skin tone")
  joint = "and" if " with " in plain else "with"
  return name, f"{article}{plain} {joint} {colour} skin", f"{colour}-skinned {plain}"


@functools.cache
def load() -> Emoji:
  """Reads the file that comes with maskgen."""
  with np.load(FILE) as file:
    texts = ("name", "base", "tone", "category", "subcategory")
    names, bases, tones, categories, subcategories = (tuple(file[key].tolist()) for key in texts)
    return Emoji(file["image"], names, bases, tones, categories, subcategories)
