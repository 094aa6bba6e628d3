"""The schema of configs: every key of a config that trains one model, with its meaning."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from maskgen.config import fields
from maskgen.config.build import check_at_least, check_seed
from maskgen.errors import UserError


@dataclasses.dataclass(frozen=True)
class Mesh:
  """The shape of the device mesh; one axis may be -1, for all remaining devices.

  Attributes:
    data: data parallelism; parameters are replicated along it.
    fsdp: data parallelism with parameters and optimizer state sharded along it.
    tensor: tensor parallelism, according to the rules in `sharding`.
    optimizer_over_data: whether optimizer state is sharded along `data` as well (ZeRO-1, Rajbhandari et al.
      2020): each device then updates a part of the parameters.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  optimizer_over_data: bool = False


@dataclasses.dataclass(frozen=True)
class Checkpointing:
  """When to save checkpoints, which to keep, and whether to stop early.

  Attributes:
    save_steps: the number of steps between saves.
    save_minutes: the number of minutes after which to save in between.
    keep: the number of newest checkpoints to keep.
    keep_best: a number of the evaluations, such as `probe/top1`, whose best checkpoint is kept besides.
    best_mode: whether its best value is the "max" or the "min".
    patience: the number of evaluations without a better value after which the run stops early; 0 for never.
  """

  save_steps: int = 1000
  save_minutes: float = 10.0
  keep: int = 2
  keep_best: str | None = None
  best_mode: str | None = None
  patience: int = 0

  def __post_init__(self):
    check_at_least(self, 1, "save_steps", "keep")
    check_at_least(self, 0, "save_minutes", "patience")
    if self.keep_best is None:
      for name in ("best_mode", "patience"):
        if getattr(self, name):
          raise UserError(
            f"{name} is {getattr(self, name)!r} without keep_best: set it, such as 'probe/top1'"
          )
    elif not re.fullmatch(r"[^/]+/.+", self.keep_best):
      raise UserError(f"keep_best is '{self.keep_best}': give a metric, such as 'probe/top1'")
    elif self.best_mode not in ("max", "min"):
      raise UserError(f"best_mode is {self.best_mode!r}: set it to 'max' or 'min', the best {self.keep_best}")


@dataclasses.dataclass(frozen=True)
class Profile:
  """A window of steps to record with the JAX profiler, written to the workdir for TensorBoard.

  Attributes:
    start_step: the first step of the window.
    steps: the number of steps; 0 disables profiling.
  """

  start_step: int = 10
  steps: int = 0

  def __post_init__(self):
    check_at_least(self, 0, "start_step", "steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """The keys of a config that trains one model.

  Attributes:
    objective: the objective: `name` is a module of `maskgen.objectives`, the other keys are its fields.
    data: the fields of `maskgen.data.pipeline.Data`.
    optimizer: for each parameter group, the fields of `maskgen.training.optim.Optimizer`.
    batch_size: examples per step, over all devices and accumulated micro-batches.
    total_steps, total_epochs: the length of the run; set one of them.
    seed: the seed of initialisation, data order, masks and dropout.
    accumulation: number of micro-batches whose gradients are averaged for one update.
    ema: by parameter group, the decay of an exponential moving average, used by predictions, and as a teacher
      by some objectives; or (first, last), between which the decay rises along half a cosine over the run. At
      step s it is at most (1 + s) / (10 + s).
    pretrained: paths of the trained models that the objective needs, by name. A section of the objective with
      the same name that has name="pretrained" is filled in from that model's config.
    resume: a workdir whose checkpoint this run starts from, including optimizer state.
    init_from: a workdir, an export or converted weights that provide only the initial parameters, see
      `maskgen.training.warm_start`; not needed after the run's first save.
    init_fresh: the parameters that `init_from` does not set: a regular expression, searched in their names,
      such as `main/head/logits/kernel`.
    evals: for each evaluation its `type`, a module of `maskgen.evaluators`, `every_steps`, perhaps
      `first_step` for one early evaluation more, and the type's fields.
    mesh: the device mesh.
    sharding: ordered (regex, axes) rules over parameter paths, see `maskgen.sharding`.
    log_every_steps: how often averaged training metrics are written.
    writers: where metrics and pictures go besides `metrics.jsonl`, `samples/` and TensorBoard: "wandb" and
      "mlflow", see `maskgen.training.writers`.
    checkpoint: when to save checkpoints.
    profile: the window of steps to profile.
  """

  objective: Mapping[str, Any]
  data: Mapping[str, Any]
  optimizer: Mapping[str, Any]
  batch_size: int
  total_steps: int | None = None
  total_epochs: float | None = None
  seed: int = 0
  accumulation: int = fields.operational(1)
  ema: Mapping[str, float | tuple[float, float]] = dataclasses.field(default_factory=dict)
  pretrained: Mapping[str, str] = dataclasses.field(default_factory=dict)
  resume: str | None = None
  init_from: str | None = fields.operational(None)
  init_fresh: str = fields.operational("")
  evals: Mapping[str, Any] = fields.operational(default_factory=dict)
  mesh: Mesh = fields.operational(Mesh())
  sharding: tuple[tuple[str, tuple[Any, ...]], ...] = fields.operational(())
  log_every_steps: int = fields.operational(50)
  writers: tuple[str, ...] = fields.operational(())
  checkpoint: Checkpointing = fields.operational(Checkpointing())
  profile: Profile = fields.operational(Profile())

  def __post_init__(self):
    check_at_least(self, 1, "batch_size", "accumulation", "log_every_steps")
    check_seed("seed", self.seed)
    for length in ("total_steps", "total_epochs"):
      if getattr(self, length) is not None:
        check_at_least(self, 1, length)
    for group, decay in self.ema.items():
      if isinstance(decay, list | tuple):
        if not (len(decay) == 2 and 0.0 <= decay[0] < 1.0 and decay[0] <= decay[1] <= 1.0):
          raise UserError(f"ema.{group} is {decay}: give two decays that rise, such as (0.996, 1.0)")
      elif not 0.0 <= decay < 1.0:
        raise UserError(f"ema.{group} is {decay}: it must be at least 0 and less than 1")
    for rule in self.sharding:
      if not _is_rule(rule):
        raise UserError(
          f"sharding has the rule {rule!r}: give a regular expression and a tuple of mesh axes or None, such "
          "as ('up/kernel$', ('fsdp', None))"
        )
    try:
      re.compile(self.init_fresh)
    except re.error as error:
      raise UserError(
        f"init_fresh is '{self.init_fresh}', which is not a regular expression: {error}"
      ) from None


def _is_rule(rule: Any) -> bool:
  """Whether it is a regular expression and a tuple with an axis, several axes or None for each dimension."""
  if not (
    isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str) and isinstance(rule[1], tuple)
  ):
    return False
  try:
    re.compile(rule[0])
  except re.error:
    return False
  axes = [axis for entry in rule[1] for axis in (entry if isinstance(entry, tuple) else (entry,))]
  return all(axis is None or isinstance(axis, str) for axis in axes)
