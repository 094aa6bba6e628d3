"""Heads that are only used during training, for contrasts and for learning from the blocks of a teacher."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen import sharding
from maskgen.models.transformer import kernel_init


class Projection(nn.Module):
  """A linear layer, a ReLU and another linear layer (Chen et al. 2020, section 2.1).

  With `batch_norm`, a normalisation over the batch precedes the ReLU, always by the batch's own statistics.

  Attributes:
    hidden: width between the layers.
    width: of the embeddings.
    dtype: the type of the computation; parameters are float32.
    batch_norm: see above; the first layer then has no bias, which would have no effect.
  """

  hidden: int
  width: int
  dtype: str = "float32"
  batch_norm: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b, d] -> [b, width]
    x = sharding.constrain_batch(x)
    dense = functools.partial(nn.Dense, kernel_init=kernel_init, dtype=self.dtype)
    x = sharding.constrain_batch(dense(self.hidden, use_bias=not self.batch_norm, name="up")(x), "tensor")
    if self.batch_norm:
      x = x.astype(jnp.float32)
      x = x - x.mean(axis=0, keepdims=True)
      x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=0, keepdims=True) + 1e-5)
      scale = self.param("scale", nn.initializers.ones, (self.hidden,))
      bias = self.param("bias", nn.initializers.zeros, (self.hidden,))
      x = (x * scale[None] + bias[None]).astype(self.dtype)
    return sharding.constrain_batch(dense(self.width, name="down")(nn.relu(x)))


class BlockHeads(nn.Module):
  """A linear layer for each of a teacher's last blocks, on a learned mixture of a student's blocks.

  It follows MaskAlign (Xue et al. 2023, section 3.3). At first a mixture is close to the student's block that
  is as far from the last one.

  Attributes:
    blocks: l, the number of the teacher's blocks.
    width: e, of the teacher.
    dtype: the type of the computation; parameters are float32.
  """

  blocks: int
  width: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, states: jax.Array) -> jax.Array:  # [depth, b, n, d] -> float32 [l, b, n, e]
    shape = self.blocks, len(states)
    mixing = self.param("mixing", lambda _: jnp.eye(*shape, shape[1] - shape[0]) + 0.01)
    mixed = jnp.einsum("ab,bcde->acde", sharding.gather(mixing).astype(states.dtype), states)
    heads = (
      nn.Dense(self.width, kernel_init=kernel_init, dtype=self.dtype, name=f"head_{i}")
      for i in range(self.blocks)
    )
    return jnp.stack([head(one) for head, one in zip(heads, mixed, strict=True)]).astype(jnp.float32)
