"""The limits of a chip, and lower bounds on the time of a program."""

import dataclasses
from typing import Any

from maskgen.costs.hlo import Program

_GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """The limits of a chip, as its vendor states them."""

  name: str
  flops: float  # bf16 operations per second, dense
  memory: float  # bytes of HBM that a program may use
  bandwidth: float  # bytes per second between the chip and its HBM
  interconnect: float  # bytes per second out of the chip over all its links to others of its slice or host
  network: float | None = (
    None  # bytes per second out of the chip over the data-centre network; None if unknown
  )
  price: float | None = None  # US dollars per hour on demand, without commitment; None if unknown
  clock: float | None = None  # cycles per second of the compiler's estimates; None if it has none
  lanes: int = 4096  # vector operations on 32-bit numbers per cycle, by the same compiler


# TPUs: the page of each version at cloud.google.com/tpu/docs. One way is half of the bidirectional bandwidth
# between chips; v4's page does not give it, so there it is the all-reduce bandwidth of a pod divided by its
# chips, which is the same for other versions. For v5e and v6e the network is that of a pod, divided by its
# 256 chips. Memory is what their compiler offers to a program (libtpu 0.0.42). Prices are on demand in the
# United States, as others quote Google's list: look yours up. A clock is the peak divided by the
# multiply-adds of a cycle; for v6e, whose page leaves them open, v5p's.
# GPUs: NVIDIA's data sheets of the SXM modules; one way is half of NVLink.
_CHIPS = {
  "TPU v4": Chip("TPU v4", 275e12, 30.75 * _GiB, 1200e9, 1.1e15 / 4096, price=3.22, clock=1.05e9),
  "TPU v5 lite": Chip("TPU v5e", 197e12, 15.75 * _GiB, 819e9, 200e9, 6.4e12 / 8 / 256, 1.20, 1.5e9),
  "TPU v5": Chip("TPU v5p", 459e12, 95.74 * _GiB, 2765e9, 600e9, 50e9 / 8, clock=1.75e9, lanes=8192),
  "TPU v6 lite": Chip("TPU v6e", 918e12, 31.25 * _GiB, 1640e9, 400e9, 25.6e12 / 8 / 256, 2.70, 1.75e9),
  "NVIDIA A100-SXM4-40GB": Chip("A100 40 GB", 312e12, 40e9, 1555e9, 300e9),
  "NVIDIA A100-SXM4-80GB": Chip("A100 80 GB", 312e12, 80e9, 2039e9, 300e9),
  "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 80e9, 3350e9, 450e9),
  "NVIDIA H200": Chip("H200", 989e12, 141e9, 4800e9, 450e9),
}
# By how much the TPU compiler's estimates exceed the ideal time: at most this, for a product of two bf16
# matrices of 8192 x 8192 (1.08 to 1.42) and for a stream through HBM (1.23 to 1.39), libtpu 0.0.42.
_KERNEL_FACTOR = 1.4
# How often the bytes of a full array leave each of n chips at least: ring schedules, which are optimal.
_LEAVING = {
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-gather": lambda n: (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1.0,
}


def chip_of(device: Any) -> Chip | None:
  """The chip of a `jax.Device`, or of a device of a topology; None if unknown, such as a CPU."""
  return _CHIPS.get(device.device_kind)


def expected(
  chip: Chip, num_devices: int, program: Program, kernels: tuple[int, int], bounds: dict[str, float]
) -> dict[str, float] | None:
  """The time of a step by the TPU compiler's own estimates, with nothing overlapping.

  They include what the vector units do, such as random bits, but neither communication nor Pallas kernels.
  A kernel counts with the largest of its products, its other operations and its traffic at the chip's peak,
  times a factor by which the compiler's estimates of its own kernels exceed such a bound.

  Args:
    chip: of every device.
    num_devices: the number of devices of all slices together.
    program: of one device.
    kernels: what all devices together compute in kernels, from `flops.count_kernels`.
    bounds: of the same program, from `bounds`.

  Returns:
    Seconds of `compiler`, `kernels` and `communication`, or None for chips whose compiler estimates nothing.
  """
  if chip.clock is None or not program.cycles:
    return None
  products, elements = (amount / num_devices for amount in kernels)
  ideal = max(
    products / chip.flops, elements / (chip.lanes * chip.clock), program.kernel_traffic / chip.bandwidth
  )
  return {
    "compiler": program.cycles / chip.clock,
    "kernels": _KERNEL_FACTOR * ideal,
    "communication": bounds["interconnect"] + bounds.get("network", 0.0),
  }


def bounds(chip: Chip, num_devices: int, flops: float, program: Program, slices: int = 1) -> dict[str, float]:
  """Lower bounds on the seconds of a step, each as if only one resource limited it, perfectly used.

  Args:
    chip: of every device.
    num_devices: the number of devices of all slices together.
    flops: operations of all devices together, as `flops.count` returns.
    program: what one device moves.
    slices: the number of slices, connected by the data-centre network.

  Returns:
    Seconds of `compute`, `memory` and `interconnect`; also of `network` if there are several slices and the
    speed of the chip's network is known.
  """
  leaving = sum(
    use.count * use.bytes * _LEAVING[kind](len(use.groups[0]))
    for kind, collective in program.collectives.items()
    for use in collective.uses
  )
  seconds = {
    "compute": flops / (num_devices * chip.flops),
    "memory": program.traffic / chip.bandwidth,
    "interconnect": leaving / chip.interconnect,
  }
  if slices > 1 and chip.network is not None:
    leaving = sum(_LEAVING[kind](slices) * between.bytes for kind, between in program.network.items())
    seconds["network"] = leaving / chip.network
  return seconds
