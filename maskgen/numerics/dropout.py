"""Dropout (Srivastava et al. 2014) from a few seeds and a cheap hash of positions.

A draw of JAX's own generator takes a hundred operations, and a step of MAGE drops 28 million values for each
image of 256 pixels. Here the generator makes seeds, and a hash of 32 bits mixes them with the position of a
value in its row, for about ten operations. That is cheap enough to compute a mask again in the backward pass
instead of storing it. Masks do not depend on how arrays are sharded.
"""

import functools
import math

import jax
import jax.numpy as jnp

Seeds = tuple[jax.Array, jax.Array]


def seeds(key: jax.Array, shape: tuple[int, ...]) -> Seeds:
  """Two random int32 arrays of a shape, an element of each for every row."""
  first, second = jax.random.bits(key, (2, *shape), jnp.uint32).astype(jnp.int32)
  return first, second


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def drop(x: jax.Array, seeds: Seeds, rate: float) -> jax.Array:
  """Sets each value to 0 with probability `rate`, and scales the others to keep the mean.

  Args:
    x: any float array.
    seeds: of the leading axes of x; the other axes are a row.
    rate: the probability, to within 2^-32.
  """
  row = x.shape[seeds[0].ndim :]
  first, second = (seed.reshape(*seed.shape, *(1,) * len(row)) for seed in seeds)
  return jnp.where(keep((first, second), row, rate), x / (1.0 - rate), 0)


def _saving(x: jax.Array, seeds: Seeds, rate: float) -> tuple[jax.Array, Seeds]:
  return drop(x, seeds, rate), seeds


def _pull_back(rate: float, seeds: Seeds, gradient: jax.Array) -> tuple[jax.Array, None]:
  return drop(gradient, seeds, rate), None


drop.defvjp(_saving, _pull_back)


def keep(seeds: Seeds, row: tuple[int, ...], rate: float) -> jax.Array:
  """Which values of rows to keep: bool, the shape of `row` broadcast against that of the seeds."""
  first, second = (seed.astype(jnp.uint32) for seed in seeds)
  x = first
  for axis in range(len(row)):
    shape = tuple(size if i == axis else 1 for i, size in enumerate(row))
    # The odd factor spreads the positions in a row over all of 32 bits.
    factor = math.prod(row[axis + 1 :]) * 0x9E3779B9 % 2**32
    index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    index = index.reshape(*(1,) * (first.ndim - len(row)), *shape)  # of no effect for scalar seeds
    x = x + index * jnp.uint32(factor)
  # Two rounds of a finaliser with little bias, with a seed before each.
  x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
  x = (x ^ (x >> 15) ^ second) * jnp.uint32(0x735A2D97)
  x = x ^ (x >> 15)
  return x.astype(jnp.int32) >= round(rate * 2**32) - 2**31
