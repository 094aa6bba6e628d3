"""Pre-norm transformer blocks (Dosovitskiy et al. 2021) with the initialisation of MAE.

Letters: b batch, n positions, h heads, d width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen.errors import UserError

kernel_init = nn.initializers.xavier_uniform()
# MAE initialises one fused [d, 3d] projection: the limit sqrt(6 / 4d) for each of the three.
qkv_init = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
embedding_init = nn.initializers.normal(0.02)


class Attention(nn.Module):
  """Multi-head self-attention with dropout on the weights; softmax in float32.

  Queries, keys and values are separate projections, so that a tensor-parallel mesh can split them by heads.
  """

  heads: int
  dropout: float = 0.0
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:  # [b, n, d] -> [b, n, d]
    width = x.shape[-1]
    if width % self.heads:
      raise UserError(f"a width of {width} does not divide into {self.heads} heads")

    def project(name: str) -> jax.Array:  # [b, n, h, d / h]
      y = nn.Dense(width, kernel_init=qkv_init, dtype=self.dtype, name=name)(x)
      return y.reshape(*y.shape[:-1], self.heads, width // self.heads)

    query, key, value = project("query"), project("key"), project("value")
    scores = jnp.einsum("bqhc,bkhc->bhqk", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores / (width // self.heads) ** 0.5)
    weights = nn.Dropout(self.dropout)(weights.astype(x.dtype), deterministic=not train)
    y = jnp.einsum("bhqk,bkhc->bqhc", weights, value).reshape(x.shape)
    return nn.Dense(width, kernel_init=kernel_init, dtype=self.dtype, name="out")(y)


class Mlp(nn.Module):
  """Two layers with an exact (erf) GELU between, dropout after each."""

  hidden: int
  dropout: float = 0.0
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:  # [..., d] -> [..., d]
    y = nn.Dense(self.hidden, kernel_init=kernel_init, dtype=self.dtype, name="up")(x)
    y = nn.Dropout(self.dropout)(nn.gelu(y, approximate=False), deterministic=not train)
    y = nn.Dense(x.shape[-1], kernel_init=kernel_init, dtype=self.dtype, name="down")(y)
    return nn.Dropout(self.dropout)(y, deterministic=not train)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  heads: int
  dropout: float = 0.0
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:  # [b, n, d] -> [b, n, d]
    y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="attention_norm")(x)
    y = Attention(self.heads, self.dropout, self.dtype, name="attention")(y, train=train)
    x = x + nn.Dropout(self.dropout)(y, deterministic=not train)
    y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="mlp_norm")(x)
    return x + Mlp(4 * x.shape[-1], self.dropout, self.dtype, name="mlp")(y, train=train)


class Transformer(nn.Module):
  """A stack of blocks."""

  depth: int
  heads: int
  dropout: float = 0.0
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:  # [b, n, d] -> [b, n, d]
    for i in range(self.depth):
      block = Block(self.heads, self.dropout, self.dtype, name=f"block_{i}")
      x = block(x, train=train)
    return x
