"""An evaluator: how far predicted colour histograms are from the true ones."""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np
from colour_mage import histogram

from maskgen.evaluators import Context, Report
from maskgen.evaluators.batches import collect


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Compares histograms of the evaluation split, by the share of pixels that are in the wrong bin.

  Numbers: `error`; `error_mean`, the same for the mean histogram of all images in place of predictions.
  Picture: `histograms`, a row for each of 16 images, with a pixel for each bin, predicted and then true.

  Attributes:
    num_images: how many images are compared.
  """

  requires: ClassVar[tuple[str, ...]] = ("histogram",)

  context: Context
  num_images: int = 256

  def run(self, variables: Any, rng: jax.Array) -> Report:
    def compare(batch):
      predicted = self.context.predict["histogram"](variables, batch, rng)
      return {"predicted": predicted, "true": histogram(batch["image"], predicted.shape[-1])}

    found = collect(self.context, "eval", compare, self.num_images)
    true = found["true"]

    def error(predicted: np.ndarray) -> float:
      return float(np.abs(predicted - true).sum(axis=-1).mean() / 2)

    numbers = {"error": error(found["predicted"]), "error_mean": error(true.mean(axis=0))}
    rows = np.concatenate([found["predicted"], true], axis=-1)[:16].transpose(0, 2, 1)
    return Report(numbers, {"histograms": (255 * rows).astype(np.uint8)})
