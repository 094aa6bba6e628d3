"""TensorFlow with few log messages and without accelerators, whose memory belongs to JAX.

It is imported when it is first used, so that records that are arrays are read without it.
"""

import functools
import importlib
import os
import types
from typing import TYPE_CHECKING, Any

from maskgen.errors import UserError


class _Tf:
  @functools.cached_property
  def module(self) -> types.ModuleType:
    # Both are read once, when TensorFlow is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
      found = importlib.import_module("tensorflow")
    except ImportError as error:
      raise UserError(
        f"this data needs TensorFlow, which is missing ({error}): pip install tensorflow, or train on a "
        "token cache with evaluations on arrays"
      ) from error
    for kind in ("GPU", "TPU"):
      found.config.set_visible_devices([], kind)
    return found

  def __getattr__(self, name: str) -> Any:
    return getattr(self.module, name)


if TYPE_CHECKING:
  import tensorflow as tf
else:
  tf = _Tf()

__all__ = ["tf"]
