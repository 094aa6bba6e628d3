"""Which emoji a picture shows: the nearest of all real ones."""

import functools

import jax.numpy as jnp
import numpy as np

from maskgen.data import emoji
from maskgen.evaluators.feature_spaces import Space

_BATCH = 256


def judge(distances: np.ndarray, wanted: np.ndarray) -> dict[str, np.ndarray]:
  """Compares the nearest real pictures with the right ones.

  Args:
    distances: float [m, n] of m pictures to all real ones, as by `distances_to_real`.
    wanted: the indices int [m] of the right pictures.

  Returns:
    bool [m]: whether the nearest picture has the right base ("base"), has the right tone ("tone"), and is the
    right one ("exact").
  """
  known, nearest = emoji.load(), distances.argmin(axis=1)
  bases, tones = np.array(known.bases), np.array(known.tones)
  return {
    "base": bases[nearest] == bases[wanted],
    "tone": tones[nearest] == tones[wanted],
    "exact": nearest == wanted,
  }


def distances_to_real(space: Space, pictures: np.ndarray) -> np.ndarray:
  """Squared distances to all real pictures.

  Args:
    space: of features.
    pictures: [m, 32, 32, 3], uint8 or float32 in [0, 1].

  Returns:
    float32 [m, n], 0 up to rounding for equal pictures.
  """
  made, real = _features(space, pictures), _real_features(space)
  squares = np.square(made).sum(axis=1)[:, None] + np.square(real).sum(axis=1)
  return np.maximum(squares - 2.0 * made @ real.T, 0.0)


@functools.cache
def _real_features(space: Space) -> np.ndarray:
  """Computed at the first evaluation, then kept."""
  return _features(space, emoji.load().images)


def _features(space: Space, pictures: np.ndarray) -> np.ndarray:
  parts = (pictures[start : start + _BATCH] for start in range(0, len(pictures), _BATCH))
  return np.concatenate([np.asarray(space(jnp.asarray(part)), np.float32) for part in parts])
