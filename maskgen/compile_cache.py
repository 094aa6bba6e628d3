"""Compiled programs that outlive their process: JAX's compilation cache, in a folder of maskgen's own."""

import hashlib
import logging
import os
import pathlib
import platform
import time
import zlib
from collections.abc import Iterator

import jax
import jaxlib

from maskgen import files

# Faster compilations are not worth a file.
_SECONDS = 0.05
# What a folder may hold when a process starts, in bytes.
_LIMIT = 2 * 10**9
# What decides about the machine code that XLA makes for a CPU, as /proc/cpuinfo names it.
_FEATURES = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
_ZSTANDARD = b"\x28\xb5\x2f\xfd"

log = logging.getLogger("maskgen")


def use() -> None:
  """Makes JAX keep the programs that it compiles; call it once devices may be initialised.

  Without effect if the user has configured JAX's cache (`JAX_COMPILATION_CACHE_DIR`) or turned it off
  (`JAX_ENABLE_COMPILATION_CACHE=false`), or has no folder that only they can write: programs are executed.
  Runs of several processes are left alone, too: JAX writes in the first of them only, so that with folders of
  their own, some would load a program that others still compile, which they may do together.
  """
  values = jax.config.values
  if values["jax_compilation_cache_dir"] is not None or not values["jax_enable_compilation_cache"]:
    return
  if os.name != "posix" or jax.process_count() > 1:
    return
  try:
    root = files.cache_folder() / "compiled"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = root.stat()
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
      log.warning("compiled programs are not kept: others can write to %s", root)
      return
    prune(root, _LIMIT)
    folder = root / f"jaxlib-{jaxlib.__version__}-{machine()}"
    folder.mkdir(mode=0o700, exist_ok=True)
  except (OSError, RuntimeError) as error:  # no home, or one that is not writable
    log.info("compiled programs are not kept (%s)", error)
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", _SECONDS)


def machine() -> str:
  """Identifies the CPU and the number of usable cores: JAX's keys contain neither, and programs need both."""
  try:
    first = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    about = [line for line in first.splitlines() if line.split("\t")[0].strip() in _FEATURES]
  except OSError:
    about = [platform.version(), platform.processor()]
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return hashlib.sha256(repr((platform.machine(), about, cores)).encode()).hexdigest()[:16]


def prune(root: pathlib.Path, limit: int) -> None:
  """Removes damaged programs, and those that were not used for longest until the rest fits into a limit.

  Other processes may use the folder: for them, a program that is gone is one to compile.

  Args:
    root: a folder with a folder of programs for each kind of machine.
    limit: in bytes.
  """
  checked, now = root / "checked", time.time()
  since = checked.stat().st_mtime if checked.exists() else 0.0
  left = limit
  for path, about in sorted(_programs(root), key=lambda item: -max(item[1].st_atime, item[1].st_mtime)):
    left -= about.st_size
    # JAX does not write atomically, nor does it replace a file that was cut off.
    if left < 0 or (about.st_mtime >= since and _is_cut_off(path)):
      path.unlink(missing_ok=True)
  checked.touch()
  os.utime(checked, (now, now))


def _programs(root: pathlib.Path) -> Iterator[tuple[pathlib.Path, os.stat_result]]:
  for path in root.glob("*/*-cache"):
    try:
      yield path, path.stat()
    except FileNotFoundError:
      continue


def _is_cut_off(path: pathlib.Path) -> bool:
  """Whether a file lacks its end; those that JAX compresses by Zstandard, if it can, count as whole."""
  try:
    data = path.read_bytes()
    if not data.startswith(_ZSTANDARD):
      zlib.decompress(data)
  except FileNotFoundError:
    return False
  except zlib.error:
    return True
  return False
