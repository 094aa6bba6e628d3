"""How long a run will take: measured on a few steps of it, with parameters that nobody keeps."""

import logging
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from maskgen import processes
from maskgen.training import memory
from maskgen.training.experiment import Experiment

log = logging.getLogger("maskgen")

_STEPS = 2
# FLOPs that take a CPU about a minute.
_MOST_FLOPS = 3e12


def forecast(experiment: Experiment, compiled: Any, batches: Iterator[Any]) -> str:
  """Says how long the training steps of a run take here, without evaluations and saves.

  Pretrained parameters are replaced by zeros, since they need not exist yet and take as long.

  Args:
    experiment: the run; with several processes this is a collective call.
    compiled: its step, see `Experiment.compile`.
    batches: of the training data, on the devices.

  Returns:
    The time, or why it was not measured.
  """
  reason = _too_large(compiled, experiment.mesh.local_devices[0])
  if processes.any_of(bool(reason)):  # a step takes all of them
    return f"time not measured: {reason or 'another process has too little memory'}"
  log.info("timing %d steps, from parameters whose initialization is compiled first", _STEPS)
  seconds = seconds_per_step(experiment, compiled, batches, _STEPS)
  total = experiment.total_steps
  minutes = total * seconds / 60
  duration = f"{minutes:.2g} minutes" if minutes < 99 else f"{minutes / 60:,.1f} hours"
  return (
    f"about {duration} for {total:,} steps here, by {_STEPS} steps of {seconds:.3g} s, without evaluations"
  )


def seconds_per_step(experiment: Experiment, compiled: Any, batches: Iterator[Any], steps: int) -> float:
  """Measures training steps after a first one; for arguments see `forecast`."""
  shapes = experiment.targets["pretrained"]
  zeros = jax.jit(
    lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
    out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes),
  )
  state, frozen = experiment.first_state(zeros(), {})
  state, values = compiled(state, frozen, next(batches))
  jax.block_until_ready(values)
  began = time.monotonic()
  for _ in range(steps):
    state, values = compiled(state, frozen, next(batches))
  jax.block_until_ready(values)
  return (time.monotonic() - began) / steps


def _too_large(compiled: Any, device: jax.Device) -> str:
  """Why two steps should not be run on this machine; "" if they may."""
  sizes = compiled.memory_analysis()
  needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
  if device.platform == "cpu":
    cost = compiled.cost_analysis() or {}
    if cost.get("flops", 0.0) > _MOST_FLOPS:
      return f"a step has {cost['flops']:.1e} FLOPs, many for a CPU"
    free, needed = memory.available(), needed * jax.local_device_count()
  else:
    free = (device.memory_stats() or {}).get("bytes_limit")
  if free is not None and needed > free:
    return f"a step needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are there"
  return ""
