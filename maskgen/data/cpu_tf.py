"""TensorFlow with few log messages and without accelerators, whose memory belongs to JAX.

It is imported when it is first used, so that records that are arrays are read without it.
"""

import functools
import importlib
import os
import types
from typing import TYPE_CHECKING, Any

from maskgen.errors import UserError


@functools.cache
def load() -> types.ModuleType:
  """Imports TensorFlow.

  Raises:
    UserError: if it is not installed.
  """
  # Both are read once, when TensorFlow is imported.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  try:
    found = importlib.import_module("tensorflow")
  except ImportError as error:
    raise missing(error) from error
  for kind in ("GPU", "TPU"):
    found.config.set_visible_devices([], kind)
  return found


def missing(error: ImportError) -> UserError:
  """Returns the error for data that needs a package that is not installed."""
  return UserError(
    f"this data needs {error.name or 'TensorFlow'}, which cannot be imported ({error}): install "
    "tensorflow-cpu (tensorflow on macOS and ARM) and tensorflow-datasets, or use sources that need neither, "
    "see docs/your_pictures.md"
  )


class _Tf:
  def __getattr__(self, name: str) -> Any:
    return getattr(load(), name)


if TYPE_CHECKING:
  import tensorflow as tf
else:
  tf = _Tf()

__all__ = ["load", "missing", "tf"]
