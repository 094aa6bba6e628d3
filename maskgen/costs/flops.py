"""FLOPs of a function: its matrix multiplications and convolutions, counted from its trace."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval


def count(fn: Callable[..., Any], *args: Any) -> int:
  """Counts the floating-point operations of `fn(*args)`, without running or compiling it.

  A multiply-add is two operations; everything else is free, as usual when a model's work is compared with a
  chip's peak. Dead code does not count, and neither do products with a convolution's padding or dilation
  zeros, so that a convolution and each of its gradients count alike. A `scan` counts its body times its
  length (as does a `fori_loop` with constant bounds, traced as a scan), a `while_loop` its body once,
  a `cond` its most expensive branch, a `shard_map` its body once per shard, and a Pallas kernel its body
  once per element of its grid. Rematerialised computation counts again.

  Args:
    fn: a function that can be traced.
    *args: its arguments: trees of arrays or of `jax.ShapeDtypeStruct`.

  Returns:
    The operations of all devices together.
  """
  return _count(_trace(fn, *args), _products)


def count_kernels(fn: Callable[..., Any], *args: Any) -> tuple[int, int]:
  """What `fn(*args)` computes inside Pallas kernels.

  Args:
    fn: as in `count`.
    *args: likewise.

  Returns:
    The part of `count` that is inside, and the elements that other operations compute there, in whole tiles
    of 8 x 128.
  """
  jaxpr = _trace(fn, *args)
  return _count(jaxpr, _products, kernels=True), _count(jaxpr, _elements, kernels=True)


def _trace(fn: Callable[..., Any], *args: Any) -> core.Jaxpr:
  closed = jax.make_jaxpr(fn)(*args)
  return partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))[0]


_Cost = Callable[[Any], int]  # of an equation without others inside


def _count(jaxpr: core.Jaxpr | core.ClosedJaxpr, cost: _Cost, kernels: bool = False) -> int:
  return sum(_count_equation(equation, cost, kernels) for equation in jaxpr.eqns)


def _count_equation(equation: Any, cost: _Cost, kernels: bool) -> int:
  params = equation.params
  match equation.primitive.name:
    case "scan":
      return params["length"] * _count(params["jaxpr"], cost, kernels)
    case "cond":
      return max(_count(branch, cost, kernels) for branch in params["branches"])
    case "shard_map":
      axes = params.get("newly_manual_axes") or params["manual_axes"]  # the name before jax 0.10
      shards = math.prod(params["mesh"].shape[axis] for axis in axes)
      return shards * _count(params["jaxpr"], cost, kernels)
    case "pallas_call":
      return math.prod(params["grid_mapping"].grid) * _count(params["jaxpr"], cost)
  inner = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, core.Jaxpr | core.ClosedJaxpr)]
  if inner:
    return sum(_count(jaxpr, cost, kernels) for jaxpr in inner)
  return 0 if kernels else cost(equation)


def _products(equation: Any) -> int:
  match equation.primitive.name:
    case "dot_general":
      return _dot(equation)
    case "conv_general_dilated":
      return _convolution(equation)
  return 0


# These are not counted as elements: products, and what only moves or names values.
_NO_ELEMENTS = {"dot_general", "get", "swap", "broadcast_in_dim", "reshape", "squeeze", "iota"}


def _elements(equation: Any) -> int:
  if equation.primitive.name in _NO_ELEMENTS:
    return 0
  arrays = [var.aval.shape for var in (*equation.invars, *equation.outvars) if hasattr(var.aval, "shape")]
  whole = [(*shape[:-2], -(-shape[-2] // 8) * 8, -(-shape[-1] // 128) * 128) for shape in arrays if shape[1:]]
  return max(map(math.prod, whole), default=0)


def _dot(equation: Any) -> int:
  lhs, _ = (operand.aval for operand in equation.invars)
  (contracted, _), _ = equation.params["dimension_numbers"]
  return 2 * equation.outvars[0].aval.size * math.prod(lhs.shape[axis] for axis in contracted)


def _convolution(equation: Any) -> int:
  params = equation.params
  lhs, rhs = (operand.aval.shape for operand in equation.invars)
  out = equation.outvars[0].aval.shape
  numbers = params["dimension_numbers"]  # each spec: batch or output feature, feature, then space
  pairs = 1
  for dimension, (low, _) in enumerate(params["padding"]):
    stride, spread = params["window_strides"][dimension], params["lhs_dilation"][dimension]
    taps = np.arange(rhs[numbers.rhs_spec[2 + dimension]]) * params["rhs_dilation"][dimension]
    starts = np.arange(out[numbers.out_spec[2 + dimension]]) * stride - low
    places = starts[:, None] + taps
    last = (lhs[numbers.lhs_spec[2 + dimension]] - 1) * spread
    pairs *= int(((places >= 0) & (places <= last) & (places % spread == 0)).sum())
  batch, features = (out[axis] for axis in numbers.out_spec[:2])
  return 2 * pairs * batch * features * rhs[numbers.rhs_spec[1]]
