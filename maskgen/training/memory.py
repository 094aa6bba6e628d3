"""The memory of this host that evaluations need, stated and checked before a run starts."""

import logging
import pathlib
import re

from maskgen.errors import UserError
from maskgen.training.experiment import Experiment

_CGROUP = pathlib.Path("/sys/fs/cgroup")
_STATED = 1e8  # bytes; less needs no line in the log
log = logging.getLogger("maskgen")


def check(experiment: Experiment, name: str) -> None:
  """Checks that each evaluation of a run fits into memory.

  Args:
    experiment: the run.
    name: of the run, for the log.

  Raises:
    UserError: if one does not fit.
  """
  needed, data = {}, experiment.data
  for key, (_, evaluator) in experiment.evaluators.items():
    if hasattr(evaluator, "memory"):
      spec, sizes = (
        data.eval_spec(experiment.eval_batch_size),
        {"train": data.num_train, "eval": data.num_eval},
      )
      needed[key] = evaluator.memory(experiment.call_shapes, spec, sizes)
  stated = [f"{key} {size / 1e9:.1f} GB" for key, size in needed.items() if size >= _STATED]
  free = available()
  if stated:
    log.info("%s: evaluations need memory: %s", name, ", ".join(stated))
  for key, size in needed.items():
    if free is not None and size > free:
      raise UserError(
        f"config.evals.{key} needs about {size / 1e9:.1f} GB of memory for what it collects, and "
        f"{free / 1e9:.1f} GB are available: lower its num_images, or remove it"
      )


def available() -> int | None:
  """The bytes that this process can still take on its host or in its container; None without Linux."""
  found = []
  if (total := _read(pathlib.Path("/proc/meminfo"), r"MemAvailable:\s+(\d+) kB")) is not None:
    found.append(1024 * total)
  limit, used = (_read(_CGROUP / f"memory.{name}", r"(\d+)") for name in ("max", "current"))
  if limit is not None and used is not None:
    cached = _read(_CGROUP / "memory.stat", r"^inactive_file (\d+)") or 0
    found.append(limit - used + cached)
  return min(found, default=None)


def _read(path: pathlib.Path, pattern: str) -> int | None:
  """The first number that a pattern finds in a file; None if there is none."""
  try:
    match = re.search(pattern, path.read_text(), flags=re.MULTILINE)
  except OSError:
    return None
  return int(match[1]) if match else None
