"""Devices to compile for: a remote TPU slice, a GPU by its memory, virtual CPUs, or those of this machine."""

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from maskgen.errors import UserError

# Without these, libtpu queries the machine for a long time and locks its TPU.
_NO_TPU_HERE = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TPU_MIN_LOG_LEVEL": "3",
  "TPU_STDERR_LOG_LEVEL": "3",
}


def devices(topology: str, slices: int = 1) -> Sequence[jax.Device]:
  """Returns the devices of a topology; call it before anything else asks JAX for devices.

  Args:
    topology: a TPU slice by its kind and shape, such as `v5e:16x16`; `gpu:24GiB`, for which a CPU device
      stands; `cpu:8`; or `local`.
    slices: the number of such TPU slices.

  Raises:
    UserError: if there is no such topology, or its compiler is not installed.
  """
  kind, _, shape = topology.partition(":")
  if slices > 1 and (kind in ("cpu", "gpu", "local")):
    raise UserError(f"--slices={slices}: only TPU slices can be combined, {topology} cannot")
  if topology == "local":
    return jax.devices()
  jax.config.update("jax_platforms", "cpu")
  if memory(topology) is not None:
    return jax.devices()[:1]
  if kind == "cpu":
    if not re.fullmatch(r"[1-9]\d{0,3}", shape):
      raise UserError(f"--topology={topology}: give the number of CPU devices, such as cpu:8")
    jax.config.update("jax_num_cpu_devices", int(shape))
    return jax.devices()
  if not re.fullmatch(r"v\d\w*:[1-9]\d{0,2}(x[1-9]\d{0,2}){1,2}", topology):
    raise UserError(
      f"--topology={topology}: give a TPU slice such as v5e:16x16 or v5p:4x4x4, or gpu:24GiB, cpu:8 or local"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      f"--topology={topology}: compiling for TPUs needs libtpu, install it with: pip install 'maskgen[tpu]'"
    )
  check_libtpu()
  for name, value in _NO_TPU_HERE.items():
    os.environ.setdefault(name, value)
  try:
    # A chip of v4 is one device, as those of later versions are.
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices, **options)
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).splitlines()[0].partition(": ")[2]
    raise UserError(f"--topology={topology}: there is no such TPU slice ({reason})") from None
  return found.devices


def check_libtpu() -> None:
  """Raises UserError for another version than JAX's own, whose programs JAX may compile but not read."""
  requirements = importlib.metadata.requires("jax") or ()
  needed = next((text for text in requirements if text.startswith("libtpu==")), "")
  version = needed.partition(";")[0].strip().removeprefix("libtpu==").removesuffix(".*")
  try:
    found = importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:  # built from source
    return
  if version and not f"{found}.".startswith(f"{version}."):
    raise UserError(
      f"libtpu {found} is installed, but JAX {jax.__version__} needs {version}: install it with "
      f"pip install 'jax[tpu]=={jax.__version__}'"
    )


def memory(topology: str) -> float | None:
  """The bytes that JAX takes of a GPU such as `gpu:24GiB`, by default three quarters; None for others."""
  found = re.fullmatch(r"gpu:([1-9]\d{0,3})GiB", topology)
  share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
  return None if found is None else share * int(found[1]) * 2**30
