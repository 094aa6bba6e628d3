"""Rematerialisation: what a backward pass computes again instead of keeping it (Chen et al. 2016)."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from maskgen.errors import UserError, nearest

# By rising cost in time and falling cost in memory: keep everything; of each block its input and the results
# of products with parameters; of each block its input alone.
REMAT = ("none", "dots", "full")


def check_remat(remat: str, choices: Sequence[str] = REMAT) -> None:
  """Checks a choice of `REMAT`, or of some of them.

  Raises:
    UserError: for another one.
  """
  if remat not in choices:
    raise UserError(f"remat '{remat}' does not exist here{nearest(remat, choices)}")


def remat(fn: Callable[..., Any], how: str, *, in_scan: bool = False) -> Callable[..., Any]:
  """Returns `fn` with less to keep for its backward pass; its numbers are the same.

  Args:
    fn: the function.
    how: one of `REMAT`.
    in_scan: whether it is the body of a scan, which needs no guard against merging both computations.
  """
  if how == "none":
    return fn
  return jax.checkpoint(fn, policy=_policy(how), prevent_cse=not in_scan)


def remat_module(module: type[nn.Module], how: str) -> type[nn.Module]:
  """The same for a class of modules; names of parameters do not change."""
  return module if how == "none" else nn.remat(module, policy=_policy(how))


def _policy(how: str) -> Callable[..., Any] | None:
  return jax.checkpoint_policies.dots_with_no_batch_dims_saveable if how == "dots" else None
