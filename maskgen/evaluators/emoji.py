"""Whether generated emoji are the ones that their captions name, for combinations never trained on."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from maskgen import images as images_lib
from maskgen import sheet
from maskgen.config import fields
from maskgen.data import emoji
from maskgen.errors import UserError
from maskgen.evaluators.batches import first_batch, gather, generate, key_shapes, one_blas_thread, place
from maskgen.evaluators.context import Call, Context, Report
from maskgen.evaluators.emoji_judge import distances_to_real, judge
from maskgen.evaluators.feature_spaces import Space, open_space

_SHOWN_SIDE = 96  # pixels, of pictures on the contact sheet
# The number of training pictures among which the nearest is looked for.
_CANDIDATES = 64


def check_classes(context: Context) -> None:
  """Checks that a run is on emoji.

  Raises:
    UserError: if not.
  """
  if context.class_names != emoji.load().classes:
    raise UserError("it needs data.source='emoji': remove this evaluation")


def wanted_pictures(limit: int) -> dict[str, np.ndarray]:
  """The indices of at most `limit` pictures of each group, spread over the data set.

  The groups are those of `emoji.HELD_OUT`, and "seen": the bases of the first group in the next tone.
  """
  known = emoji.load()
  groups: dict[str, list[int]] = {
    kind: [i for i, why in enumerate(known.held_out) if why == kind] for kind in emoji.HELD_OUT
  }
  groups["seen"] = [in_other_tone(i) for i in groups["tone"]]
  return {kind: np.array(spread(found, limit)) for kind, found in groups.items()}


def spread(values: Sequence[Any], limit: int) -> list[Any]:
  """At most `limit` of the values, evenly spread."""
  at = np.linspace(0, len(values) - 1, min(limit, len(values))).round().astype(int)
  return [values[i] for i in np.unique(at)]


def in_other_tone(index: int) -> int:
  """The same base in the next tone, for a picture of a base in `emoji.Emoji.variants`."""
  known = emoji.load()
  tones = list(known.variants[known.bases[index]].values())
  return tones[1:][(tones.index(index)) % len(emoji.TONES)]


def with_other_base(index: int) -> int:
  """The same tone of another base, for a picture of a base in `emoji.Emoji.variants`."""
  known = emoji.load()
  bases = list(known.variants)
  other = bases[(bases.index(known.bases[index]) + len(bases) // 2) % len(bases)]
  return known.variants[other][known.tones[index]]


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Generates emoji from their names, or reconstructs them, and finds the nearest real picture of all.

  Metrics of combinations of a base and a tone that are held out (`maskgen.data.emoji`):
    `base_top1`: the share of pictures of which the nearest real one has the right base.
    `tone_top1`: of which it has the right tone.
    `exact_top1`: of which it is the very picture.
    `distance`: the root mean squared error to the right picture, from 0 to 1, averaged over pictures;
      `distance_train`: to the nearest of the training pictures that are most alike at 8 x 8 pixels.
  They begin with `form_` for bases that are held out altogether, but known as a man or a woman, and with
  `seen_` for combinations of the training split, which the model may remember. They end in
  `_reconstructed` for the tokenizer's reconstructions, the upper bound if the model has a tokenizer, and, of
  the first three, in `_floor` for the same pictures, judged as if the captions had asked for another base or,
  for tone and exact, another tone; and in the name of any further feature space.
  Picture `emoji`: right pictures beside generated or reconstructed ones. Table `emoji`: the shares of what is
  held out by subcategory, such as "person-role".

  Attributes:
    spaces: feature spaces in which pictures are compared, see `feature_spaces.open_space`; the first is that
      of metrics without a name.
    num_images: the number of pictures of each group, at most all: 301, 72 and 301.
    num_pictures: the number of pictures on the contact sheet.
    seed: image i depends only on this and its caption, at every training step.
    sampling: options of `generate`; see `Context.check_sampling`.
  """

  requires: ClassVar[tuple[str, ...]] = ()

  context: Context
  spaces: tuple[str, ...] = ("drawing",)
  num_images: int = 301
  num_pictures: int = 48
  seed: int = 0
  sampling: Mapping[str, Any] = fields.section(took=("steps", "sampler", "guidance"), default_factory=dict)

  def __post_init__(self):
    check_classes(self.context)
    if not self._ways:
      raise UserError("the objective neither reconstructs images nor takes captions: remove this evaluation")
    if self.num_images < 1 or self.num_pictures < 1 or not self.spaces:
      raise UserError(
        f"num_images is {self.num_images}, num_pictures is {self.num_pictures} and spaces is {self.spaces}: "
        "give at least 1 of each"
      )
    _ = self._spaces  # this checks `spaces`
    if "generate" in self._ways:
      self.context.check_sampling(self.sampling)

  @property
  def _ways(self) -> tuple[str, ...]:
    """What makes pictures: generation from captions first."""
    known = ("generate",) if self.context.captions is not None else ()
    return tuple(way for way in (*known, "reconstruct") if way in self.context.predict)

  @functools.cached_property
  def _spaces(self) -> list[Space]:
    return [open_space(space, self.context) for space in self.spaces]

  def trace(self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    if "generate" in self._ways:
      call("generate", {"key": key_shapes(batch), "caption": batch["caption"]}, **self.sampling)
    if "reconstruct" in self._ways:
      call("reconstruct", {"image": batch["image"]})

  @one_blas_thread
  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Evaluates; `rng` is a typed key."""
    numbers: dict[str, float] = {}
    cards: list[sheet.Card] = []
    rows: list[dict[str, Any]] = []
    groups = wanted_pictures(self.num_images)
    for (group, wanted), way in itertools.product(groups.items(), self._ways):
      made = self._make(way, variables, rng, wanted)
      found = _errors(made, wanted)
      for number, space in enumerate(self._spaces):
        distances, end = distances_to_real(space, made), f"_{space.name}" if number else ""
        hits = judge(distances, wanted)
        found |= {f"{name}_top1{end}": float(values.mean()) for name, values in hits.items()}
        if way == "generate":
          found |= {f"{name}_top1_floor{end}": value for name, value in _floors(distances, wanted).items()}
        if not number and way == self._ways[0] and group in emoji.HELD_OUT:
          cards += self._cards(made, distances, wanted)
          rows += _rows(group, hits, wanted)
      start = "" if group == "tone" else f"{group}_"
      ending = "_reconstructed" if way == "reconstruct" else ""
      numbers |= {f"{start}{name}{ending}": value for name, value in found.items()}
    picture = sheet.draw({"right pictures and made ones": cards})
    return Report(numbers, {"emoji": picture}, {"emoji": rows})

  def _make(self, way: str, variables: Any, rng: jax.Array, wanted: np.ndarray) -> np.ndarray:
    """Pictures float32 [m, h, w, c] made from the captions, or of the right pictures themselves."""
    known, like, fn = emoji.load(), first_batch(self.context), self.context.predict[way]
    size = len(like["valid"])
    if way == "generate":
      assert self.context.captions is not None
      captions = self.context.captions.read([known.names[i] for i in wanted])
      pictures = generate(
        fn,
        variables,
        rng,
        like=like,
        seed=self.seed,
        num_images=len(wanted),
        captions=captions,
        **self.sampling,
      )
      return np.concatenate([gather(made)[:count] for made, count in pictures])
    parts = []
    for start in range(0, len(wanted), size):
      rows = wanted[(start + np.arange(size)) % len(wanted)]  # the surplus repeats the first rows
      parts.append(gather(fn(variables, {"image": place(like, known.images[rows])}, rng)))
    return np.concatenate(parts)[: len(wanted)]

  def _cards(self, made: np.ndarray, distances: np.ndarray, wanted: np.ndarray) -> list[sheet.Card]:
    known, nearest = emoji.load(), distances.argmin(axis=1)
    return [
      card(
        [known.images[wanted[i]], made[i]],
        [known.names[wanted[i]]],
        "" if nearest[i] == wanted[i] else known.names[nearest[i]],
      )
      for i in spread(range(len(wanted)), max(self.num_pictures // len(emoji.HELD_OUT), 1))
    ]


def card(pictures: Sequence[np.ndarray], texts: Sequence[str], name: str) -> sheet.Card:
  """A card of small pictures, uint8 or float."""
  large = [images_lib.enlarge(images_lib.to_uint8(picture), _SHOWN_SIDE) for picture in pictures]
  return sheet.Card(large, texts, name)


def _errors(made: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
  """Mean root mean squared errors to the right pictures, and to the nearest training pictures."""
  known = emoji.load()

  def errors(pictures: np.ndarray, one: np.ndarray) -> np.ndarray:
    return np.square(pictures / np.float32(255) - np.clip(one, 0.0, 1.0)).mean(axis=(-3, -2, -1))

  train = known.images[known.split("train")]
  # Only the nearest in 8 x 8 pixels are compared in all pixels.
  rough = distances_to_real(open_space("pixels", None), made)[:, known.split("train")]
  near = rough.argsort(axis=1)[:, :_CANDIDATES]
  right = [errors(known.images[i], one) for i, one in zip(wanted, made, strict=True)]
  nearest = [errors(train[at], one).min() for at, one in zip(near, made, strict=True)]
  return {"distance": float(np.sqrt(right).mean()), "distance_train": float(np.sqrt(nearest).mean())}


def _floors(distances: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
  """The shares of `judge`, as if the captions had asked for another base, or another tone."""
  others = {"base": with_other_base, "tone": in_other_tone, "exact": in_other_tone}
  return {
    name: float(judge(distances, np.array([other(i) for i in wanted]))[name].mean())
    for name, other in others.items()
  }


def _rows(group: str, hits: Mapping[str, np.ndarray], wanted: np.ndarray) -> list[dict[str, Any]]:
  of = np.array([emoji.load().subcategories[i] for i in wanted])
  return [
    {"held out": group, "subcategory": str(name), "pictures": int(np.sum(of == name))}
    | {f"{kind}_top1": float(values[of == name].mean()) for kind, values in hits.items()}
    for name in np.unique(of)
  ]
