"""Self-attention by a Pallas kernel for TPUs, which keeps an example's scores on the chip.

The backward pass computes everything but queries, keys and values again, dropout included, whose masks are
those of `maskgen.numerics.dropout`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from maskgen import sharding
from maskgen.numerics import dropout

# What an example may take of a chip's VMEM: seven arrays [n, d], each twice, and eight of scores.
_MOST_BYTES = 14 * 2**20


def fits(query: jax.Array, key: jax.Array) -> bool:
  """Whether the kernel supports arrays [b, n, h, d / h], and the mesh splits them evenly."""
  b, n, heads, width = query.shape
  mesh = jax.sharding.get_abstract_mesh()
  ways, tensor = (1, 1) if mesh.empty else (sharding.batch_ways(mesh), mesh.shape["tensor"])
  size = 14 * n * heads // tensor * width * query.dtype.itemsize + 8 * 4 * n**2
  return query.shape == key.shape and size <= _MOST_BYTES and not (width % 8 or b % ways or heads % tensor)


def attend(
  query: jax.Array, key: jax.Array, value: jax.Array, seeds: dropout.Seeds | None = None, rate: float = 0.0
) -> jax.Array:
  """Scaled dot-product attention [b, n, h, d / h], softmax in float32.

  Args:
    query: [b, n, h, d / h], for which `fits` is true.
    key: likewise.
    value: likewise.
    seeds: of [b, h], for dropout of weights.
    rate: the probability of dropout.

  Returns:
    [b, n, h, d / h]. Except on TPUs, the kernel is interpreted, which is slow.
  """
  b, n, heads, width = query.shape
  if seeds is None:
    seeds = (jnp.zeros((b, heads), jnp.int32),) * 2
  flat = [x.reshape(b, n, heads * width) for x in (query, key, value)]
  run = functools.partial(_attend, width, rate, sharding.platform() != "tpu")
  if not jax.sharding.get_abstract_mesh().empty:
    by_head, rows = (PartitionSpec(("data", "fsdp"), *axes) for axes in (("tensor",), (None, "tensor")))
    run = jax.shard_map(run, in_specs=(by_head, *(rows,) * 3), out_specs=rows, check_vma=False)
  return run(seeds, *flat).reshape(query.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(
  width: int, rate: float, interpret: bool, seeds: dropout.Seeds, *qkv: jax.Array
) -> jax.Array:  # [b, n, d]
  return _call(_forward, width, rate, interpret, seeds, qkv, 1)[0]


def _saving(width: int, rate: float, interpret: bool, seeds: dropout.Seeds, *qkv: jax.Array) -> Any:
  return _attend(width, rate, interpret, seeds, *qkv), (seeds, qkv)


def _pull_back(width: int, rate: float, interpret: bool, saved: Any, gradient: jax.Array) -> Any:
  seeds, qkv = saved
  return None, *_call(_backward, width, rate, interpret, seeds, (*qkv, gradient), 3)


_attend.defvjp(_saving, _pull_back)


def _call(
  kernel: Any,
  width: int,
  rate: float,
  interpret: bool,
  seeds: dropout.Seeds,
  arrays: Sequence[jax.Array],
  results: int,
) -> list[jax.Array]:
  b, n, d = arrays[0].shape
  example = pl.BlockSpec((1, n, d), lambda i: (i, 0, 0))
  return pl.pallas_call(
    functools.partial(kernel, width, rate),
    [jax.ShapeDtypeStruct((b, n, d), arrays[0].dtype)] * results,
    grid=(b,),
    in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] * 2 + [example] * len(arrays),
    out_specs=[example] * results,
    interpret=interpret,
  )(*seeds, *arrays)


def _forward(
  width: int, rate: float, first: Any, second: Any, query: Any, key: Any, value: Any, out: Any
) -> None:
  for head, part in _heads(query, width):
    q, k, v = (x[0, :, part] for x in (query, key, value))
    raised, total = _softmax(q, k)
    raised = _dropping((first, second), head, raised.shape, rate)(raised)
    out[0, :, part] = (_dot(raised.astype(v.dtype), v, 1, 0) / total).astype(out.dtype)


def _backward(
  width: int,
  rate: float,
  first: Any,
  second: Any,
  query: Any,
  key: Any,
  value: Any,
  gradient: Any,
  *results: Any,
) -> None:
  for head, part in _heads(query, width):
    q, k, v, g = (x[0, :, part] for x in (query, key, value, gradient))
    raised, total = _softmax(q, k)
    weights = raised / total
    drop = _dropping((first, second), head, weights.shape, rate)
    slope = weights * drop(_dot(g, v, 1, 1))
    slope = slope - weights * slope.sum(axis=1, keepdims=True)
    slope = (slope / width**0.5).astype(q.dtype)
    to_value = _dot(drop(weights).astype(g.dtype), g, 0, 0)
    for result, found in zip(results, (_dot(slope, k, 1, 0), _dot(slope, q, 0, 0), to_value), strict=True):
      result[0, :, part] = found.astype(result.dtype)


def _heads(array: Any, width: int) -> list[tuple[int, slice]]:
  return [(i, slice(i * width, (i + 1) * width)) for i in range(array.shape[2] // width)]


def _dot(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
  return jax.lax.dot_general(a, b, (((over_a,), (over_b,)), ((), ())), preferred_element_type=jnp.float32)


def _softmax(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The exponentials [n, n] and their sums [n, 1], float32."""
  scores = _dot(q, k, 1, 1) / q.shape[1] ** 0.5
  raised = jnp.exp(scores - scores.max(axis=1, keepdims=True))
  return raised, raised.sum(axis=1, keepdims=True)


def _dropping(
  seeds: tuple[Any, Any], head: int, shape: tuple[int, ...], rate: float
) -> Callable[[jax.Array], jax.Array]:
  """Dropout of values of one shape, always with the same mask."""
  if not rate:
    return lambda x: x
  example = pl.program_id(0)
  kept = dropout.keep((seeds[0][example, head], seeds[1][example, head]), shape, rate)
  return lambda x: jnp.where(kept, x / (1.0 - rate), 0.0)
