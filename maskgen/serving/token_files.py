"""Token files of images, which can be used in place of the images: safetensors, float32.

Letters: b images, k tokens of an image, d their width, the sum over all text encoders.
"""

from collections.abc import Sequence

import numpy as np
import safetensors.numpy
from etils import epath

from maskgen.errors import UserError
from maskgen.importers import tensors as tensors_lib

# The name of the tensor in a token file.
_TOKENS = "tokens"


def write_tokens(path: epath.PathLike, tokens: np.ndarray) -> None:
  """Writes tokens of images, float [b, k, d], as the tensor "tokens".

  Raises:
    UserError: for other shapes, and if the path cannot be written.
  """
  if np.ndim(tokens) != 3:
    raise UserError(f"tokens have shape {np.shape(tokens)}: give those of a batch of images, [b, k, d]")
  _write(path, {_TOKENS: np.asarray(tokens, np.float32)})


def write_embedding(path: epath.PathLike, tokens: np.ndarray, widths: Sequence[int]) -> None:
  """Writes an image's tokens, float [k, d], as a textual inversion (Gal et al. 2023).

  Other programs load such a file as a new word for the image. Those for Stable Diffusion 1 and 2 read the
  tensor "emb_params", those for XL "clip_l" and "clip_g".

  Args:
    path: the file to write.
    tokens: the tokens of one image.
    widths: the width of each text encoder.

  Raises:
    UserError: for other shapes, and if the path cannot be written.
  """
  if np.ndim(tokens) != 2:
    raise UserError(f"tokens have shape {np.shape(tokens)}: give those of one image, as tokens[0]")
  parts = np.split(np.asarray(tokens, np.float32), np.cumsum(widths)[:-1], axis=-1)
  _write(path, dict(zip(_names(widths), parts, strict=True)))


def read_tokens(path: epath.PathLike, widths: Sequence[int], most: int) -> np.ndarray:
  """Reads a token file or a textual inversion, also one written by another program.

  Args:
    path: a safetensors file.
    widths: the width of each text encoder of the model.
    most: the largest number of tokens of an image.

  Returns:
    float32 [b, k, d]; b is 1 for a textual inversion.

  Raises:
    UserError: if the file is neither, or does not fit the model.
  """
  found = tensors_lib.read(path)
  # A single tensor may have the name of its word.
  names = list(found) if len(found) == len(widths) == 1 else _names(widths)
  parts = [np.atleast_2d(found[name]) for name in names if name in found]
  if _TOKENS in found:
    tokens = found[_TOKENS]
  elif len(parts) == len(widths) and len({part.shape[:-1] for part in parts}) == 1:
    tokens = np.concatenate(parts, axis=-1)[None]
  else:
    raise UserError(
      f"{path} holds no tokens of images: give a file written by maskgen.tools.vilex encode, or a picture"
    )
  if tokens.ndim != 3 or tokens.shape[-1] != sum(widths) or not 1 <= tokens.shape[1] <= most:
    raise UserError(
      f"{path} holds tokens of shape {list(tokens.shape[1:])}, this model's have [1 to {most}, "
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
    epath.Path(path).expanduser().write_bytes(saved)
  except OSError as error:
    raise UserError(f"{path} is not writable ({error.strerror or error}): give another path") from None
