"""How well emoji are edited by words next to an image: every edit has one right picture."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from maskgen import sheet
from maskgen.config import fields
from maskgen.data import emoji
from maskgen.errors import UserError, nearest
from maskgen.evaluators import prompted
from maskgen.evaluators.batches import first_batch, gather, make_keys, one_blas_thread, place
from maskgen.evaluators.context import Batch, Call, Context, Report
from maskgen.evaluators.emoji import card, check_classes, in_other_tone, spread
from maskgen.evaluators.emoji_judge import distances_to_real, judge
from maskgen.evaluators.feature_spaces import Space, open_space
from maskgen.evaluators.prompted import IMAGE, WORD
from maskgen.evaluators.vilex import check_tokens


class Edit(NamedTuple):
  """An edit with a known result.

  Attributes:
    source: the index of the picture to change, one of the training split.
    target: that of the right result, one of the test split.
    word: what to change it to.
  """

  source: int
  target: int
  word: str


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Changes training pictures by words into pictures that are held out; see `maskgen.data.emoji`.

  Kinds of edits: "tone", the skin tone of a base; "form", a man to a woman or vice versa; "role", what a man
  or woman does. Metrics end in `_k<tokens of the image>_s<text guidance>`; with all tokens and the same
  guidance in `_image_s<text guidance>`, for the image alone; and in `_words_s<text guidance>`, for the name
  of the target without an image:
    `edit_followed`: the share of pictures of which the nearest real one has the target's tone.
    `edit_identity`: of which it has the source's base.
    `edit_exact_top1`: of which it is the target.
  They begin with the kind for the others, as in `form_edit_followed`: the nearest real picture is a man or a
  woman as asked for, or has the role asked for; `form_edit_identity` is about the role, and
  `role_edit_identity` about man or woman.
  Picture `edits`: sources, targets and results with the most tokens and the highest guidance.

  One image costs at most 3 * steps calls of the frozen network for each number of tokens, including _image
  and _words, and guidance.

  Attributes:
    prompts: the prompt for each kind: "{}" is the image, "*" the word or words.
    num_tokens: numbers of tokens of the image; if empty, powers of two and all.
    text_guidance: values of the text guidance.
    space: the feature space of distances to real pictures, see `feature_spaces.open_space`.
    num_images: the number of edits of each kind, at most all.
    num_pictures: the number of edits of each kind in the picture.
    seed: image i depends on this, i and its edit, at every training step.
    sampling: other options of `generate`; see `Context.check_sampling`.
  """

  requires: ClassVar[tuple[str, ...]] = ("encode", "generate")

  context: Context
  prompts: Mapping[str, str] = dataclasses.field(
    default_factory=lambda: {"tone": "{} with * skin", "form": "a * {}", "role": "{} *"}
  )
  num_tokens: tuple[int, ...] = ()
  text_guidance: tuple[float, ...] = (2.0, 4.0)
  space: str = "drawing"
  num_images: int = 120
  num_pictures: int = 12
  seed: int = 0
  sampling: Mapping[str, Any] = fields.section(
    took=("steps", "sampler", "image_guidance"), default_factory=dict
  )

  def __post_init__(self):
    check_classes(self.context)
    _ = self._numbers  # this checks `num_tokens`
    if self.context.captions is None:
      raise UserError("the objective takes no captions: remove this evaluation")
    prompted.check_options(self)
    _ = self._space  # this checks `space`
    if not isinstance(self.prompts, Mapping) or not self.prompts:
      raise UserError(f"prompts is {self.prompts!r}: give a prompt for each kind of edit")
    for kind, prompt in self.prompts.items():
      if kind not in _EDITS:
        raise UserError(f"prompts has '{kind}', which is not a kind of edit{nearest(kind, _EDITS)}")
      prompted.check_prompt(kind, prompt)
      self._check_length(kind, prompt)

  def _check_length(self, kind: str, prompt: str) -> None:
    texts = [prompt.replace(WORD, edit.word) for edit in edits(kind)]
    said = prompted.words_around(self.context, texts)["num_words"].sum(axis=1)
    assert self.context.captions is not None
    max_words = self.context.captions.length - 2 - max(self._numbers)
    if said.max() > max_words:
      raise UserError(
        f"prompts.{kind} is '{prompt}': {max_words} words fit next to {max(self._numbers)} tokens, and "
        f"'{texts[said.argmax()]}' has more: shorten it, or give fewer num_tokens"
      )

  def _options(self, guidance: float) -> dict[str, Any]:
    return {**self.sampling, "text_guidance": guidance}

  def trace(self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    tokens = call("encode", {"image": batch["image"]})
    prompted.trace(self.context, call, batch, tokens, **self._options(self.text_guidance[0]))

  @property
  def _numbers(self) -> tuple[int, ...]:
    return check_tokens(self.context, self.num_tokens)

  @functools.cached_property
  def _space(self) -> Space:
    return open_space(self.space, self.context)

  @one_blas_thread
  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Evaluates; `rng` is a typed key."""
    like, known = first_batch(self.context), emoji.load()
    numbers: dict[str, float] = {}
    sections: dict[str, list[sheet.Card]] = {}
    most = max(self._numbers)
    for kind, prompt in self.prompts.items():
      asked = spread(edits(kind), self.num_images)
      sources = self._encode(variables, rng, like, [edit.source for edit in asked])
      texts = [prompt.replace(WORD, edit.word) for edit in asked]
      names = [f"{known.names[edit.target]} {IMAGE}" for edit in asked]
      ways = {f"k{k}": (texts, k) for k in self._numbers}
      ways |= {"image": ([IMAGE] * len(asked), most), "words": (names, 0)}
      for guidance, (way, (said, k)) in itertools.product(sorted(self.text_guidance), ways.items()):
        made = prompted.draw(self.context, variables, rng, like, sources, said, k, **self._options(guidance))
        for name, hits in self._measure(kind, made, asked).items():
          numbers[f"{name}_{way}_s{guidance:g}"] = float(hits.mean())
        if way == f"k{most}":
          sections[f"{kind}: {prompt}"] = self._cards(made, asked)
    return Report(numbers, {"edits": sheet.draw(sections)})

  def _encode(
    self, variables: Any, rng: jax.Array, like: Batch, indices: Sequence[int]
  ) -> dict[str, np.ndarray]:
    """The tokens float32 [m, n, d] of pictures, and the data of their keys."""
    size, parts = len(like["valid"]), []
    for start in range(0, len(indices), size):
      rows = np.array(indices)[np.arange(start, start + size) % len(indices)]
      images = place(like, emoji.load().images[rows])
      parts.append(
        {
          "tokens": gather(self.context.predict["encode"](variables, {"image": images}, rng)),
          "key": gather(jax.random.key_data(make_keys(like, self.seed, start))),
        }
      )
    return {name: np.concatenate([part[name] for part in parts])[: len(indices)] for name in parts[0]}

  def _measure(self, kind: str, made: np.ndarray, asked: Sequence[Edit]) -> dict[str, np.ndarray]:
    known, targets = emoji.load(), np.array([edit.target for edit in asked])
    distances = distances_to_real(self._space, made)
    hits = judge(distances, targets)
    if kind == "tone":
      found = {"edit_followed": hits["tone"], "edit_identity": hits["base"]}
    else:
      nearest = distances.argmin(axis=1)
      shown, right = (np.array([emoji.form_of(known.bases[i]) for i in at]) for at in (nearest, targets))
      form, role = (shown == right).T
      followed, kept = (form, role) if kind == "form" else (role, form)
      found = {f"{kind}_edit_followed": followed, f"{kind}_edit_identity": kept}
    start = "" if kind == "tone" else f"{kind}_"
    return {**found, f"{start}edit_exact_top1": hits["exact"]}

  def _cards(self, made: np.ndarray, asked: Sequence[Edit]) -> list[sheet.Card]:
    known = emoji.load()
    return [
      card([known.images[asked[i].source], known.images[asked[i].target], made[i]], [asked[i].word], "")
      for i in spread(range(len(asked)), self.num_pictures)
    ]


def edits(kind: str) -> list[Edit]:
  """All edits of a kind whose source is in the training split."""
  known = emoji.load()
  held_out = [i for i, why in enumerate(known.held_out) if why == ("form" if kind == "form" else "tone")]
  found = (_EDITS[kind](i) for i in held_out)
  return [edit for edit in found if edit is not None and not known.held_out[edit.source]]


def _tone_edit(target: int) -> Edit:
  tone = emoji.load().tones[target]
  return Edit(in_other_tone(target), target, tone.removesuffix(" skin tone"))


def _form_edit(target: int) -> Edit:
  known = emoji.load()
  base = known.bases[target]
  source = known.variants[known.other_form(base)][known.tones[target]]
  return Edit(source, target, emoji.form_of(base)[0])


def _role_edit(target: int) -> Edit | None:
  """From another role of the same form, one whose picture in this tone is in the training split."""
  known = emoji.load()
  form, role = emoji.form_of(known.bases[target])
  same = [base for base in known.variants if emoji.form_of(base)[0] == form]
  if not role.startswith(" "):  # "woman: red hair" has no word for what she does
    return None
  at = same.index(known.bases[target]) + len(same) // 2  # neighbours may only face another way
  sources = (known.variants[same[i % len(same)]][known.tones[target]] for i in range(at, at + len(same)))
  return Edit(next(i for i in sources if not known.held_out[i]), target, role.strip())


_EDITS = {"tone": _tone_edit, "form": _form_edit, "role": _role_edit}
