"""The state of a training run: everything that a checkpoint must hold to continue it."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class TrainState:
  """One state for every objective.

  Attributes:
    step: int32 scalar, the number of completed updates; data order and randomness follow from it.
    params: {group: parameters}; each group belongs to one loss.
    opt_state: {group: optimizer state}.
    ema: {group: moving average of its parameters}, for the groups that have one.
    model_state: running statistics that no gradient reaches; `extra` in checkpoints and variables.
  """

  step: jax.Array
  params: dict[str, Any]
  opt_state: dict[str, Any]
  ema: dict[str, Any]
  model_state: Any

  def variables(self, frozen: Any) -> dict[str, Any]:
    """What prediction functions see: parameters with the averages in place, frozen, model state."""
    return {"params": {**self.params, **self.ema}, "frozen": frozen, "extra": self.model_state}

  def replace(self, **changes: Any) -> "TrainState":
    """Returns a copy with other values for some fields."""
    return dataclasses.replace(self, **changes)

  def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], None]:
    """The fields under the names that checkpoints have."""
    stored = ("step", "params", "opt_state", "ema", "extra")
    values = (self.step, self.params, self.opt_state, self.ema, self.model_state)
    return [(jax.tree_util.GetAttrKey(name), value) for name, value in zip(stored, values, strict=True)], None

  @classmethod
  def tree_unflatten(cls, _: None, children: Any) -> "TrainState":
    """The reverse."""
    return cls(*children)
