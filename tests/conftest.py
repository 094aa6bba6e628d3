"""Eight virtual CPU devices, strict numerics, a compile cache, no network."""

import gc
import os
import pathlib
import tempfile

# Before JAX or TensorFlow is imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  (
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    # Tests compile much and run little: this compiles six times as fast.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_use_fusion_emitters=false",
  )
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

# Subprocesses have it, too.
os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{tempfile.gettempdir()}/maskgen_test_compile_cache_{os.getuid()}"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

from maskgen import plugins
from maskgen.config import fields

# Arrays of different rank do not broadcast by accident. (Flax and Optax rule strict dtypes out.)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish() -> None:
  """Collects garbage less often: imports stay, and tracing makes many objects of which most stay a while."""
  gc.freeze()
  gc.set_threshold(50_000)


def pytest_unconfigure() -> None:
  """Leaves what remains alone: pytest-xdist interrupts a worker that collects it for seconds at its end."""
  gc.freeze()


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
  return pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
  """A test leaves neither the memory of warnings that a process logs once nor folders with code."""
  monkeypatch.setattr(fields, "_warned", set())
  monkeypatch.setattr(plugins._code_folders, "folders", [*plugins._code_folders.folders])
