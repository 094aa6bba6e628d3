"""Text-to-image models."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from maskgen.serving import requests
from maskgen.serving.model import Model


class TextToImageModel(Model):
  """A diffusion model that generates images from text.

  model = maskgen.load("runs/diffusion_digits")
  images = model.generate(prompt="a red three on a blue background", batch=8, guidance=2.0)
  images = model.generate(prompt=["a red three", "a small five"], steps=20)
  """

  def generate(
    self, seed: int = 0, batch: int | None = None, prompt: str | Sequence[str] | None = None, **options: Any
  ) -> np.ndarray:
    """Generates images, float32 [batch, h, w, c] in [0, 1]; image i depends on the seed, i and its prompt.

    Args:
      seed: random seed.
      batch: the number of images; by default one per prompt, or 16.
      prompt: a text, or one per image; None for no text.
      **options: the fields of `maskgen.numerics.diffusion.DiffusionSampling`; by default as in the config.
    """
    return self._generate(self.request(seed, batch, prompt), self._options(options))

  def request(
    self, seed: int, batch: int | None = None, prompt: Any = None, *, start: int = 0
  ) -> dict[str, Any]:
    """The batch for the prediction function `generate`: images `start` to `start + batch`."""
    batch = requests.count(batch, prompt)
    request: dict[str, Any] = {"key": requests.keys(seed, batch, start)}
    if prompt is not None:
      request["caption"] = requests.captions(prompt, batch, self.objective.captions)
    return request
