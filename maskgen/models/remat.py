"""Rematerialisation: what a backward pass recomputes instead of storing (Chen et al. 2016)."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from maskgen.errors import UserError, nearest

# In order of decreasing memory: store everything; store each block's input, the results of products with
# parameters and what is marked by `keep`; store only each block's input.
REMAT = ("none", "dots", "full")
_KEPT = "kept"


def check_remat(remat: str, choices: Sequence[str] = REMAT) -> None:
  """Checks a choice of `REMAT`, or of some of them.

  Raises:
    UserError: if it is none of these.
  """
  if remat not in choices:
    raise UserError(f"remat '{remat}' is not supported here{nearest(remat, choices)}")


def keep(x: jax.Array) -> jax.Array:
  """Marks an array that "dots" stores although it is not the result of a product with parameters."""
  return checkpoint_name(x, _KEPT)


def remat(fn: Callable[..., Any], how: str, *, in_scan: bool = False) -> Callable[..., Any]:
  """Returns `fn` with less stored for its backward pass; results are the same.

  Args:
    fn: the function.
    how: one of `REMAT`.
    in_scan: whether it is the body of a scan, which does not need `prevent_cse`.
  """
  if how == "none":
    return fn
  return jax.checkpoint(fn, policy=_policy(how), prevent_cse=not in_scan)


def remat_module(module: type[nn.Module], how: str) -> type[nn.Module]:
  """The same for a module class; parameter names do not change."""
  return module if how == "none" else nn.remat(module, policy=_policy(how))


def _policy(how: str) -> Callable[..., Any] | None:
  policies = jax.checkpoint_policies
  return (
    policies.save_from_both_policies(
      policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(_KEPT)
    )
    if how == "dots"
    else None
  )
