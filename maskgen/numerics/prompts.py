"""Prompts in the space of word embeddings, which mix embeddings of words with other vectors.

Letters: b batch, l positions of a prompt, n vectors of a segment, d width.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskgen.errors import UserError, nearest

PLACE = "{}"  # of an image in a text
DISTRIBUTIONS = ("uniform", "powers", "all")
# The position of an image relative to its caption: before it, behind it, or in place of some of its words.
PLACES = ("before", "behind", "within")


class Segment(NamedTuple):
  """Vectors, of which a prompt contains the first `number`.

  Attributes:
    vectors: float [b, n, d].
    number: int32 [b], the number of vectors used, 0 to n.
  """

  vectors: jax.Array
  number: jax.Array


class Frame(NamedTuple):
  """The embeddings of the special ids around a prompt's content, float [d]."""

  start: jax.Array
  end: jax.Array
  padding: jax.Array


class Prompt(NamedTuple):
  """The input of a text encoder.

  Attributes:
    embeddings: float [b, l, d], without position embeddings.
    end: int32 [b], the position of the end id.
  """

  embeddings: jax.Array
  end: jax.Array


def assemble(segments: Sequence[Segment], frame: Frame, length: int) -> Prompt:
  """Concatenates start, the first vectors of each segment, end and padding.

  Unused vectors leave no gap, so that a prompt with k of n vectors equals one with a segment of k vectors,
  bit for bit, and padding follows the end as after a short text. Numbers are traced: changing them does not
  recompile.

  Args:
    segments: in order, with at most length - 2 vectors in total (see `num_fitting`); excess ones are cut at
      the end.
    frame: the special embeddings.
    length: l.
  """
  vectors = jnp.concatenate([segment.vectors for segment in segments], axis=1)
  used = jnp.concatenate(
    [jnp.arange(segment.vectors.shape[1])[None] < segment.number[:, None] for segment in segments], axis=1
  )
  content = jnp.take_along_axis(vectors, jnp.argsort(~used, axis=1, stable=True)[..., None], axis=1)
  content = jnp.pad(content, ((0, 0), (1, max(0, length - 1 - content.shape[1])), (0, 0)))[:, :length]
  end = jnp.minimum(used.sum(axis=1) + 1, length - 1).astype(jnp.int32)
  at, last = jnp.arange(length)[None, :, None], end[:, None, None]
  start, stop, padding = (vector[None, None] for vector in frame)
  around = jnp.where(at == 0, start, jnp.where(at == last, stop, padding))
  return Prompt(jnp.where((at > 0) & (at < last), content, around), end)


def num_fitting(number: jax.Array, words: jax.Array, length: int) -> jax.Array:
  """The number of vectors that fit in a prompt with words: all words stay, and the vectors' tail is cut.

  Args:
    number: of vectors, int32 [b].
    words: the number of words, int32 [b].
    length: of the prompt.
  """
  return jnp.minimum(number, length - 2 - words)


class Templates(NamedTuple):
  """Texts around an image, such as "a photo of" and nothing; t of them.

  Attributes:
    before: the words before the image, float [t, m, d], and their numbers, int32 [t].
    behind: those behind it, likewise.
  """

  before: Segment
  behind: Segment


class WordsAround(NamedTuple):
  """The words around the image of a training example.

  Attributes:
    before: words before the image.
    behind: words after it.
    hue_shift: int32 [b], the hue shift of the image that the encoder sees, in multiples of 60 degrees.
  """

  before: Segment
  behind: Segment
  hue_shift: jax.Array


@dataclasses.dataclass(frozen=True)
class Words:
  """Training with words around the image, those of its caption or neutral ones: not in Wang et al. 2024.

  Attributes:
    share: of the examples that are trained with words.
    templates: neutral texts, with "{}" in place of the image, as for textual inversion (Gal et al. 2022,
      section 4.1).
    templated: the share of the examples with words whose words are a template instead of their caption. An
      example with an empty caption always has one, if there are templates. With 1, captions are not read.
    place: the position of their image: "before" the caption, "behind" it, or "within" it, in place of
      consecutive words. Later positions attend to earlier ones.
    subject: words for what images show, such as "dog" and "cat". An image within its caption replaces the
      first of these and random words around it; without any, it replaces random words, or none.
    recoloured: the share of these examples whose image is hue-shifted for the encoder, see
      `maskgen.images.shift_hues`, so that the model learns to follow words where they contradict the image.
      On each side of a hue-shifted image within its caption, all words up to the subject are kept half of the
      time, so that they name the hues.
  """

  share: float = 0.0
  place: str = "before"
  subject: tuple[str, ...] = ()
  recoloured: float = 0.0
  templates: tuple[str, ...] = ()
  templated: float = 0.0

  def __post_init__(self):
    for name in ("share", "recoloured", "templated"):
      if not 0.0 <= getattr(self, name) <= 1.0:
        raise UserError(f"{name} is {getattr(self, name)}: give a share from 0 to 1")
    for template in self.templates:
      if template.count(PLACE) != 1:
        raise UserError(
          f"the template '{template}' does not have one {PLACE}: write it in place of the image"
        )
    if self.templated and not self.templates:
      raise UserError(f"templated is {self.templated} but there are no templates: give some")
    if self.recoloured and self.templated == 1:
      raise UserError("recoloured has no effect on templates, which name no hues: give templated below 1")
    if self.place not in PLACES:
      raise UserError(f"place '{self.place}' does not exist{nearest(self.place, PLACES)}")
    if self.recoloured and not self.share:
      raise UserError(f"recoloured is {self.recoloured} but share is 0: give a share of examples with words")
    if self.subject and self.place != "within":
      raise UserError(f"subject requires place='within', but place is '{self.place}'")

  @property
  def read_captions(self) -> bool:
    """Whether any words are those of captions."""
    return self.share > 0 and self.templated < 1

  def draw(
    self, keys: jax.Array, caption: Segment, subjects: jax.Array, templates: Templates | None = None
  ) -> WordsAround:
    """Draws the words around images.

    Args:
      keys: one per example.
      caption: of m words.
      subjects: bool [b, m], which of the words are subjects.
      templates: also of m words on each side; None for none.
    """

    def cut(key: jax.Array, number: jax.Array, subjects: jax.Array) -> tuple[jax.Array, ...]:
      say, turn, hue, one, other, near = jax.random.split(key, 6)
      spoken = jax.random.bernoulli(say, self.share)
      number *= spoken & ~jax.random.bernoulli(jax.random.fold_in(key, 6), self.templated)
      turned = (number > 0) & jax.random.bernoulli(turn, self.recoloured)
      hue_shift = jnp.where(turned, jax.random.randint(hue, (), 1, 6), 0)
      if self.place != "within":
        return jnp.full((2,), number * (self.place == "behind")), number, hue_shift, spoken
      at = subjects.argmax()
      known = subjects[at] & (at < number)
      first = jax.random.randint(one, (), 0, jnp.where(known, at, number) + 1)
      last = jax.random.randint(other, (), jnp.where(known, at + 1, 0), number + 1)
      ends = jnp.sort(jnp.stack([first, last]))
      close = turned & known & jax.random.bernoulli(near, shape=(2,))
      return jnp.where(close, jnp.stack([at, at + 1]), ends), number, hue_shift, spoken

    ends, number, hue_shift, spoken = jax.vmap(cut)(keys, caption.number, subjects)
    first, last = ends.T
    at = jnp.arange(caption.vectors.shape[1])[None] + last[:, None]
    behind = jnp.take_along_axis(caption.vectors, at[..., None], axis=1, mode="clip")
    words = WordsAround(caption._replace(number=first), Segment(behind, number - last), hue_shift)
    if templates is None:
      return words
    count = len(templates.before.number)
    index = jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 7), (), 0, count))(keys)
    return _fill(words, spoken & (number == 0), index, templates)


def _fill(words: WordsAround, filled: jax.Array, index: jax.Array, templates: Templates) -> WordsAround:
  """Replaces the words of some examples, bool [b], by those of the templates of an index, int32 [b]."""

  def fill(own: Segment, other: Segment) -> Segment:
    vectors = jnp.where(filled[:, None, None], other.vectors[index], own.vectors)
    return Segment(vectors, jnp.where(filled, other.number[index], own.number))

  return WordsAround(
    fill(words.before, templates.before), fill(words.behind, templates.behind), words.hue_shift
  )


@dataclasses.dataclass(frozen=True)
class TailDrop:
  """Trains each example with the first k of its image's n tokens, which therefore become the coarse ones.

  Wang et al. 2024, section 3, do not say how k is drawn. "uniform" is how SoundStream drops quantizers
  (Zeghidour et al. 2021, section 3.4).

  Attributes:
    distribution: "uniform" over 1 .. n, "powers" of two up to n and n itself, or "all" for no dropping.
    full: the share of examples that keep all n, with any distribution.
  """

  distribution: str = "uniform"
  full: float = 0.25

  def __post_init__(self):
    if self.distribution not in DISTRIBUTIONS:
      raise UserError(
        f"distribution '{self.distribution}' does not exist{nearest(self.distribution, DISTRIBUTIONS)}"
      )
    if not 0.0 <= self.full <= 1.0:
      raise UserError(f"full is {self.full}: give a share from 0 to 1")

  def choices(self, n: int) -> np.ndarray:
    """The numbers of tokens, equally likely, int32, in increasing order."""
    if self.distribution == "uniform":
      return np.arange(1, n + 1, dtype=np.int32)
    powers = [2**i for i in range(n.bit_length())] if self.distribution == "powers" else []
    return np.unique(np.array([*powers, n], np.int32))

  def draw(self, keys: jax.Array, n: int) -> jax.Array:
    """Draws k, int32 [b], from one key per example."""
    choices = jnp.asarray(self.choices(n))

    def one(key: jax.Array) -> jax.Array:
      share, choice = jax.random.split(key)
      k = jax.random.choice(choice, choices)
      return jnp.where(jax.random.bernoulli(share, self.full), n, k)

    return jax.vmap(one)(keys)
