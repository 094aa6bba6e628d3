"""What users ask a model to draw: how many images, with which seed, texts, classes and options."""

import contextlib
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskgen.errors import UserError
from maskgen.numerics.text import Captions

_BATCH = 16


def whole(name: str, value: Any, least: int | None = None) -> int:
  """A whole number that a user gives, as Python, NumPy or JAX have it.

  Raises:
    UserError: for anything else, or less than `least`.
  """
  number = None
  with contextlib.suppress(TypeError):
    number = None if isinstance(value, bool) else operator.index(value)
  if number is None or (least is not None and number < least):
    raise UserError(
      f"{name} is {value!r}: give a whole number" + ("" if least is None else f", at least {least}")
    )
  return number


def count(batch: int | None, *conditions: Any) -> int:
  """How many images: `batch`, by default one for each entry of the first condition that is a list, or 16.

  Raises:
    UserError: for less than one.
  """
  if batch is None:
    several = [given for given in conditions if given is not None and np.ndim(given)]
    batch = np.size(several[0]) if several else _BATCH
  return whole("batch", batch, least=1)


def keys(seed: int, batch: int) -> jax.Array:
  """One key per image, whatever the batch.

  Raises:
    UserError: if the seed is no whole number.
  """
  seed = whole("seed", seed)
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(batch))


def captions(prompt: Any, batch: int, reader: Captions | None) -> np.ndarray:
  """The ids of a text, or of one per image, int32 [batch, length].

  Raises:
    UserError: if the prompts are no texts or too many, or the model reads none.
  """
  if reader is None:
    raise UserError("prompt is given: this model was trained without captions, leave it out")
  prompts = list(prompt) if np.ndim(prompt) else [prompt]
  if not all(isinstance(one, str) for one in prompts):
    raise UserError(f"prompt is {prompt!r}: give a text, or one per image")
  if len(prompts) not in (1, batch):
    raise UserError(
      f"prompt has {len(prompts)} entries for {batch} images: give one per image, or a single one"
    )
  return np.broadcast_to(reader.read(prompts), (batch, reader.length))


def labels(label: int | Sequence[int] | np.ndarray, batch: int, classes: int) -> np.ndarray:
  """The class of each image, int32 [batch].

  Raises:
    UserError: if they are no classes of the model or too many, or the model has none.
  """
  given = np.asarray(label)
  if not classes:
    raise UserError("label is given: this model was trained without classes, leave it out")
  if not np.issubdtype(given.dtype, np.integer) or given.ndim > 1:
    raise UserError(f"label is {given.dtype}{list(given.shape)}: give an integer, or one per image")
  if given.ndim and len(given) != batch:
    raise UserError(f"label has {len(given)} entries for {batch} images: give one per image, or a single one")
  if given.min() < 0 or given.max() >= classes:
    raise UserError(f"label ranges over {given.min()}..{given.max()}: classes are 0..{classes - 1}")
  return np.broadcast_to(given, (batch,)).astype(np.int32)


def options(given: dict[str, Any]) -> dict[str, Any]:
  """Options with scalars of NumPy and JAX as Python's: those that are static must be hashable."""
  return {
    name: value.item() if hasattr(value, "item") and not np.shape(value) else value
    for name, value in given.items()
  }
