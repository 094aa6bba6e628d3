"""How well a tokenizer reconstructs held-out images, and its codebook usage."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np

from maskgen import images as images_lib
from maskgen.errors import UserError
from maskgen.evaluators import pictures
from maskgen.evaluators.batches import stream
from maskgen.evaluators.context import Call, Context, Report

_MAX_PSNR = 100.0  # replaces the infinite PSNR of a perfect reconstruction


@jax.jit
def compare(originals: jax.Array, reconstructions: jax.Array) -> dict[str, jax.Array]:
  """Compares pairs of images [b, h, w, c] (uint8, or float32 in [0, 1]).

  Returns:
    "psnr" in dB (at most 100), "ssim" and "l1" (mean absolute error), float32 [b] each. SSIM uses a Gaussian
    window of 11 pixels (Wang et al. 2004), or of the image's size if that is smaller.
  """
  a, b = images_lib.to_float(originals), images_lib.to_float(reconstructions)
  window = min(11, *a.shape[1:3])
  return {
    "psnr": jnp.minimum(dm_pix.psnr(a, b), _MAX_PSNR),
    "ssim": dm_pix.ssim(a, b, filter_size=window),
    "l1": dm_pix.mae(a, b),
  }


def codebook_statistics(counts: np.ndarray) -> dict[str, float]:
  """Describes a histogram of codes, int [K].

  Returns:
    "codebook_usage": the fraction of codes that occur; "perplexity": exp of the histogram's entropy, from 1
    to the codebook's size.
  """
  shares = counts[counts > 0] / counts.sum()
  return {
    "codebook_usage": float(np.count_nonzero(counts) / len(counts)),
    "perplexity": float(np.exp(-np.sum(shares * np.log(shares)))),
  }


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Reconstructs the evaluation split.

  Metrics: `psnr` (dB), `ssim` and `l1`, means over images. If the objective has a codebook: `codebook_usage`
  (the fraction of codes used at least once over the split) and `perplexity`.
  Picture `reconstructions`: originals above their reconstructions.

  Attributes:
    num_pictures: the number of images in the picture, at most one batch.
  """

  requires: ClassVar[tuple[str, ...]] = ("reconstruct",)

  context: Context
  num_pictures: int = 32

  def __post_init__(self):
    if self.num_pictures < 1:
      raise UserError(f"num_pictures is {self.num_pictures}: give at least 1")

  def trace(self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    call("reconstruct", batch)
    if "encode" in self.context.predict and self.context.codebook_size:
      call("encode", batch)

  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Evaluates; `rng` is a typed key."""
    predict, codebook_size = self.context.predict, self.context.codebook_size
    has_codes = "encode" in predict and codebook_size > 0

    def evaluate(batch):
      results = compare(batch["image"], predict["reconstruct"](variables, batch, rng))
      if has_codes:
        results["tokens"] = predict["encode"](variables, batch, rng)
      return results

    counts, parts = np.zeros(codebook_size, np.int64), []
    for part in stream(self.context, "eval", evaluate):
      if has_codes:
        counts += np.bincount(part.pop("tokens").ravel(), minlength=codebook_size)
      parts.append(part)
    results = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    numbers = {name: float(values.mean(dtype="float64")) for name, values in results.items()}
    if has_codes:
      numbers |= codebook_statistics(counts)
    picture = pictures.reconstructions(self.context, variables, rng, self.num_pictures)
    return Report(numbers, {"reconstructions": picture})
