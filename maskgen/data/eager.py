"""The preprocessing of evaluations for a few pictures, outside of a pipeline."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from maskgen.data.cpu_tf import tf
from maskgen.data.preprocess import parse_preprocess
from maskgen.data.reader import reason_of
from maskgen.errors import UserError


def preprocess(text: str, pictures: Sequence[bytes | np.ndarray], names: Sequence[str]) -> np.ndarray:
  """Applies the ops on images of a chain of ops, with draw 0 of record 0 where they are random.

  Args:
    text: see `parse_preprocess`.
    pictures: the contents of files, or uint8 [h, w, c].
    names: how to call them in errors.

  Returns:
    uint8 [b, h, w, c].

  Raises:
    UserError: if a picture is damaged or does not fit the ops.
  """
  parsed = parse_preprocess(text)
  chain = dataclasses.replace(parsed, ops=tuple(op for op in parsed.ops if op.key == "image"))
  seed, draw = tf.zeros(2, tf.int64), tf.zeros((), tf.int64)
  prepared = []
  for picture, name in zip(pictures, names, strict=True):
    try:
      prepared.append(chain({"image": tf.constant(picture)}, seed, draw)["image"].numpy())
    except tf.errors.OpError as error:
      raise UserError(f"{name} cannot be prepared by '{text}': {reason_of(error)}") from error
    except UserError as error:
      raise UserError(f"{name}: {error}") from error
  return np.stack(prepared)
