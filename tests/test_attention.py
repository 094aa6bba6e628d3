"""The fused kernel computes what XLA does, dropout included, and dropout keeps what it should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskgen import sharding
from maskgen.config import Mesh
from maskgen.models import fused_attention
from maskgen.models.transformer import attend
from maskgen.numerics import dropout

B, N, HEADS, WIDTH = 8, 33, 4, 8  # an odd length, as with a class position


@pytest.fixture(scope="module")
def arrays():
  """Seeds, a gradient, queries, keys and values."""
  keys = jax.random.split(jax.random.key(0), 5)
  seeds = dropout.seeds(keys[4], (B, HEADS))
  return seeds, *(jax.random.normal(key, (B, N, HEADS, WIDTH)) for key in keys[:4])


def results(attention, rate, arrays, dtype="float32"):
  """The output and the gradients of queries, keys and values."""

  @jax.jit
  def run(seeds, gradient, *qkv):
    seeds = seeds if rate else None
    out, pull_back = jax.vjp(lambda *qkv: attend(*qkv, attention=attention, seeds=seeds, rate=rate), *qkv)
    return out, *pull_back(gradient)

  seeds, *rest = arrays
  return run(seeds, *(x.astype(dtype) for x in rest))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_kernel_computes_what_xla_does(rate, arrays):
  for found, expected in zip(results("pallas", rate, arrays), results("xla", rate, arrays), strict=True):
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_kernel_in_bfloat16_stays_close(arrays):
  exact = results("xla", 0.3, arrays)
  for found, expected in zip(results("pallas", 0.3, arrays, "bfloat16"), exact, strict=True):
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=0.02 * np.abs(expected).max())


def test_the_kernel_on_a_mesh_drops_the_same(arrays):
  mesh = sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
  seeds, _, *qkv = arrays
  run = sharding.on_mesh(lambda *args: fused_attention.attend(*args[1:], args[0], 0.3), mesh)
  found = jax.jit(run, in_shardings=sharding.batch_sharding(mesh))(seeds, *qkv)
  np.testing.assert_allclose(found, results("pallas", 0.3, arrays)[0], atol=1e-6)


def test_what_the_kernel_does_not_support_takes_xla(arrays):
  _, _, query, key, _ = arrays
  assert fused_attention.fits(query, key)
  assert not fused_attention.fits(query[:, :5], key)  # some positions only
  long = jax.ShapeDtypeStruct((B, 4096, HEADS, WIDTH), jnp.bfloat16)
  assert not fused_attention.fits(long, long)
  few = attend(query[:, :5], key, key, attention="pallas")
  np.testing.assert_array_equal(few, attend(query[:, :5], key, key, attention="xla"))


@pytest.mark.parametrize(("queries", "causal"), [(N, False), (N, True), (5, False), (6, False)])
def test_odd_lengths_are_padded_for_cudnn(queries, causal, arrays, monkeypatch):
  """By XLA in cuDNN's place, which needs a GPU."""
  given, by_xla = [], jax.nn.dot_product_attention

  def in_its_place(*qkv, implementation, **options):
    given.append((implementation, *(x.shape[1] % 2 for x in qkv)))
    return by_xla(*qkv, implementation="xla", **options)

  monkeypatch.setattr(jax.nn, "dot_product_attention", in_its_place)
  _, gradient, query, *rest = arrays

  def pulled_back(attention):
    run = functools.partial(attend, attention=attention, causal=causal)
    out, pull_back = jax.vjp(run, query[:, :queries], *rest)
    return out, *pull_back(gradient[:, :queries])

  for found, expected in zip(pulled_back("cudnn"), pulled_back("xla"), strict=True):
    np.testing.assert_allclose(found, expected, atol=1e-6)
  assert given == [("cudnn", 0, 0, 0)]


def test_dropout_keeps_independent_values_at_its_rate():
  rate, shape = 0.1, (64, 65, 66)
  ones, seeds = jnp.ones(shape), dropout.seeds(jax.random.key(1), shape[:1])
  dropped, pull_back = jax.vjp(lambda x: dropout.drop(x, seeds, rate), ones)
  np.testing.assert_array_equal(pull_back(ones)[0], dropped)
  assert set(np.unique(dropped)) == {0, np.float32(1 / (1 - rate))}
  kept = np.asarray(dropped) > 0
  x = (kept - (1 - rate)) / (rate * (1 - rate)) ** 0.5  # mean 0 and variance 1
  sigma = x.size**-0.5
  assert abs(x.mean()) < 4 * sigma
  for axis in range(3):
    for distance in (1, 2, 16):
      assert abs((np.roll(x, distance, axis) * x).mean()) < 5 * sigma
  # Rows and columns have the spread of independent draws.
  for axes in ((1, 2), (0, 1), (0, 2)):
    spread = x.mean(axis=axes) * np.prod([shape[axis] for axis in axes]) ** 0.5
    assert 0.7 < spread.std() < 1.3
