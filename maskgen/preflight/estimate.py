"""One configuration, compiled for its devices: memory, arithmetic, communication, bounds on a step's time."""

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from maskgen import sharding
from maskgen.benchmarks import dataless
from maskgen.benchmarks.model_flops import model_flops
from maskgen.costs import chips, flops, hlo
from maskgen.training.experiment import Experiment

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def estimate(
  config: Mapping[str, Any],
  devices: Sequence[jax.Device],
  source: str = "synthetic",
  limit: float | None = None,
) -> dict[str, Any]:
  """Compiles the training step of a plain config of one stage, and reports what one of its devices needs.

  Args:
    config: the config.
    devices: to compile for; they need not exist on this machine.
    source: "synthetic" for images, or "tokens" for cached codes.
    limit: the bytes of a device for which `devices` only stand, whose activations are therefore estimates.

  Returns:
    The report that `docs/scaling.md` explains. If the step does not fit, keys that need a compiled step are
    missing.

  Raises:
    UserError: if the config is wrong, or its batch or a parameter does not divide over its mesh.
  """
  experiment = dataless.build(config, source, devices)
  batch = dataless.batch_spec(experiment, source)
  target = experiment.targets
  chip = chips.chip_of(devices[0])
  needed = model_flops(experiment, batch)
  size = experiment.config.batch_size
  report: dict[str, Any] = {
    "devices": len(devices),
    "device_kind": devices[0].device_kind,
    "mesh": dict(experiment.mesh.shape),
    "batch_size": size,
    "source": source,
    "flops_per_step": needed,
    "flops_per_image": needed / size,
    "state_bytes_per_device": _state_bytes(target, batch),
    "hbm_limit_bytes": _limit(devices, chip) if limit is None else limit,
    "activations_are_estimated": limit is not None,
  }
  began = time.monotonic()
  try:
    compiled = experiment.compile(batch)
  except jax.errors.JaxRuntimeError as error:
    if not (used := re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", str(error))):
      raise
    number, unit, *_ = used.groups()
    memory = int(float(number) * _UNITS[unit])
    return report | {
      "fits": False,
      "hbm_bytes_per_device": memory,
      "compile_seconds": time.monotonic() - began,
    }
  seconds = time.monotonic() - began
  stats = compiled.memory_analysis()
  memory = (
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes
    + stats.temp_size_in_bytes
  )
  if devices[0].platform == "tpu":
    # On TPUs the sum of temporaries ignores their lifetimes; elsewhere the peak does not include them.
    memory = getattr(stats, "peak_memory_in_bytes", 0) or memory
  program = hlo.analyse(compiled.as_text())
  report |= {
    "fits": memory <= report["hbm_limit_bytes"],
    "hbm_bytes_per_device": memory,
    "activation_bytes_per_device": memory - stats.argument_size_in_bytes,
    "compile_seconds": seconds,
    "traffic_bytes_per_device": program.traffic,
    "collectives": {
      kind: {"count": found.count, "bytes": found.bytes} for kind, found in program.collectives.items()
    },
    "collective_bytes_lower_bound": _least_communication(experiment),
  }
  if chip is not None:
    slices = sharding.num_slices(devices)
    update = experiment.make_update(experiment.objective)
    arguments = update, target["state"], target["frozen"], batch
    bounds = chips.bounds(chip, len(devices), flops.count(*arguments), program, slices)
    expected = chips.expected(chip, len(devices), program, flops.count_kernels(*arguments), bounds)
    longest = max(bounds.values())
    report |= {
      "bounds_seconds": bounds,
      "estimated_step_seconds": longest,
      "step_seconds_without_overlap": sum(bounds.values()),
      "mfu_bound": needed / (len(devices) * chip.flops * longest),
      "images_per_second": size / longest,
      "expected_seconds": expected,
      "expected_step_seconds": expected and sum(expected.values()),
      "price_per_hour": None if chip.price is None else chip.price * len(devices),
    }
  return report


def _state_bytes(target: Mapping[str, Any], batch: Any) -> dict[str, int]:
  state = target["state"]
  parts = {
    "parameters": state.params,
    "optimizer": state.opt_state,
    "averages": state.ema,
    "frozen": target["frozen"],
    "batch": batch,
  }
  return {name: sum(map(_local_bytes, jax.tree.leaves(part))) for name, part in parts.items()}


def _local_bytes(leaf: Any) -> int:
  return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _limit(devices: Sequence[Any], chip: chips.Chip | None) -> float:
  """The bytes that a program may use on each device."""
  device = devices[0]
  if device.platform == "cpu":  # virtual devices share what the machine has
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)
  if device.platform == "tpu" and chip is not None:  # it may be elsewhere
    return chip.memory
  # JAX takes a part of a GPU's memory, three quarters unless told otherwise.
  return (device.memory_stats() or {}).get("bytes_limit", math.inf if chip is None else chip.memory)


def _least_communication(experiment: Experiment) -> float:
  """The minimum of bytes that each device sends in large groups: an all-reduce sends gradients twice.

  With fsdp, parameters are gathered for the forward and the backward pass, and gradients are reduced once
  into their shards; those shards are then summed over `data`.
  """
  mesh = experiment.mesh.shape
  whole = sum(
    leaf.dtype.itemsize * math.prod(leaf.shape)
    for leaf in jax.tree.leaves(experiment.targets["state"].params)
  )
  fsdp = 3 * whole if mesh["fsdp"] > 1 else 0
  data = 2 * whole / mesh["fsdp"] if mesh["data"] > 1 else 0
  return (fsdp + data) / mesh["tensor"]
