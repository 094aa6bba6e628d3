"""Checks the installation and the devices: python -m maskgen.tools.doctor"""

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence

from maskgen import cli
from maskgen.errors import UserError
from maskgen.training import cpu

_PACKAGES = ("maskgen", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets")
_TENSORFLOW = ("tensorflow-cpu", "tensorflow")
_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")
_LEAST_DISK = 5  # GB


def main(argv: Sequence[str]) -> None:
  """Prints what was found, and a line with a remedy for everything that is wrong.

  Raises:
    UserError: if something is wrong.
  """
  parser = cli.Parser(
    "Prints versions, devices, memory and the default mesh, and checks whether JAX uses the accelerator of "
    "this machine, whether its plug-in has JAX's version, and whether every device computes.",
    "python -m maskgen.tools.doctor",
  )
  parser.parse_args(argv)
  problems = 0
  for line, problem in examine():
    print(line)
    if problem:
      print(f"  problem: {problem}")
      problems += 1
  if problems:
    raise UserError(f"{problems} of these checks failed: the remedies are above")
  print("everything works")


def examine() -> Iterator[tuple[str, str]]:
  """Yields a line for each thing that is checked, and what is wrong with it, or ""."""
  yield f"Python {platform.python_version()} on {platform.platform()}", ""
  yield ", ".join(f"{name} {version(name)}" for name in _PACKAGES), _missing(_PACKAGES)
  found = [f"{name} {version(name)}" for name in _TENSORFLOW if version(name)]
  without = (
    "not installed, so that only token caches and other arrays can be read: pip install tensorflow-cpu "
    "(tensorflow on macOS and ARM)"
  )
  yield f"TensorFlow: {', '.join(found) + ' (reads data on the CPU)' if found else without}", ""
  for name in _PLUGINS:
    if version(name):
      yield f"{name} {version(name)}", plugin_problem(name, version(name), version("jaxlib"))

  import jax
  import jax.numpy as jnp

  devices = jax.local_devices()
  kinds = f"{len(devices)} x {devices[0].device_kind}"
  yield f"JAX runs on {kinds}", cpu.missing_accelerator(devices[0].platform)
  for device in devices:
    stats = device.memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    memory = f", {free / 1e9:.1f} GB free for JAX" if stats else ""
    product = jax.jit(lambda x: x @ x)(jax.device_put(jnp.full((8, 8), 0.5), device))
    sound = bool((product == 2.0).all())
    yield f"  {device}{memory}", "" if sound else "its matrix products are wrong: test its memory"
  on_cpu = devices[0].platform == "cpu"
  cores = f"; training makes up to {min(os.cpu_count() or 1, 4)} devices of the cores" if on_cpu else ""
  yield f"default mesh: data={len(devices)}, fsdp=1, tensor=1{cores}", ""
  disk = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
  yield (
    f"{disk:.0f} GB free in {tempfile.gettempdir()}",
    "" if disk >= _LEAST_DISK else f"caches need {_LEAST_DISK} GB: make room, or set TMPDIR",
  )


def version(name: str) -> str:
  """The version of an installed package, or ""."""
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return ""


def plugin_problem(name: str, found: str, jaxlib: str) -> str:
  """What is wrong with a plug-in's version; CUDA's must have that of jaxlib."""
  if name == "libtpu" or found == jaxlib:
    return ""
  return f"jaxlib is {jaxlib}, so that JAX ignores it: pip install -U {name}=={jaxlib}"


def _missing(names: Sequence[str]) -> str:
  absent = ["-e ." if name == "maskgen" else name for name in names if not version(name)]
  return f"pip install {' '.join(absent)}" if absent else ""


if __name__ == "__main__":
  cli.run(main)
