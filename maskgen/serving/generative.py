"""Models that generate images, of a class or for a caption if they were trained with them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from maskgen.serving import requests
from maskgen.serving.model import Model
from maskgen.serving.requests import Label


class GenerativeModel(Model):
  """A model that generates images, such as UMD.

  model = maskgen.load("runs/umd")
  images = model.generate(seed=0, batch=16)
  """

  def generate(
    self,
    seed: int = 0,
    batch: int | None = None,
    label: Label | None = None,
    prompt: str | Sequence[str] | None = None,
    **options: Any,
  ) -> np.ndarray:
    """Generates images, float32 [batch, h, w, c] in [0, 1].

    Image i depends only on the seed, i and its label or prompt.

    Args:
      seed: random seed.
      batch: the number of images; by default one per label or prompt, or 16.
      label: a class, or one per image, for class-conditional models: a number, or one of the names in
        `classes`; None for no class.
      prompt: a text, or one per image, for models trained with captions; None for no text.
      **options: the fields of the objective's `sampling`, such as those of
        `maskgen.numerics.sampling.MaskedSampling`; by default as in the config.
    """
    return self._generate(self.request(seed, batch, label, prompt), self._options(options))

  def request(
    self, seed: int, batch: int | None = None, label: Any = None, prompt: Any = None, *, start: int = 0
  ) -> dict[str, Any]:
    """The batch for prediction functions that generate, see `generate`: images `start` to `start + batch`."""
    batch = requests.count(batch, label, prompt)
    request: dict[str, Any] = {"key": requests.keys(seed, batch, start)}
    if label is not None:
      request["label"] = requests.labels(label, batch, self.objective.num_classes, self.classes)
    if prompt is not None:
      request["caption"] = requests.captions(prompt, batch, self.objective.captions)
    return request
