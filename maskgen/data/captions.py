"""Preprocessing ops for captions: strings [k] with k >= 1."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from maskgen.data.cpu_tf import tf
from maskgen.data.ops import op
from maskgen.numerics.text import open_text_tokenizer

_open = functools.cache(open_text_tokenizer)


@op
def tokenize(caption: tf.Tensor, tokenizer: str, length: int, *, draw: tf.Tensor) -> tf.Tensor:
  """Tokenizes one caption to int32 [length]; successive draws of a record take its k captions in turn.

  `tokenizer` is "bpe:/path" or another that can be opened, see `maskgen.numerics.text.open_text_tokenizer`.
  """
  encode = encoder(tokenizer, length)

  def encode_bytes(text: bytes | np.ndarray) -> np.ndarray:
    content = np.asarray(text, object).item()  # an array when eager
    return encode(content.decode(errors="replace"))

  chosen = caption[draw % tf.size(caption, tf.int64)]
  ids = tf.numpy_function(encode_bytes, [chosen], tf.int32, stateful=False)
  return tf.ensure_shape(ids, [length])


def encoder(tokenizer: str, length: int) -> Callable[[str], np.ndarray]:
  """Returns the function from a text to ids, int32 [length].

  Raises:
    ValueError: if an argument is of a wrong type.
  """
  if not isinstance(tokenizer, str):
    raise ValueError(f"tokenizer is {tokenizer!r}, not a string such as 'bpe:/path'")
  if not isinstance(length, int) or isinstance(length, bool) or length < 2:
    raise ValueError(f"length is {length!r}, not a number of ids from 2 on")
  return functools.partial(_open(tokenizer).pad, length=length)
