"""Attention pooling: learned queries turn the patches of an image into a few vectors of a given scale.

De-Diffusion uses five layers (Wei et al. 2023, section 3); the ViLex paper does not say.
Letters: b batch, n patches, c their width, k queries, d output width, p inner width.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen import sharding
from maskgen.config import check_at_least, check_dtype
from maskgen.errors import UserError
from maskgen.models.transformer import Attention, Mlp, attend, check_attention, kernel_init, qkv_init
from maskgen.numerics import dropout

EPSILON = 1e-6
# The collection of attention weights, which are stored only where it is mutable.
LOOKS = "looks"


class CrossAttention(nn.Module):
  """Multi-head attention of queries to patches, with dropout on the weights; softmax in float32."""

  heads: int
  dtype: str
  attention: str
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, patches: jax.Array, *, train: bool = False) -> jax.Array:
    width = x.shape[-1]  # [b, k, p], [b, n, c] -> [b, k, p]

    def project(y: jax.Array, name: str) -> jax.Array:  # [b, k or n, h, p / h]
      y = nn.Dense(width, kernel_init=qkv_init, dtype=self.dtype, name=name)(y)
      return sharding.constrain_batch(y, "tensor").reshape(*y.shape[:2], self.heads, width // self.heads)

    query, key, value = project(x, "query"), project(patches, "key"), project(patches, "value")
    if self.is_mutable_collection(LOOKS) and not self.is_initializing():
      scores = jnp.einsum("bqhc,bkhc->bhqk", query, key, preferred_element_type=jnp.float32)
      self.sow(LOOKS, "weights", jax.nn.softmax(scores / query.shape[-1] ** 0.5).mean(axis=1))
    seeds = None
    if train and self.dropout:
      seeds = dropout.seeds(self.make_rng("dropout"), (query.shape[0], self.heads))
    y = attend(query, key, value, attention=self.attention, seeds=seeds, rate=self.dropout).reshape(x.shape)
    y = nn.Dense(width, kernel_init=kernel_init, dtype=self.dtype, name="out")(y)
    return sharding.constrain_batch(y)


class Layer(nn.Module):
  """Optional self-attention, cross-attention and MLP, each applied to the normalised x and added to x."""

  heads: int
  self_attention: bool
  dtype: str
  attention: str

  @nn.compact
  def __call__(self, x: jax.Array, patches: jax.Array) -> jax.Array:  # [b, k, p], [b, n, c] -> [b, k, p]
    def norm(y: jax.Array, name: str) -> jax.Array:
      return nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name=name)(y)

    if self.self_attention:
      y = norm(x, "attention_norm").reshape(-1, x.shape[-1])
      attention = Attention(self.heads, 0.0, self.dtype, self.attention, name="attention")
      x = x + attention(y, x.shape[1], train=False).reshape(x.shape)
    y = norm(x, "cross_attention_norm")
    cross_attention = CrossAttention(self.heads, self.dtype, self.attention, name="cross_attention")
    x = x + cross_attention(y, norm(patches, "patches_norm"))
    return x + Mlp(4 * x.shape[-1], 0.0, self.dtype, name="mlp")(norm(x, "mlp_norm"), train=False)


class AttentionPool(nn.Module):
  """Learned queries over patches.

  Attributes:
    queries: k.
    widths: of the embedding spaces that an output vector concatenates: d is their sum. In each space it has
      root mean square 1 before the learned `scale`.
    width: p.
    depth: the number of layers.
    heads: of each attention.
    self_attention: whether queries also attend to each other.
    dtype: the type of the computation; parameters and the output are float32.
    attention: see `maskgen.models.transformer.attend`.
  """

  queries: int
  widths: Sequence[int]
  width: int = 1024
  depth: int = 5
  heads: int = 16
  self_attention: bool = True
  dtype: str = "float32"
  attention: str = "auto"

  def __post_init__(self):
    check_at_least(self, 1, "queries", "width", "depth", "heads")
    check_dtype(self.dtype)
    check_attention(self.attention, self.dtype, 0.0)
    if self.width % self.heads:
      raise UserError(f"a width of {self.width} does not divide into {self.heads} heads")
    super().__post_init__()

  @nn.compact
  def __call__(self, patches: jax.Array) -> jax.Array:  # [b, n, c] -> float32 [b, k, d]
    init = nn.initializers.truncated_normal(0.02)
    query = sharding.gather(self.param("query", init, (self.queries, self.width)))
    x = jnp.broadcast_to(query.astype(self.dtype)[None], (patches.shape[0], *query.shape))
    for i in range(self.depth):
      layer = Layer(self.heads, self.self_attention, self.dtype, self.attention, name=f"layer_{i}")
      x = layer(sharding.constrain_batch(x), patches)
    x = nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm")(x)
    total = sum(self.widths)
    x = nn.Dense(total, kernel_init=kernel_init, dtype=self.dtype, name="out")(x).astype(jnp.float32)
    ends = [sum(self.widths[: i + 1]) for i in range(len(self.widths) - 1)]
    parts = [
      y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPSILON) for y in jnp.split(x, ends, -1)
    ]
    return jnp.concatenate(parts, axis=-1) * self.param("scale", nn.initializers.ones, (total,))[None, None]

  def looks(self, params: Any, patches: jax.Array) -> jax.Array:
    """The weights of the queries' attention to patches [b, n, c], the mean of heads and layers: [b, k, n]."""
    _, stored = self.apply({"params": params}, patches, mutable=[LOOKS])
    return jnp.stack(jax.tree.leaves(stored[LOOKS])).mean(axis=0)
