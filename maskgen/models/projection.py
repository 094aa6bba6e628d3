"""The projection head of contrastive learning, which is only used during training."""

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
