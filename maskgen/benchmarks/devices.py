"""The devices of this machine: their names, memory, and speed of matrix products."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maskgen.costs import chips
from maskgen.errors import UserError, out_of_memory

try:
  import resource
except ImportError:  # on Windows
  resource = None  # type: ignore[assignment]

# Sizes of square matrices, from fast on any machine to large enough to saturate any accelerator.
_SIZES = tuple(2**power for power in range(9, 15))
# If one product takes longer, the next size, which takes eight times as long, is skipped.
_SECONDS_PER_PRODUCT = 0.1
_SECONDS_PER_REPEAT = 0.05
_REPEATS = 5


def describe() -> dict[str, Any]:
  """The devices of all processes."""
  return {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}


def matmul_peak(dtype: str) -> float:
  """Measures FLOP/s of square matrix products: the best size's best repeat, over all devices.

  All devices of this process multiply at the same time, since virtual devices share cores; all processes are
  assumed to be equally fast.

  Args:
    dtype: of the factors and the product.
  """
  devices = jax.local_devices()
  mesh = jax.make_mesh((len(devices),), ("rows",), axis_types=(AxisType.Auto,), devices=devices)
  rows, everywhere = NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())
  multiply = jax.jit(jnp.matmul, out_shardings=rows)
  best = 0.0
  for size in _SIZES:
    # Products of products keep their scale.
    left = _normal((len(devices) * size, size), 1.0, dtype, rows)
    right = _normal((size, size), size**-0.5, dtype, everywhere)

    def seconds(count: int, left: jax.Array = left, right: jax.Array = right) -> float:
      began = time.perf_counter()
      product = left
      for _ in range(count):
        product = multiply(product, right)
      jax.block_until_ready(product)
      return (time.perf_counter() - began) / count

    seconds(2)  # to compile and warm up
    count = math.ceil(_SECONDS_PER_REPEAT / seconds(1))
    fastest = min(seconds(count) for _ in range(_REPEATS))
    best = max(best, 2 * len(devices) * size**3 / fastest)
    if fastest > _SECONDS_PER_PRODUCT:
      break
  return best * jax.process_count()


def _normal(shape: tuple[int, int], scale: float, dtype: str, where: NamedSharding) -> jax.Array:
  def draw() -> jax.Array:
    return scale * jax.random.normal(jax.random.key(0), shape, dtype)

  return jax.jit(draw, out_shardings=where)()


def utilisation(result: Mapping[str, Any], peak: float) -> dict[str, float]:
  """The share of the devices' peak that a training step uses.

  Args:
    result: of `step.measure`.
    peak: FLOP/s, from `matmul_peak`.

  Returns:
    The peak and the share of it; and of chips whose vendor states what they do in bfloat16, the same by that.
  """
  achieved = result["achieved_flops_per_second"]
  found = {"peak_flops_per_second": peak, "mfu": achieved / peak}
  chip = chips.chip_of(jax.devices()[0])
  if chip is not None and result["dtype"] == "bfloat16":
    stated = chip.flops * result["devices"]
    found |= {"stated_flops_per_second": stated, "mfu_of_stated": achieved / stated}
  return found


def peak_memory() -> dict[str, Any]:
  """The peak of bytes in use so far, of the fullest device or else of this process; unknown on Windows."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
  if peaks:
    return {"peak_memory_bytes": max(peaks), "peak_memory_of": "device"}
  if resource is None:
    return {}
  unit = 1 if sys.platform == "darwin" else 1024
  resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  return {"peak_memory_bytes": resident, "peak_memory_of": "process"}


@contextlib.contextmanager
def enough_memory(batch_size: int) -> Iterator[None]:
  """Turns exhausted device memory into an error for users.

  Raises:
    UserError: if device memory is exhausted.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not (found := out_of_memory(error)):
      raise
    raise UserError(
      f"--batch_size={batch_size}: device memory is exhausted ({found}): use a smaller batch"
    ) from error
