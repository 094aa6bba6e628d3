"""Images among the words of a prompt, as users give them: "a {} on a red background", and a picture.

Letters: s images, n tokens of an image, d their width, m words, p pieces of a prompt.
"""

from collections.abc import Sequence

import numpy as np
import safetensors.numpy
from etils import epath

from maskgen.errors import UserError
from maskgen.objectives import vilex

PLACE = "{}"


def check_number(objective: vilex.Objective, num_tokens: int | None) -> int:
  """How many tokens of an image are wanted, by default all.

  Raises:
    UserError: for a number that the model does not have.
  """
  if num_tokens is None:
    return objective.tokens
  if not isinstance(num_tokens, int) or not 1 <= num_tokens <= objective.tokens:
    raise UserError(f"num_tokens is {num_tokens!r}: this model has 1 to {objective.tokens} for an image")
  return num_tokens


def lay_out(
  objective: vilex.Objective, prompt: str, images: Sequence[np.ndarray], num_tokens: int | None = None
) -> dict[str, np.ndarray]:
  """A prompt as `generate` of the objective takes it, for one image to be made.

  Args:
    objective: of the model.
    prompt: words, and "{}" where an image is to stand. Without any, images stand before the words, or behind
      them in a model that was trained so.
    images: their tokens, float [k, d] with k up to n.
    num_tokens: of each image; by default as many as there are, or as fit beside the words.

  Returns:
    For images `vectors` [s, n, d] and `number` int32 [s], for words `words` int32 [p, m] and `num_words`
    int32 [p]; p is s + 1.

  Raises:
    UserError: if places and images do not go together, a word is unknown, or the prompt is too long.
  """
  pieces = prompt.split(PLACE)
  if len(pieces) == 1:
    nothing = [""] * len(images)
    pieces = [prompt, *nothing] if objective.words_first else [*nothing, prompt]
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


def _fit(
  objective: vilex.Objective, prompt: str, images: Sequence[np.ndarray], num_tokens: int | None, room: int
) -> list[int]:
  """How many tokens of each image stand in a prompt that has room for so many; its words stay in any case."""
  share = room // max(len(images), 1)
  if room < 0 or (images and share < 1):
    raise UserError(f"the prompt '{prompt}' leaves no room for {len(images)} images: shorten it")
  wanted = check_number(objective, num_tokens)
  if num_tokens is not None and len(images) * wanted > room:
    raise UserError(
      f"num_tokens is {wanted} for each of {len(images)} images: beside the words of '{prompt}' at most "
      f"{share} fit"
    )
  return [min(len(tokens), wanted, share) for tokens in images]


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
  look for "emb_params", those for XL for "clip_l" and "clip_g"; diffusers takes either, see its
  `load_textual_inversion`.

  Raises:
    UserError: if the path cannot be written.
  """
  widths = objective.renderer.model.text_widths
  names = ("emb_params",) if len(widths) == 1 else ("clip_l", "clip_g")
  parts = np.split(np.asarray(tokens, np.float32), np.cumsum(widths)[:-1], axis=-1)
  data = {name: np.ascontiguousarray(part) for name, part in zip(names, parts, strict=True)}
  try:
    epath.Path(path).write_bytes(safetensors.numpy.save(data))
  except OSError as error:
    raise UserError(f"{path} is not writable ({error.strerror or error}): give another path") from None
