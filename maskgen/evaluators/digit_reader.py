"""Reads the attributes of captioned digits from pictures."""

import dataclasses
import functools
from typing import Any

import numpy as np

from maskgen.data import digit_scenes as scenes
from maskgen.evaluators import classifiers, feature_spaces
from maskgen.evaluators.context import Context

# The number of real pictures that the classifier of glyphs is trained on.
_TRAINING = 4096


@dataclasses.dataclass(frozen=True)
class Reader:
  """Reads all kinds of `digit_scenes.KINDS` from pictures.

  Attributes:
    context: the context of a run on captioned digits.
  """

  context: Context

  def read(self, pictures: np.ndarray) -> dict[str, np.ndarray]:
    """The values of all kinds in pictures float32 [b, h, w, c] in [0, 1]; int [b] each."""
    values, glyphs = scenes.read(pictures)
    return {**values, "class": self._classifier.predict(glyphs.reshape(len(glyphs), -1))}

  @functools.cached_property
  def _classifier(self) -> Any:
    """Predicts the classes of glyphs; trained at the first evaluation, then kept."""
    return classifiers.train("svc", self.context, feature_spaces.glyphs, _TRAINING)
