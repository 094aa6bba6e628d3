"""A random permutation of the records for each epoch, in random access: in NumPy and as a TensorFlow op.

Both return the same numbers. A Feistel network with a key of its own for each seed and epoch permutes all
numbers of an even number of bits; one that leaves the range is permuted again until it is inside ("cycle
walking", Black & Rogaway 2002). The network is Simon's (Beaulieu et al. 2013) with 8 rounds, as in
TensorFlow's `RandomIndexShuffle`, and the key is Philox's hash of seed and epoch (Salmon et al. 2011).
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from maskgen.data.cpu_tf import tf

# From positions in an epoch, the number of records, a seed and the number of the epoch to records.
Shuffle = Callable[[Any, int, int, Any], Any]
# From the numbers of rows that a reader asks for, and the form of `Shuffle` for these, to the indices of
# their records and the numbers of earlier draws of those records.
Locate = Callable[[Any, Shuffle], tuple[Any, Any]]

# TensorFlow's default of 4 rounds leaves neighbours correlated.
_ROUNDS = 8
_MIN_BITS = 16
# Simon's constants: c, and the sequence z3 from its lowest bit on.
_C, _Z = 0xFFFFFFFC, 0x7369F885192C0EF5
# Philox's multipliers and increments, and the key that hashes a seed.
_MULTIPLIERS, _WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_SEED_KEY = (0x3EC8F720, 0x02461E29)
_WORD = 0xFFFFFFFF


def tensors(position: Any, size: int, seed: int, epoch: Any) -> Any:
  """Returns the records at positions of an epoch, as a traceable int64 scalar; see `arrays`."""
  # For small sizes the op uses only the low bits of its seed, so a counter in the seed would soon repeat.
  key = tf.stack([tf.constant(seed, tf.int64), tf.cast(epoch, tf.int64)])
  bits = tf.random.stateless_uniform([3], key, minval=None, maxval=None, dtype=tf.int32)
  return tf.raw_ops.RandomIndexShuffle(
    index=position, seed=bits, max_index=tf.constant(size - 1, tf.int64), rounds=_ROUNDS
  )


def arrays(position: np.ndarray, size: int, seed: int, epoch: np.ndarray | int) -> np.ndarray:
  """Returns the records at positions of an epoch.

  Args:
    position: int64 [b] in [0, size).
    size: the number of records.
    seed: the seed of all epochs, from -2^63 to 2^63 - 1.
    epoch: int64 [b], or one number for all.

  Returns:
    int64 [b]; all positions of an epoch give each record once. With 4^k + 1 records, k >= 8, the last
    position gives the same as the first one, as in TensorFlow.
  """
  epochs = np.broadcast_to(epoch, position.shape)
  records = np.empty_like(position)
  for number in np.unique(epochs):
    there = epochs == number
    records[there] = _permute(position[there], size, _key(seed, int(number)))
  return records


def _permute(position: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
  if size == 1:
    return np.zeros_like(position)
  half = max((size - 2).bit_length() + 1, _MIN_BITS) // 2
  if 2 * half == _MIN_BITS:  # long walks, where few records share many numbers
    return _whole(size, key)[position % (1 << _MIN_BITS)]
  keys = _round_keys(key, half)
  record = _encrypt(position.astype(np.uint64), keys, half)
  while (outside := record >= size).any():
    record[outside] = _encrypt(record[outside], keys, half)
  return record.astype(np.int64)


@functools.lru_cache(maxsize=4)
def _whole(size: int, key: tuple[int, ...]) -> np.ndarray:
  """The records of all positions of a small data set, int64 [2^16]; the first `size` are an epoch."""
  half = _MIN_BITS // 2
  walked = _encrypt(np.arange(1 << _MIN_BITS, dtype=np.uint64), _round_keys(key, half), half).astype(np.int64)
  while (walked[:size] >= size).any():  # each round doubles the length of the walks
    walked = np.where(walked < size, walked, walked[walked])
  return walked


def _encrypt(number: np.ndarray, keys: list[int], half: int) -> np.ndarray:
  """Simon's rounds on numbers of twice `half` bits, uint64."""
  mask = np.uint64((1 << half) - 1)

  def turn(x: np.ndarray, bits: int) -> np.ndarray:
    return (x << np.uint64(bits) | x >> np.uint64(half - bits)) & mask

  left, right = number >> np.uint64(half) & mask, number & mask
  for key in keys:
    left, right = right, left ^ turn(right, 1) & turn(right, 8) ^ turn(right, 2) ^ np.uint64(key)
  return left << np.uint64(half) | right


def _round_keys(key: tuple[int, ...], half: int) -> list[int]:
  mask = (1 << half) - 1
  keys = [word & mask for word in key]
  for number in range(_ROUNDS - len(key)):
    last = keys[-1]
    turned = (last >> 3 | last << half - 3) ^ (last >> 4 | last << half - 4)
    keys.append((_C ^ (_Z & mask) >> number & 1 ^ keys[-3] ^ turned) & mask)
  return keys


def _key(seed: int, epoch: int) -> tuple[int, ...]:
  """Three words of TensorFlow's stateless generator."""
  words = [number >> shift & _WORD for number in (seed, epoch) for shift in (0, 32)]
  mixed = _philox(words, _SEED_KEY)
  return tuple(_philox([0, 0, *mixed[2:]], mixed[:2])[:3])


def _philox(counter: list[int], key: tuple[int, ...] | list[int]) -> list[int]:
  """Philox4x32 with 10 rounds."""
  a, b, c, d = counter
  first_key, second_key = key
  for _ in range(10):
    first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
    a, b = second >> 32 ^ b ^ first_key, second & _WORD
    c, d = first >> 32 ^ d ^ second_key, first & _WORD
    first_key, second_key = first_key + _WEYL[0] & _WORD, second_key + _WEYL[1] & _WORD
  return [a, b, c, d]
