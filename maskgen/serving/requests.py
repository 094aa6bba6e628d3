"""Checks of user arguments for generation: number of images, seed, prompts, labels and options."""

import contextlib
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskgen import images as images_lib
from maskgen.errors import UserError, nearest
from maskgen.numerics.text import Captions

# A class, or one per image.
Label = int | str | Sequence[int | str] | np.ndarray

_BATCH = 16
# Folded into an image's key to draw its class; sampling uses the numbers of its steps.
_DRAW = 2**31 - 1
# More names of classes are not listed in an error.
_MOST_NAMES = 20


def whole(name: str, value: Any, least: int | None = None) -> int:
  """Checks an integer given by a user, of Python, NumPy or JAX, and returns it as int.

  Raises:
    UserError: for any other value, or one less than `least`.
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
  """Returns the number of images: `batch`; by default one per entry of the first list in `conditions`, or 16.

  Raises:
    UserError: if it is less than 1.
  """
  if batch is None:
    several = [given for given in conditions if _listed(given)]
    batch = len(several[0]) if several else _BATCH
  return whole("batch", batch, least=1)


def _listed(given: Any) -> bool:
  """Whether a condition is several, one per image."""
  return isinstance(given, list | tuple) or np.ndim(given) > 0


def key(seed: int) -> jax.Array:
  """Returns the key of a seed.

  Raises:
    UserError: if the seed is not a whole number of 32 bits; JAX would use the last 32 bits of a larger one.
  """
  seed = whole("seed", seed)
  if not -(2**31) <= seed < 2**32:
    raise UserError(f"seed is {seed}: give a whole number from 0 to 2**32 - 1")
  return jax.random.key(seed)


def padded(count: int) -> int:
  """Returns the size of the batch that computes `count` rows: the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...

  Each size is a program to compile; with these, most batches are of a size that was there before.
  """
  power = 1 << (count - 1).bit_length()
  return 3 * power // 4 if 4 * count <= 3 * power else power


def take(values: Any, rows: np.ndarray) -> Any:
  """Returns rows of an array or of keys [b]; nothing is compiled, as indexing on devices would be."""
  if jax.dtypes.issubdtype(values.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(np.asarray(jax.random.key_data(values))[rows])
  return np.asarray(values)[rows]


def keys(seed: int, batch: int, start: int = 0) -> jax.Array:
  """Returns the keys of images `start`, `start + 1`, ...; the key of image i depends only on the seed and i.

  Raises:
    UserError: as `key` does.
  """
  numbers = np.arange(start, start + padded(batch), dtype=np.uint32)
  return take(_fold_in(key(seed), numbers), np.arange(batch))


_fold_in = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))


def draws(seed: int, numbers: Sequence[int], choices: int) -> np.ndarray:
  """Returns a random choice for each of some images, int [n]; it depends only on the seed and their numbers.

  Raises:
    UserError: as `key` does.
  """
  root = key(seed)

  def draw(number: jax.Array) -> jax.Array:
    return jax.random.randint(jax.random.fold_in(jax.random.fold_in(root, number), _DRAW), (), 0, choices)

  return np.asarray(jax.vmap(draw)(jnp.asarray(numbers)))


def captions(prompt: Any, batch: int, reader: Captions | None) -> np.ndarray:
  """Returns the token ids of one prompt for all images, or of one per image, int32 [batch, length].

  Raises:
    UserError: if the prompts are not texts, their number is wrong, or the model takes none.
  """
  if reader is None:
    raise UserError("prompt is given: this model was trained without captions, leave it out")
  prompts = list(prompt) if _listed(prompt) else [prompt]
  if not all(isinstance(one, str) for one in prompts):
    raise UserError(f"prompt is {prompt!r}: give a text, or one per image")
  if len(prompts) not in (1, batch):
    raise UserError(
      f"prompt has {len(prompts)} entries for {batch} images: give one per image, or a single text"
    )
  return np.broadcast_to(reader.read(prompts), (batch, reader.length))


def find_class(name: str, names: Sequence[str] | None) -> int:
  """Returns the number of the class of this name.

  Raises:
    UserError: if there is none.
  """
  if names is None:
    raise UserError(f"label is '{name}': this model does not store the names of its classes, give numbers")
  if name not in names:
    known = nearest(name, names) if len(names) <= _MOST_NAMES else "; model.classes lists them"
    raise UserError(f"label is '{name}': the model has no class of this name{known}")
  return names.index(name)


def labels(label: Label, batch: int, classes: int, names: Sequence[str] | None = None) -> np.ndarray:
  """Returns the class of each image, int32 [batch].

  Args:
    label: a number or a name, or one per image.
    batch: the number of images.
    classes: the number of classes.
    names: their names, if known.

  Raises:
    UserError: if they are not classes of the model, their number is wrong, or the model takes none.
  """
  if not classes:
    raise UserError("label is given: this model was trained without classes, leave it out")
  if isinstance(label, str):
    label = find_class(label, names)
  given = images_lib.regular(label, "label", "give a number or a name, or one per image")
  if given.dtype.kind == "U":  # names, perhaps among numbers
    each = np.asarray(label, object)
    given = np.asarray([find_class(one, names) if isinstance(one, str) else one for one in each])
  if not np.issubdtype(given.dtype, np.integer) or given.ndim > 1:
    raise UserError(f"label is {given.dtype}{list(given.shape)}: give an integer, or one per image")
  if given.ndim and len(given) != batch:
    raise UserError(f"label has {len(given)} entries for {batch} images: give one per image, or an integer")
  if given.min() < 0 or given.max() >= classes:
    raise UserError(f"label ranges over {given.min()}..{given.max()}: classes are 0..{classes - 1}")
  return np.broadcast_to(given, (batch,)).astype(np.int32)


def options(given: dict[str, Any]) -> dict[str, Any]:
  """Converts NumPy and JAX scalars to Python scalars, because static options must be hashable."""
  return {
    name: value.item() if hasattr(value, "item") and not np.shape(value) else value
    for name, value in given.items()
  }
