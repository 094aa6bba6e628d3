"""Pre-norm transformer blocks (Dosovitskiy et al. 2021) with the initialisation of MAE.

Letters: b batch, n positions, h heads, d width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen import sharding
from maskgen.errors import UserError, nearest
from maskgen.models import remat as remat_lib

kernel_init = nn.initializers.xavier_uniform()
# MAE initialises one fused [d, 3d] projection: the limit sqrt(6 / 4d) for each of the three.
qkv_init = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
embedding_init = nn.initializers.normal(0.02)
ATTENTION = ("auto", "xla", "cudnn")


def check_attention(attention: str, dtype: str, dropout: float) -> None:
  """Checks a choice of implementation.

  Raises:
    UserError: if it does not exist, or cannot do what is asked for.
  """
  if attention not in ATTENTION:
    raise UserError(f"attention '{attention}' does not exist{nearest(attention, ATTENTION)}")
  if attention == "cudnn" and (dropout or dtype == "float32"):
    raise UserError(
      f"attention 'cudnn' needs a dtype of 16 bits and dropout 0, not {dtype} and {dropout}: use 'auto'"
    )


def attend(
  query: jax.Array, key: jax.Array, value: jax.Array, *, attention: str, dropout: nn.Dropout | None
) -> jax.Array:
  """Scaled dot-product attention [b, n, h, d / h], softmax in float32.

  "auto" is cuDNN's fused kernel on NVIDIA GPUs where it applies: 16 bits and no dropout on the weights.
  Elsewhere, and on TPUs, XLA does it: sequences of a few hundred tokens gain nothing from a fused kernel.
  """
  fits = dropout is None and query.dtype.itemsize == 2
  if attention == "cudnn" or (attention == "auto" and fits and sharding.platform() == "gpu"):
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
  scores = jnp.einsum("bqhc,bkhc->bhqk", query, key, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(scores / query.shape[-1] ** 0.5).astype(query.dtype)
  weights = weights if dropout is None else dropout(weights)
  return jnp.einsum("bhqk,bkhc->bqhc", weights, value)


class Attention(nn.Module):
  """Multi-head self-attention with dropout on the weights; softmax in float32.

  Queries, keys and values are separate projections, so that a tensor-parallel mesh can split them by heads.
  """

  heads: int
  dropout: float = 0.0
  dtype: str = "float32"
  attention: str = "auto"

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:  # [b, n, d] -> [b, n, d]
    width = x.shape[-1]
    if width % self.heads:
      raise UserError(f"a width of {width} does not divide into {self.heads} heads")

    def project(name: str) -> jax.Array:  # [b, n, h, d / h]
      y = nn.Dense(width, kernel_init=qkv_init, dtype=self.dtype, name=name)(x)
      y = sharding.constrain_batch(y, "tensor")
      return y.reshape(*y.shape[:-1], self.heads, width // self.heads)

    query, key, value = project("query"), project("key"), project("value")
    dropout = nn.Dropout(self.dropout, deterministic=False) if train and self.dropout else None
    y = attend(query, key, value, attention=self.attention, dropout=dropout).reshape(x.shape)
    y = nn.Dense(width, kernel_init=kernel_init, dtype=self.dtype, name="out")(y)
    return sharding.constrain_batch(y)


class Mlp(nn.Module):
  """Two layers with an exact (erf) GELU between, dropout after each."""

  hidden: int
  dropout: float = 0.0
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:  # [..., d] -> [..., d]
    y = nn.Dense(self.hidden, kernel_init=kernel_init, dtype=self.dtype, name="up")(x)
    y = sharding.constrain_batch(y, "tensor")
    y = nn.Dropout(self.dropout)(nn.gelu(y, approximate=False), deterministic=not train)
    y = nn.Dense(x.shape[-1], kernel_init=kernel_init, dtype=self.dtype, name="down")(y)
    y = sharding.constrain_batch(y)
    return nn.Dropout(self.dropout)(y, deterministic=not train)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  heads: int
  dropout: float = 0.0
  dtype: str = "float32"
  attention: str = "auto"

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:  # [b, n, d] -> [b, n, d]
    y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="attention_norm")(x)
    y = Attention(self.heads, self.dropout, self.dtype, self.attention, name="attention")(y, train=train)
    x = x + nn.Dropout(self.dropout)(y, deterministic=not train)
    y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="mlp_norm")(x)
    return x + Mlp(4 * x.shape[-1], self.dropout, self.dtype, name="mlp")(y, train=train)


class Transformer(nn.Module):
  """A stack of blocks.

  Attributes:
    depth: how many.
    heads, dropout, dtype, attention: of each block; `attention` is "auto", "xla" or "cudnn", see `attend`.
    remat: what the backward pass computes again, see `maskgen.models.remat`.
    scan: whether one compiled block is looped over, which compiles faster and uses less memory with `remat`,
      or each block is compiled for itself. The numbers are the same, and so are the parameters: those of the
      blocks are stacked when they are used, so that names, rules and checkpoints do not depend on it.
  """

  depth: int
  heads: int
  dropout: float = 0.0
  dtype: str = "float32"
  attention: str = "auto"
  remat: str = "none"
  scan: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:  # [b, n, d] -> [b, n, d]
    options = (self.heads, self.dropout, self.dtype, self.attention)
    if self.is_initializing():
      for i in range(self.depth):
        x = Block(*options, name=f"block_{i}")(x, train=train)
      return x

    block = Block(*options, parent=None)

    def run(x: jax.Array, inputs: tuple[Any, Any]) -> tuple[jax.Array, None]:
      params, key = inputs
      rngs = {} if key is None else {"dropout": key}
      x = block.apply({"params": params}, sharding.constrain_batch(x), train=train, rngs=rngs)  # type: ignore[assignment]
      return x, None

    run = remat_lib.remat(run, self.remat, in_scan=self.scan)
    keys = [None] * self.depth
    if train and self.dropout:
      keys = list(jax.random.split(self.make_rng("dropout"), self.depth))
    params: Any = self.variables["params"]
    inputs = [(self._cast(params[f"block_{i}"]), key) for i, key in enumerate(keys)]
    if self.scan:
      x, _ = jax.lax.scan(run, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs))
      return x
    for one in inputs:
      x, _ = run(x, one)
    return x

  def _cast(self, params: Any) -> Any:
    """Kernels in the type of the computation, as layers would cast them: so they are gathered and stacked."""
    return jax.tree.map(lambda leaf: leaf.astype(self.dtype) if leaf.ndim > 1 else leaf, params)
