"""Optimizers from a config section: Adam(W), Adafactor, LARS; warm-up, cosine decay, linear scaling."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import optax

from maskgen import config as config_lib
from maskgen import tree
from maskgen.errors import UserError, nearest

OPTIMIZERS = ("adamw", "adafactor", "lars")
SCHEDULES = ("cosine", "constant")
# Biases and normalisation scales: everything else is a matrix, a kernel or a table.
NO_DECAY = re.compile(r"(^|/)(bias|scale|head_bias)$")

# LARS's trust coefficient: a learning rate of 1 moves a matrix by this fraction of its norm.
TRUST = 0.001


def layer_decay(decay: float, layers: int | Sequence[str]) -> tuple[tuple[str, float], ...]:
  """Rules for `multipliers`: learning rates that shrink towards the input (Clark et al. 2020, section 3.2).

  With n blocks, the last has the factor decay, the first decay^n, the embedding decay^(n + 1), and everything
  after the blocks 1.

  Args:
    decay: from 0 to 1.
    layers: regular expressions over parameter paths, of the embedding and then of each block; or the number
      of blocks of a MAGE encoder.
  """
  if isinstance(layers, int):
    layers = ("^(embedding|position|embedding_norm)(/|$)", *(f"(^|/)block_{i}/" for i in range(layers)))
  return tuple((layer, decay ** (len(layers) - i)) for i, layer in enumerate(layers))


def check_groups(
  groups: Collection[str], optimizer: Collection[str], ema: Collection[str], averages: Collection[str]
) -> None:
  """Checks the parameter groups that `config.optimizer` and `config.ema` name.

  Args:
    groups: those of the objective.
    optimizer: those of the section `optimizer`.
    ema: those of the section `ema`.
    averages: those whose moving averages teach the objective.

  Raises:
    UserError: for a group that does not exist, or that is missing.
  """
  for where, section in (("optimizer", optimizer), ("ema", ema)):
    for group in section:
      if group not in groups:
        raise UserError(f"config.{where} has no group '{group}'{nearest(group, groups)}")
  for group in groups:
    if group not in optimizer:
      raise UserError(f"config.optimizer.{group} is missing: every parameter group needs one")
  for group in averages:
    if group not in ema:
      raise UserError(
        f"config.ema.{group} is missing: a moving average teaches this objective, give its decay, such as "
        "0.996"
      )


def average_decay(decay: float | Sequence[float], total_steps: int) -> optax.Schedule:
  """The decay of a moving average as a function of the step: `config.ema` of a group."""
  if not isinstance(decay, Sequence):
    return optax.constant_schedule(decay)
  first, last = decay
  fall = optax.cosine_decay_schedule(last - first, max(total_steps, 1))
  return lambda step: last - fall(step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
  """AdamW for one parameter group, which with `weight_decay=0` is Adam; Adafactor; or LARS.

  Adafactor (Shazeer and Stern 2018) stores only row and column means of a matrix's second moment, which decay
  as in its section 7.1 and not by `b2`, and clips the RMS of each array's update to 1. Learning rates are
  absolute, not relative to the scale of the parameters. With `b1=0` it has no first moment.

  LARS (You et al. 2017) adds the weight decay to the gradient, scales each matrix's gradient to 0.001 times
  the norm of the matrix, and adds momentum; biases and normalisation scales only have momentum.

  Attributes:
    name: "adamw", "adafactor" or "lars".
    learning_rate: the peak learning rate, or
    base_learning_rate: the peak for a batch of 256; it is scaled with the batch size (Goyal et al. 2017).
    schedule: "cosine" to `end_learning_rate`, or "constant", after a linear warm-up from 0.
    end_learning_rate: the final learning rate of the cosine schedule.
    warmup_steps, warmup_epochs: length of the warm-up; at most one.
    b1, b2: decay of the gradient's first and second moments; for LARS `b1` is the momentum.
    weight_decay: on all parameters except biases and normalisation scales; decoupled, except for LARS.
    clip_norm: largest norm of the group's gradient, or None.
    multipliers: ordered (regex, factor) rules over parameter paths; the first match scales the learning rate.
    layer_decay: the ratio of learning rates of consecutive layers of the objective's image encoder, see
      `layer_decay`; `multipliers` take precedence.
  """

  name: str = "adamw"
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
  layer_decay: float | None = None

  def __post_init__(self):
    if (self.learning_rate is None) == (self.base_learning_rate is None):
      raise UserError("give either learning_rate, or base_learning_rate (for a batch of 256)")
    for name in ("learning_rate", "base_learning_rate", "warmup_steps", "warmup_epochs", "clip_norm"):
      if getattr(self, name) is not None:
        config_lib.check_at_least(self, 0, name)
    if self.layer_decay is not None and not 0.0 < self.layer_decay <= 1.0:
      raise UserError(f"layer_decay is {self.layer_decay}: it must be above 0 and at most 1")
    config_lib.check_at_least(self, 0, "end_learning_rate", "weight_decay", "b1", "b2")
    for name in ("b1", "b2"):
      if not getattr(self, name) < 1.0:
        raise UserError(f"{name} is {getattr(self, name)}: it must be less than 1")
    if self.clip_norm == 0.0:
      raise UserError("clip_norm is 0.0, which makes all gradients 0: set it above 0, or to None")
    if self.name not in OPTIMIZERS:
      raise UserError(f"name '{self.name}' does not exist{nearest(self.name, OPTIMIZERS)}")
    if self.schedule not in SCHEDULES:
      raise UserError(f"schedule '{self.schedule}' does not exist{nearest(self.schedule, SCHEDULES)}")

  @staticmethod
  def comparable(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section with `layer_decay` in place of `multipliers` that spell it out for a MAGE encoder."""
    rules = sorted(tuple(rule) for rule in section.get("multipliers") or ())
    decay = max((factor for _, factor in rules), default=1.0)
    if len(rules) < 2 or rules != sorted(layer_decay(decay, len(rules) - 1)):
      return dict(section)
    return {**section, "multipliers": [], "layer_decay": decay}

  def make_schedule(self, total_steps: int, batch_size: int, num_examples: int) -> optax.Schedule:
    """The learning rate as a function of the step."""
    if self.learning_rate is not None:
      peak = self.learning_rate
    else:
      assert self.base_learning_rate is not None
      peak = self.base_learning_rate * batch_size / 256
    warmup = config_lib.duration(self, "warmup", batch_size, num_examples, default=0)
    if warmup >= total_steps > 0:
      given = f"steps is {warmup}" if self.warmup_epochs is None else f"epochs is {warmup} steps"
      raise UserError(f"warmup_{given}: it must be less than the {total_steps} steps of the run")
    if self.schedule == "constant":
      return optax.warmup_constant_schedule(0.0 if warmup else peak, peak, warmup)
    return optax.warmup_cosine_decay_schedule(
      0.0 if warmup else peak, peak, warmup, max(total_steps, 1), self.end_learning_rate
    )

  def make_transform(
    self, schedule: optax.Schedule, shapes: Any, layers: Sequence[str] = ()
  ) -> optax.GradientTransformation:
    """The chain: clip, the optimizer's rule with its weight decay, multipliers, learning rate.

    Args:
      schedule: the learning rate.
      shapes: of the group's parameters.
      layers: regular expressions for `layer_decay`, see there.

    Raises:
      UserError: if a multiplier matches no parameter, or `layer_decay` is set without layers.
    """
    multipliers = self.multipliers
    if self.layer_decay is not None:
      if not layers:
        raise UserError("layer_decay is for a trained image encoder, and this group has none: remove it")
      multipliers += layer_decay(self.layer_decay, layers)
    by_name = tree.first_match(shapes, multipliers, 1.0)
    factors = jax.tree.map(lambda name: by_name[name], tree.names(shapes))
    decayed = jax.tree.map(lambda name: not NO_DECAY.search(name), tree.names(shapes))
    decay = optax.add_decayed_weights(self.weight_decay, decayed) if self.weight_decay else optax.identity()
    rule: tuple[optax.GradientTransformation, ...] = (optax.scale_by_adam(self.b1, self.b2), decay)
    if self.name == "adafactor":
      # The parts of optax.adafactor, which applies the learning rate before the momentum.
      momentum = optax.ema(self.b1, debias=False) if self.b1 else optax.identity()
      rule = (optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), momentum, decay)
    elif self.name == "lars":
      trust = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=TRUST), decayed)
      # optax.lars applies the learning rate before the momentum, which would delay a schedule.
      rule = (decay, trust, optax.trace(self.b1))
    return optax.chain(
      optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity(),
      *rule,
      optax.stateless(
        lambda updates, _: jax.tree.map(lambda update, factor: update * factor, updates, factors)
      )
      if multipliers
      else optax.identity(),
      optax.scale_by_learning_rate(schedule),
    )
