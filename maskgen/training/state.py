"""The state of a training run: everything that a checkpoint must hold to continue it."""

from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class TrainState:
  """One state for every objective.

  Attributes:
    step: int32 scalar, the number of completed updates; data order and randomness follow from it.
    params: {group: parameters}; each group belongs to one loss.
    opt_state: {group: optimizer state}.
    ema: {group: moving average of its parameters}, for the groups that have one.
    extra: running statistics that no gradient reaches.
  """

  step: jax.Array
  params: dict[str, Any]
  opt_state: dict[str, Any]
  ema: dict[str, Any]
  extra: Any

  def variables(self, frozen: Any) -> dict[str, Any]:
    """What prediction functions see: parameters with the averages in place, frozen, extra."""
    return {"params": {**self.params, **self.ema}, "frozen": frozen, "extra": self.extra}
