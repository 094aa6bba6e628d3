"""Top-1 and top-5 accuracy of a classifier."""

import dataclasses
from typing import Any, ClassVar

import jax

from maskgen.errors import UserError
from maskgen.evaluators.batches import collect
from maskgen.evaluators.context import Context, Report

_TOP = 5


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Accuracy over the evaluation split.

  Metrics (fractions in [0, 1]): `top1`; `top5` if there are more than 5 classes.
  """

  requires: ClassVar[tuple[str, ...]] = ("classify",)

  context: Context

  def __post_init__(self):
    if self.context.class_names is None:
      remedy = self.context.lacks.get("label", "remove this evaluation")
      raise UserError(f"the data has no labels: {remedy}")

  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Evaluates; `rng` is a typed key that is not used."""
    count = min(_TOP, len(self.context.class_names or ()))

    def evaluate(batch):
      probabilities = self.context.predict["classify"](variables, batch, rng)
      _, likeliest = jax.lax.top_k(probabilities, count)
      return {"hits": likeliest == batch["label"][:, None]}

    hits = collect(self.context, "eval", evaluate)["hits"]
    numbers = {"top1": float(hits[:, 0].mean())}
    if len(self.context.class_names or ()) > _TOP:
      numbers["top5"] = float(hits.any(axis=1).mean())
    return Report(numbers)
