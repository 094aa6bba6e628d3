"""The schema of a run: every key that a config of one model may have, with its meaning."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from maskgen.config import fields
from maskgen.config.build import check_at_least
from maskgen.errors import UserError


@dataclasses.dataclass(frozen=True)
class Mesh:
  """The shape of the device mesh; one axis may be -1, for all devices that are left.

  Attributes:
    data: data parallelism; parameters are replicated along it.
    fsdp: data parallelism with parameters and optimizer state sharded along it.
    tensor: tensor parallelism, by rules in `sharding`.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Checkpointing:
  """When to save, and what to keep.

  Attributes:
    save_steps: save every so many steps.
    save_minutes: save also when so many minutes have passed since the last save.
    keep: how many of the newest checkpoints to keep.
  """

  save_steps: int = 1000
  save_minutes: float = 10.0
  keep: int = 2

  def __post_init__(self):
    check_at_least(self, 1, "save_steps", "keep")
    check_at_least(self, 0, "save_minutes")


@dataclasses.dataclass(frozen=True)
class Profile:
  """A window of steps to record with the JAX profiler, into the workdir for TensorBoard.

  Attributes:
    start_step: the first step of the window.
    steps: how many steps; 0 records nothing.
  """

  start_step: int = 10
  steps: int = 0

  def __post_init__(self):
    check_at_least(self, 0, "start_step", "steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """Every key of a config that trains one model; sections without a type of their own are strict, too.

  Attributes:
    objective: what is trained: `name` is a module of `maskgen.objectives`, the rest are its fields.
    data: the fields of `maskgen.data.pipeline.Data`.
    optimizer: for each parameter group the fields of `maskgen.training.optim.Optimizer`.
    batch_size: examples per step, over all devices and accumulated micro-batches.
    total_steps, total_epochs: the length of the run; give one.
    seed: of initialisation, data order, masks and dropout.
    accumulation: number of micro-batches whose gradients are averaged for one update.
    ema: for a parameter group the decay of its exponential moving average, used for all predictions.
    pretrained: paths of trained models that the objective asks for by name. A section of the objective under
      the same name with name="pretrained" is filled in from that model's own config.
    resume: a workdir whose checkpoint this run starts from, optimizer state included.
    init_from: a workdir, an export or converted weights whose parameters alone this run starts from, see
      `maskgen.training.warm_start`; not needed any more once the run has saved.
    init_fresh: what `init_from` leaves fresh: a regular expression, searched in the names of parameters, such
      as `main/head/logits/kernel`.
    evals: for each evaluation its `type`, a module of `maskgen.evaluators`, `every_steps` and the type's
      fields.
    mesh: the device mesh.
    sharding: ordered (regex, axes) rules over parameter paths, see `maskgen.sharding`.
    log_every_steps: how often averaged training metrics are written.
    checkpoint: when to save.
    profile: a window of steps to profile.
  """

  objective: Mapping[str, Any]
  data: Mapping[str, Any]
  optimizer: Mapping[str, Any]
  batch_size: int
  total_steps: int | None = None
  total_epochs: float | None = None
  seed: int = 0
  accumulation: int = fields.operational(1)
  ema: Mapping[str, float] = dataclasses.field(default_factory=dict)
  pretrained: Mapping[str, str] = dataclasses.field(default_factory=dict)
  resume: str | None = None
  init_from: str | None = fields.operational(None)
  init_fresh: str = fields.operational("")
  evals: Mapping[str, Any] = fields.operational(default_factory=dict)
  mesh: Mesh = fields.operational(Mesh())
  sharding: tuple[tuple[str, tuple[Any, ...]], ...] = fields.operational(())
  log_every_steps: int = fields.operational(50)
  checkpoint: Checkpointing = fields.operational(Checkpointing())
  profile: Profile = fields.operational(Profile())

  def __post_init__(self):
    check_at_least(self, 1, "batch_size", "accumulation", "log_every_steps")
    check_at_least(self, 0, "seed")
    for length in ("total_steps", "total_epochs"):
      if getattr(self, length) is not None:
        check_at_least(self, 1, length)
    for group, decay in self.ema.items():
      if not 0.0 <= decay < 1.0:
        raise UserError(f"ema.{group} is {decay}: a decay is at least 0 and less than 1")
    try:
      re.compile(self.init_fresh)
    except re.error as error:
      raise UserError(f"init_fresh is '{self.init_fresh}', no regular expression: {error}") from None
