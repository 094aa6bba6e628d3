"""Validation losses of the objective."""

import dataclasses
import itertools
from typing import Any, ClassVar

import jax

from maskgen.evaluators.batches import collect
from maskgen.evaluators.context import Context, Report


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Averages the values of the prediction function `loss` over the evaluation split.

  Metrics: one per value, with its name.
  """

  requires: ClassVar[tuple[str, ...]] = ("loss",)

  context: Context

  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Evaluates; `rng` is a typed key, folded with each batch's index."""
    index = itertools.count()

    def evaluate(batch):
      return self.context.predict["loss"](variables, batch, jax.random.fold_in(rng, next(index)))

    losses = collect(self.context, "eval", evaluate)
    return Report({name: float(values.mean(dtype="float64")) for name, values in losses.items()})
