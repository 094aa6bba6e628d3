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


# TPUs: the page of each version at cloud.google.com/tpu/docs. One way is half of the bidirectional bandwidth
# between chips; v4's page does not give it, so there it is the all-reduce bandwidth of a pod divided by its
# chips, which is the same for other versions. For v5e and v6e the network is that of a pod, divided by its
# 256 chips. Memory is what their compiler offers to a program (libtpu 0.0.42). Prices are on demand in the
# United States, as others quote Google's list: look yours up.
# GPUs: NVIDIA's data sheets of the SXM modules; one way is half of NVLink.
_CHIPS = {
  "TPU v4": Chip("TPU v4", 275e12, 30.75 * _GiB, 1200e9, 1.1e15 / 4096, price=3.22),
  "TPU v5 lite": Chip("TPU v5e", 197e12, 15.75 * _GiB, 819e9, 200e9, 6.4e12 / 8 / 256, price=1.20),
  "TPU v5": Chip("TPU v5p", 459e12, 95.74 * _GiB, 2765e9, 600e9, 50e9 / 8),
  "TPU v6 lite": Chip("TPU v6e", 918e12, 31.25 * _GiB, 1640e9, 400e9, 25.6e12 / 8 / 256, price=2.70),
  "NVIDIA A100-SXM4-40GB": Chip("A100 40 GB", 312e12, 40e9, 1555e9, 300e9),
  "NVIDIA A100-SXM4-80GB": Chip("A100 80 GB", 312e12, 80e9, 2039e9, 300e9),
  "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 80e9, 3350e9, 450e9),
  "NVIDIA H200": Chip("H200", 989e12, 141e9, 4800e9, 450e9),
}
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
