"""The best value of one number of the evaluations: which checkpoint stays, and when a run stops early."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from maskgen import config as config_lib
from maskgen import processes
from maskgen.errors import UserError, nearest


def check(cfg: config_lib.RunConfig) -> None:
  """Checks that the evaluation of `checkpoint.keep_best` exists, and that its steps are saved.

  Raises:
    UserError: if not.
  """
  followed = cfg.checkpoint.keep_best
  if followed is None:
    return
  name, saved = followed.partition("/")[0], (cfg.log_every_steps, cfg.checkpoint.save_steps)
  if name not in cfg.evals:
    raise UserError(
      f"config.checkpoint.keep_best is '{followed}', without config.evals.{name}{nearest(name, cfg.evals)}"
    )
  for key in ("every_steps", "first_step"):
    value = cfg.evals[name].get(key, 0)
    if all(value % steps for steps in saved):
      raise UserError(
        f"config.evals.{name}.{key} is {value}, and checkpoint.keep_best needs steps that are saved: make it "
        f"a multiple of log_every_steps={saved[0]} or checkpoint.save_steps={saved[1]}"
      )


class Best:
  """Follows `config.checkpoint.keep_best` from evaluation to evaluation; of equal values the first counts.

  All it knows is in `metrics.jsonl`, so that a run that was killed knows it again.

  Attributes:
    evaluation: the evaluation that gives the number, or "" if no number is followed.
    step: the step of the best value, or None before the first.
    value: the best value.
    misses: the number of evaluations since.
    over: whether so many evaluations brought nothing better that the run stops; the same in all processes.
  """

  def __init__(
    self,
    section: config_lib.Checkpointing,
    lines: Sequence[Mapping[str, Any]] = (),
    kept: Collection[int] = (),
  ):
    """Starts from what a run has written.

    Args:
      section: the section of the config.
      lines: of `metrics.jsonl`, up to the step from which the run continues.
      kept: the steps with a checkpoint; values of others are gone and count only as evaluations.
    """
    self._key, self._section = section.keep_best or "", section
    self.evaluation = self._key.partition("/")[0]
    self.step: int | None = None
    self.value, self.misses = math.nan, 0
    for line in lines:
      if self._key in line:
        self._add(line["step"], float(line[self._key]), line["step"] in kept)
    self.over = self._agree()

  def update(self, step: int, numbers: Mapping[str, float]) -> None:
    """Adds the numbers of an evaluation.

    Raises:
      UserError: if the number that is followed is not among them.
    """
    if self._key not in numbers:
      raise UserError(
        f"config.checkpoint.keep_best is '{self._key}', which config.evals.{self.evaluation} does not give"
        f"{nearest(self._key, numbers)}"
      )
    self._add(step, numbers[self._key], True)
    self.over = self._agree()

  def _agree(self) -> bool:
    patience = self._section.patience
    return bool(patience) and processes.any_of(self.misses >= patience)

  def _add(self, step: int, value: float, is_kept: bool) -> None:
    sign = 1 if self._section.best_mode == "max" else -1
    if is_kept and not math.isnan(value) and (self.step is None or sign * value > sign * self.value):
      self.step, self.value, self.misses = step, value, 0
    else:
      self.misses += 1

  def __str__(self) -> str:
    return f"{self._key} {self.value:.4g} at step {self.step}"
