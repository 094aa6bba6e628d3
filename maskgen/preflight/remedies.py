"""Changes that may make a step fit in memory, in the order in which they are tried."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from maskgen import objectives, sharding
from maskgen.config import fields
from maskgen.errors import UserError
from maskgen.preflight.estimate import estimate

log = logging.getLogger("maskgen")

Change = dict[str, Any]  # config keys with their new values


def find(
  config: Mapping[str, Any],
  devices: Sequence[jax.Device],
  source: str,
  report: Mapping[str, Any],
  limit: float | None = None,
) -> tuple[Change, dict[str, Any]] | None:
  """Finds the first change that makes a step fit, by compiling them one after the other.

  Args:
    config: a plain config of one stage, whose step does not fit.
    devices: to compile for.
    source: see `estimate`.
    report: the step's `estimate`.
    limit: see `estimate`.

  Returns:
    The change and its report, or None if none of the changes suffices.
  """
  for change in candidates(config, report, sharding.num_slices(devices)):
    log.info("does not fit; trying %s", show(change))
    try:
      found = estimate(apply(config, change), devices, source, limit)
    except UserError as error:  # the sharding does not divide a parameter or the batch
      log.info("%s", error)
      continue
    if found["fits"]:
      return change, found
  return None


def candidates(config: Mapping[str, Any], report: Mapping[str, Any], slices: int = 1) -> Iterator[Change]:
  """Yields changes: more fsdp if that may suffice, then remat, accumulation, and both with more fsdp."""
  mesh, state = report["mesh"], report["state_bytes_per_device"]
  # Parameters stay within a slice.
  fsdp = {"mesh.fsdp": mesh["data"] * mesh["fsdp"] // slices, "mesh.data": slices}
  saved = (1 - slices / mesh["data"]) * sum(state[part] for part in ("parameters", "optimizer", "averages"))
  if saved >= report["hbm_bytes_per_device"] - report["hbm_limit_bytes"]:
    yield fsdp
  steps = list(_less_memory(config["objective"]))
  most = steps[-1] if steps else {}
  per_device = report["batch_size"] // (mesh["data"] * mesh["fsdp"])
  accumulation = config.get("accumulation", 1)
  while 2 * accumulation <= per_device:
    accumulation *= 2
    steps.append(most | {"accumulation": accumulation})
  yield from steps
  if saved:
    yield from (fsdp | step for step in steps)


def _less_memory(section: Mapping[str, Any]) -> Iterator[Change]:
  """Yields settings with which an objective's networks store less and less for the backward pass."""
  left = {}
  for path, field, value in fields.walk(objectives.find(section), section):
    choices = field.metadata.get("less_memory", ())
    left[".".join(("objective", *path))] = choices[choices.index(value) + 1 if value in choices else 0 :]
  for level in range(max(map(len, left.values())), 0, -1):
    yield {key: choices[-level] for key, choices in left.items() if len(choices) >= level}


def apply(config: Mapping[str, Any], change: Change) -> dict[str, Any]:
  """Returns a copy of a plain config with other values for some keys."""
  return fields.replace(config, {tuple(key.split(".")): value for key, value in change.items()})


def show(change: Change) -> str:
  """The command-line flags of a change."""
  return " ".join(f"--config.{key}={value}" for key, value in change.items())
