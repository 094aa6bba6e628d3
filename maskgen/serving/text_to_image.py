"""Text-to-image models."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from maskgen.errors import UserError
from maskgen.serving import requests
from maskgen.serving.model import Model


class TextToImageModel(Model):
  """A diffusion model that generates images from text.

  model = maskgen.load("runs/diffusion_digits")
  images = model.generate(prompt="a red three on a blue background", batch=8, guidance=2.0)
  images = model.generate(prompt=["a red three", "a small five"], steps=20, negative_prompt="blue")
  """

  objective: Any  # such as `maskgen.objectives.diffusion.Objective`

  def generate(
    self,
    seed: int = 0,
    batch: int | None = None,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    **options: Any,
  ) -> np.ndarray:
    """Generates images, float32 [batch, h, w, c] in [0, 1]; image i depends on the seed, i and its prompt.

    Args:
      seed: random seed.
      batch: the number of images; by default one per prompt, or 16.
      prompt: a text, or one per image; None for no text.
      negative_prompt: a text, or one per image, that guidance steers away from instead of no text.
      **options: the fields of the objective's `sampling`, such as those of
        `maskgen.numerics.diffusion.DiffusionSampling`; by default as in the config.
    """
    checked = self._options(options)
    if negative_prompt is not None and checked.get("guidance", self.objective.sampling.guidance) == 1:
      raise UserError("negative_prompt has no effect at guidance=1: raise guidance, or leave it out")
    return self._generate(self.request(seed, batch, prompt, negative_prompt), checked)

  def request(
    self,
    seed: int,
    batch: int | None = None,
    prompt: Any = None,
    negative_prompt: Any = None,
    *,
    start: int = 0,
  ) -> dict[str, Any]:
    """The batch for the prediction function `generate`: images `start` to `start + batch`."""
    batch = requests.count(batch, prompt, negative_prompt)
    request: dict[str, Any] = {"key": requests.keys(seed, batch, start)}
    for name, texts in (("caption", prompt), ("negative", negative_prompt)):
      if texts is not None:
        request[name] = requests.captions(texts, batch, self.objective.captions)
    return request
