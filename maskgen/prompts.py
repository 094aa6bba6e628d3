"""Prompts in the space of word embeddings, where vectors that no word has can stand among words.

Letters: b batch, l positions of a prompt, n vectors of a run, d width.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskgen.errors import UserError, nearest

DISTRIBUTIONS = ("uniform", "powers", "all")
# Where an image stands in its caption: before or behind the whole of it, or in place of some words.
PLACES = ("before", "behind", "within")


class Run(NamedTuple):
  """Vectors of which a prompt has the first ones.

  Attributes:
    vectors: float [b, n, d].
    number: int32 [b], how many of them, 0 to n.
  """

  vectors: jax.Array
  number: jax.Array


class Frame(NamedTuple):
  """What stands around the content of a prompt: the embeddings of special ids, float [d]."""

  start: jax.Array
  end: jax.Array
  padding: jax.Array


class Prompt(NamedTuple):
  """What a text encoder takes.

  Attributes:
    embeddings: float [b, l, d], without positions.
    end: int32 [b], the position of the end.
  """

  embeddings: jax.Array
  end: jax.Array


def assemble(runs: Sequence[Run], frame: Frame, length: int) -> Prompt:
  """Puts runs behind each other: start, the first vectors of each run, end, padding.

  What a run leaves out leaves no gap, so that a prompt with k of n vectors is the one with a run of k
  vectors, bit for bit, and what follows the end is padding as behind a short text. Numbers are traced: other
  ones compile nothing anew.

  Args:
    runs: in their order, not more than length - 2 vectors in all (see `room`); more are cut at the end.
    frame: the special embeddings.
    length: l.
  """
  vectors = jnp.concatenate([run.vectors for run in runs], axis=1)
  used = jnp.concatenate(
    [jnp.arange(run.vectors.shape[1])[None] < run.number[:, None] for run in runs], axis=1
  )
  content = jnp.take_along_axis(vectors, jnp.argsort(~used, axis=1, stable=True)[..., None], axis=1)
  content = jnp.pad(content, ((0, 0), (1, max(0, length - 1 - content.shape[1])), (0, 0)))[:, :length]
  end = jnp.minimum(used.sum(axis=1) + 1, length - 1).astype(jnp.int32)
  at, last = jnp.arange(length)[None, :, None], end[:, None, None]
  start, stop, padding = (vector[None, None] for vector in frame)
  around = jnp.where(at == 0, start, jnp.where(at == last, stop, padding))
  return Prompt(jnp.where((at > 0) & (at < last), content, around), end)


def room(number: jax.Array, words: jax.Array, length: int) -> jax.Array:
  """How many of so many vectors fit beside so many words: the words stay, and the tail is cut.

  Args:
    number: int32 [b].
    words: int32 [b].
    length: of the prompt.
  """
  return jnp.minimum(number, length - 2 - words)


def around(keys: jax.Array, words: Run, place: str) -> tuple[Run, Run]:
  """What of words is before, and what is behind an image that has a place among them.

  Args:
    keys: one per example.
    words: n of them, of which an image "within" replaces some in a row: those between two of the places 0 to
      n, drawn uniformly.
    place: one of `PLACES`.
  """

  def cut(key: jax.Array, number: jax.Array) -> jax.Array:
    return jnp.sort(jax.random.randint(key, (2,), 0, number + 1))

  if place == "within":
    first, last = jax.vmap(cut)(keys, words.number).T
  else:
    first = last = words.number * (place == "behind")
  at = jnp.arange(words.vectors.shape[1])[None] + last[:, None]
  behind = jnp.take_along_axis(words.vectors, at[..., None], axis=1, mode="clip")
  return words._replace(number=first), Run(behind, words.number - last)


@dataclasses.dataclass(frozen=True)
class TailDrop:
  """How many of an image's n tokens an example is trained with: the first k, which become the coarse ones.

  Wang et al. 2024, section 3, do not say how k is drawn. "uniform" is as for the quantizers of SoundStream
  (Zeghidour et al. 2021, section 3.4).

  Attributes:
    distribution: "uniform" over 1 .. n, "powers" of two up to n, and n, or "all" for no dropping.
    full: the share of examples that keep all n, whatever the distribution.
  """

  distribution: str = "uniform"
  full: float = 0.25

  def __post_init__(self):
    if self.distribution not in DISTRIBUTIONS:
      raise UserError(
        f"distribution '{self.distribution}' does not exist{nearest(self.distribution, DISTRIBUTIONS)}"
      )
    if not 0.0 <= self.full <= 1.0:
      raise UserError(f"full is {self.full}: it is a share, from 0 to 1")

  def choices(self, n: int) -> np.ndarray:
    """The numbers of tokens that are equally likely, int32, in rising order."""
    if self.distribution == "uniform":
      return np.arange(1, n + 1, dtype=np.int32)
    powers = [2**i for i in range(n.bit_length())] if self.distribution == "powers" else []
    return np.unique(np.array([*powers, n], np.int32))

  def draw(self, keys: jax.Array, n: int) -> jax.Array:
    """Draws int32 [b] from one key per example."""
    choices = jnp.asarray(self.choices(n))

    def one(key: jax.Array) -> jax.Array:
      share, choice = jax.random.split(key)
      k = jax.random.choice(choice, choices)
      return jnp.where(jax.random.bernoulli(share, self.full), n, k)

    return jax.vmap(one)(keys)
