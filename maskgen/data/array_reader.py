"""Reads one split of a source whose records are arrays, without TensorFlow; the same batches as `Reader`."""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from maskgen.data import captions, shuffle
from maskgen.data.preprocess import OpCall, Preprocess
from maskgen.data.shuffle import Locate
from maskgen.data.sources import Source

Batch = dict[str, np.ndarray]


class ArrayReader:
  """Batches of the preprocessed records of a source; see `maskgen.data.reader.Reader`.

  Attributes:
    source: the records.
    preprocess: the preprocessing.
    jpeg_decoding: "", as nothing is decoded.
  """

  jpeg_decoding = ""

  def __init__(self, source: Source, preprocess: Preprocess):
    """Creates a reader; the two must suit each other, see `suits`."""
    assert source.rows is not None
    self.source, self.preprocess = source, preprocess
    self._rows = source.rows

  @property
  def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a record after preprocessing.

    Raises:
      UserError: if an op rejects its arguments.
    """
    one = np.zeros(1, np.int64)
    return {
      key: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for key, value in self._load(one, one).items()
    }

  def batches(self, locate: Locate, size: int, *, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
    """Yields batches `start` to `stop` (endlessly if None); batch i begins at row i * size."""
    step = start
    while stop is None or step < stop:
      yield self._load(*locate(np.arange(step * size, (step + 1) * size), shuffle.arrays))
      step += 1

  def _load(self, indices: np.ndarray, draws: np.ndarray) -> Batch:
    records = self._rows(indices)
    result: Batch = {}
    views = self.preprocess.views
    for view in range(views):
      made = dict(records)
      for op in self.preprocess.ops:
        try:
          made[op.key] = _OPS[op.name](made[op.key], draws * views + view, **op.arguments)
        except (TypeError, ValueError) as error:
          raise self.preprocess.wrong(op.name, error) from error
      numbers = {key: value for key, value in made.items() if value.dtype != object}
      if view == 0:
        result = numbers
      else:
        result |= {f"{key}{view + 1}": numbers[key] for key in ("image", "tokens") if key in numbers}
    result = {
      key: value.astype(np.int32) if value.dtype == np.int64 else value for key, value in result.items()
    }
    return result | {"record": indices.astype(np.int32), "valid": np.ones(len(indices), bool)}


def suits(source: Source, preprocess: Preprocess) -> bool:
  """Whether the records are arrays, and no op of the preprocessing needs TensorFlow."""
  if source.rows is None:
    return False
  record = source.rows(np.zeros(1, np.int64))

  def is_known(op: OpCall) -> bool:
    if op.name not in _OPS or op.key not in record:
      return False
    return op.name != "decode" or record["image"].shape[-1] == op.arguments["channels"]

  return all(map(is_known, preprocess.ops))


def _decode(image: np.ndarray, draws: np.ndarray, channels: int) -> np.ndarray:
  del draws, channels  # these are pixels already
  return image


def _take_crop(tokens: np.ndarray, draws: np.ndarray) -> np.ndarray:
  return tokens[np.arange(len(tokens)), draws % tokens.shape[1]]


def _tokenize(caption: np.ndarray, draws: np.ndarray, tokenizer: str, length: int) -> np.ndarray:
  encode = captions.encoder(tokenizer, length)
  return np.stack([encode(texts[draw % len(texts)]) for texts, draw in zip(caption, draws, strict=True)])


# The ops that need no TensorFlow: an entry [b, ...], the draws [b] and arguments. See `maskgen.data.ops`.
_OPS: dict[str, Callable[..., np.ndarray]] = {
  "decode": _decode,
  "take_crop": _take_crop,
  "tokenize": _tokenize,
}
