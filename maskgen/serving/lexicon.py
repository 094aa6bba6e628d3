"""Images among the words of a prompt, as users give them: "a {} on a red background", and a picture.

Letters: s images, n tokens of an image, d their width, m words, p pieces of a prompt.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import safetensors.numpy
from etils import epath

from maskgen.errors import UserError
from maskgen.importers import tensors as tensors_lib
from maskgen.objectives import vilex

PLACE = "{}"
# The tensor of a file of tokens.
_TOKENS = "tokens"
# How many tokens: of every image, or of each; None for as many as fit.
Numbers = int | Sequence[int | None] | None


def check_number(objective: vilex.Objective, num_tokens: int | None) -> int:
  """How many tokens of an image are wanted, by default all.

  Raises:
    UserError: for a number that the model does not have.
  """
  if num_tokens is None:
    return objective.tokens
  if not isinstance(num_tokens, int | np.integer) or not 1 <= num_tokens <= objective.tokens:
    raise UserError(f"num_tokens is {num_tokens!r}: this model has 1 to {objective.tokens} for an image")
  return int(num_tokens)


def in_turn(objective: vilex.Objective, images: Iterable[np.ndarray] | None) -> Iterable[np.ndarray]:
  """The images of a prompt one by one, of a list or an array of them.

  Raises:
    UserError: for an image alone, whose rows would be taken for images.
  """
  if getattr(images, "shape", None) == objective.image_shape:
    raise UserError("images is a single one: give a list, images=[image]")
  return () if images is None else images


def lay_out(
  objective: vilex.Objective, prompt: str, images: Sequence[np.ndarray], num_tokens: Numbers = None
) -> dict[str, np.ndarray]:
  """A prompt as `generate` of the objective takes it, for one image to be made.

  Args:
    objective: of the model.
    prompt: words, and "{}" where an image is to stand. Without any, images stand before the words, or behind
      them in a model that was trained so.
    images: their tokens, float [k, d] with k up to n.
    num_tokens: of every image, or of each; by default, and for None, as many as there are, or an equal share
      of what fits beside the words and the other images.

  Returns:
    For images `vectors` [s, n, d] and `number` int32 [s], for words `words` int32 [p, m] and `num_words`
    int32 [p]; p is s + 1.

  Raises:
    UserError: if places and images do not go together, a word is unknown, or the prompt is too long.
  """
  pieces = prompt.split(PLACE)
  if len(pieces) == 1:
    nothing = [""] * len(images)
    pieces = [prompt, *nothing] if objective.words.place == "behind" else [*nothing, prompt]
  if len(pieces) != len(images) + 1:
    raise UserError(
      f"the prompt '{prompt}' has {len(pieces) - 1} places {PLACE} for {len(images)} images: give one "
      "for each, or none"
    )
  tokenizer, room = objective.texts.opened, objective.renderer.room
  for piece in pieces:
    unknown = tokenizer.unknown(piece)
    if unknown is not None:
      raise UserError(f"the prompt '{prompt}' has a word that this model never read, {unknown}")
  ids = [tokenizer.encode(piece) for piece in pieces]
  said = sum(map(len, ids))
  number = _fit(objective, prompt, images, num_tokens, room - said)
  laid: dict[str, np.ndarray] = {}
  if images:
    vectors = [np.pad(tokens, ((0, objective.tokens - len(tokens)), (0, 0))) for tokens in images]
    laid |= {"vectors": np.stack(vectors).astype(np.float32), "number": np.array(number, np.int32)}
  if said:
    words = np.array([piece + [0] * (room - len(piece)) for piece in ids], np.int32)
    laid |= {"words": words, "num_words": np.array([len(piece) for piece in ids], np.int32)}
  return laid


def lay_out_batch(
  objective: vilex.Objective, prompt: str, images: Sequence[np.ndarray], num_tokens: Numbers, batch: int
) -> dict[str, np.ndarray]:
  """The same for a batch, in whose row i stands row i of images [b, k, d]; images [1, k, d] are in all rows.

  Raises:
    UserError: as `lay_out`, and for another number of rows.
  """
  for tokens in images:
    if len(tokens) not in (1, batch):
      raise UserError(
        f"an image of the prompt has {len(tokens)} rows, {batch} images are to be made: give one, or one each"
      )
  rows = [
    lay_out(objective, prompt, [tokens[i % len(tokens)] for tokens in images], num_tokens)
    for i in range(batch)
  ]
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _fit(
  objective: vilex.Objective, prompt: str, images: Sequence[np.ndarray], num_tokens: Numbers, room: int
) -> list[int]:
  """How many tokens of each image stand in a prompt that has room for so many; its words stay in any case."""
  if num_tokens is None or isinstance(num_tokens, int | np.integer):
    wanted: list[int | None] = [num_tokens] * len(images)
  else:
    wanted = list(num_tokens)
  if len(wanted) != len(images):
    raise UserError(
      f"num_tokens has {len(wanted)} numbers for {len(images)} images: give one for each, or a single one"
    )
  if room < len(images):
    what = f"leaves no room for {len(images)} images" if images else f"has {-room} tokens too many"
    raise UserError(f"the prompt '{prompt}' {what}: shorten it")
  left, sharing = room, 0
  for number, tokens in zip(wanted, images, strict=True):
    if number is None:
      sharing += 1
    elif check_number(objective, number) > len(tokens):
      raise UserError(
        f"num_tokens is {number} for an image of which only {len(tokens)} are given: give fewer"
      )
    else:
      left -= number
  if left < sharing:
    raise UserError(
      f"num_tokens asks for {room - left} tokens, and {sharing} images share the rest: beside the words of "
      f"'{prompt}' at most {room} fit"
    )
  share = left // max(sharing, 1)
  return [
    min(len(tokens), share) if number is None else number
    for number, tokens in zip(wanted, images, strict=True)
  ]


def shares(count: int) -> np.ndarray:
  """How much of the second image so many images between two have, both of them included.

  Raises:
    UserError: for less than one.
  """
  if count < 1:
    raise UserError(f"count is {count}: give at least 1")
  return np.linspace(0.0, 1.0, count)


def between(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
  """Tokens on the arc from one of float [n, d] to the other; `share` 0 is the first, 1 the second."""

  def norm(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=-1, keepdims=True)

  cosine = (first * second).sum(-1, keepdims=True) / np.maximum(norm(first) * norm(second), 1e-12)
  angle = np.arccos(np.clip(cosine, -1.0, 1.0))
  sine = np.sin(angle)
  # Where the two point the same way the arc is a line.
  flat = sine < 1e-4
  safe = np.where(flat, 1.0, sine)
  of_first = np.where(flat, 1.0 - share, np.sin((1.0 - share) * angle) / safe)
  of_second = np.where(flat, share, np.sin(share * angle) / safe)
  return (of_first * first + of_second * second).astype(np.float32)


def write_embedding(path: epath.PathLike, tokens: np.ndarray, objective: vilex.Objective) -> None:
  """Writes an image's tokens float [k, d] as a textual inversion (Gal et al. 2023), a safetensors file.

  Programs that load such files show the image for a word of their own. Those for Stable Diffusion 1 and 2
  look for "emb_params", those for XL for "clip_l" and "clip_g".

  Raises:
    UserError: for other shapes, and if the path cannot be written.
  """
  if np.ndim(tokens) != 2:
    raise UserError(f"tokens have shape {np.shape(tokens)}: give those of one image, as tokens[0]")
  widths = objective.renderer.model.text_widths
  parts = np.split(np.asarray(tokens, np.float32), np.cumsum(widths)[:-1], axis=-1)
  _write(path, dict(zip(_names(widths), parts, strict=True)))


def write_tokens(path: epath.PathLike, tokens: np.ndarray) -> None:
  """Writes tokens of images float [b, k, d] as "tokens" of a safetensors file, in float32.

  Raises:
    UserError: for other shapes, and if the path cannot be written.
  """
  if np.ndim(tokens) != 3:
    raise UserError(f"tokens have shape {np.shape(tokens)}: give those of a batch of images, [b, k, d]")
  _write(path, {_TOKENS: np.asarray(tokens, np.float32)})


def read_tokens(path: epath.PathLike, objective: vilex.Objective) -> np.ndarray:
  """Reads what `write_tokens` or `write_embedding` wrote, or a textual inversion of other programs.

  Args:
    path: a safetensors file.
    objective: of the model that is to see the tokens.

  Returns:
    float32 [b, k, d]; b is 1 for a textual inversion.

  Raises:
    UserError: if the file is none of these, or not for this model.
  """
  found, widths = tensors_lib.read(path), objective.renderer.model.text_widths
  # A single tensor may have the name of the word that stands for it.
  names = list(found) if len(found) == len(widths) == 1 else _names(widths)
  parts = [np.atleast_2d(found[name]) for name in names if name in found]
  if _TOKENS in found:
    tokens = found[_TOKENS]
  elif len(parts) == len(widths) and len({part.shape[:-1] for part in parts}) == 1:
    tokens = np.concatenate(parts, axis=-1)[None]
  else:
    raise UserError(
      f"{path} holds no tokens of images: give a file of maskgen.tools.vilex encode, or a picture"
    )
  if tokens.ndim != 3 or tokens.shape[-1] != sum(widths) or not 1 <= tokens.shape[1] <= objective.tokens:
    raise UserError(
      f"{path} holds tokens of shape {list(tokens.shape[1:])}, this model's have [1 to {objective.tokens}, "
      f"{sum(widths)}]: give the picture, or tokens for the same text-to-image model"
    )
  if not np.isfinite(tokens).all():
    raise UserError(f"{path} holds tokens that are not finite: write it again")
  return tokens.astype(np.float32)


def _names(widths: Sequence[int]) -> tuple[str, ...]:
  return ("emb_params",) if len(widths) == 1 else ("clip_l", "clip_g")


def _write(path: epath.PathLike, data: dict[str, np.ndarray]) -> None:
  saved = safetensors.numpy.save({name: np.ascontiguousarray(value) for name, value in data.items()})
  try:
    epath.Path(path).write_bytes(saved)
  except OSError as error:
    raise UserError(f"{path} is not writable ({error.strerror or error}): give another path") from None
