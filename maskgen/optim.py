"""Optimizers from a config section: Adam(W), warm-up, cosine decay, the linear-scaling rule."""

import dataclasses
import re
from typing import Any

import jax
import optax

from maskgen import config as config_lib
from maskgen import tree
from maskgen.errors import UserError, nearest

SCHEDULES = ("cosine", "constant")
# Biases and normalisation scales: everything else is a matrix, a kernel or a table.
NO_DECAY = re.compile(r"(^|/)(bias|scale|head_bias)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
  """AdamW for one parameter group; with `weight_decay=0` it is Adam.

  Attributes:
    learning_rate: the peak learning rate, or
    base_learning_rate: the peak for a batch of 256; it is scaled with the batch size (Goyal et al. 2017).
    schedule: "cosine" to `end_learning_rate`, or "constant", after a linear warm-up from 0.
    end_learning_rate: the learning rate that the cosine ends at.
    warmup_steps, warmup_epochs: length of the warm-up; at most one.
    b1, b2: decay of the gradient's first and second moments.
    weight_decay: decoupled weight decay on all parameters but biases and normalisation scales.
    clip_norm: largest norm of the group's gradient, or None.
    multipliers: ordered (regex, factor) rules over parameter paths; the first match scales the learning rate.
  """

  learning_rate: float | None = None
  base_learning_rate: float | None = None
  schedule: str = "cosine"
  end_learning_rate: float = 0.0
  warmup_steps: int | None = None
  warmup_epochs: float | None = None
  b1: float = 0.9
  b2: float = 0.999
  weight_decay: float = 0.0
  clip_norm: float | None = None
  multipliers: tuple[tuple[str, float], ...] = ()

  def __post_init__(self):
    if (self.learning_rate is None) == (self.base_learning_rate is None):
      raise UserError("give learning_rate, or base_learning_rate (for a batch of 256), and not both")
    for name in ("learning_rate", "base_learning_rate", "warmup_steps", "warmup_epochs", "clip_norm"):
      if getattr(self, name) is not None:
        config_lib.check_at_least(self, 0, name)
    config_lib.check_at_least(self, 0, "end_learning_rate", "weight_decay", "b1", "b2")
    if self.schedule not in SCHEDULES:
      raise UserError(f"schedule '{self.schedule}' does not exist{nearest(self.schedule, SCHEDULES)}")

  def make_schedule(self, total_steps: int, batch_size: int, num_examples: int) -> optax.Schedule:
    """The learning rate as a function of the step."""
    if self.learning_rate is not None:
      peak = self.learning_rate
    else:
      assert self.base_learning_rate is not None
      peak = self.base_learning_rate * batch_size / 256
    warmup = config_lib.duration(self, "warmup", batch_size, num_examples, default=0)
    if warmup >= total_steps > 0:
      raise UserError(f"the warm-up of {warmup} steps is not shorter than the run of {total_steps}")
    if self.schedule == "constant":
      return optax.warmup_constant_schedule(0.0 if warmup else peak, peak, warmup)
    return optax.warmup_cosine_decay_schedule(
      0.0 if warmup else peak, peak, warmup, max(total_steps, 1), self.end_learning_rate
    )

  def make_transform(self, schedule: optax.Schedule, shapes: Any) -> optax.GradientTransformation:
    """The chain: clip, Adam, weight decay, multipliers, learning rate."""
    by_name = tree.first_match(shapes, self.multipliers, 1.0)
    factors = jax.tree.map(lambda name: by_name[name], tree.names(shapes))
    decayed = jax.tree.map(lambda name: not NO_DECAY.search(name), tree.names(shapes))
    return optax.chain(
      optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity(),
      optax.scale_by_adam(self.b1, self.b2),
      optax.add_decayed_weights(self.weight_decay, decayed) if self.weight_decay else optax.identity(),
      optax.stateless(
        lambda updates, _: jax.tree.map(lambda update, factor: update * factor, updates, factors)
      )
      if self.multipliers
      else optax.identity(),
      optax.scale_by_learning_rate(schedule),
    )
