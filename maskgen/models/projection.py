"""The projection head of contrastive learning, which is only used during training."""

import flax.linen as nn
import jax

from maskgen import sharding
from maskgen.models.transformer import kernel_init


class Projection(nn.Module):
  """A linear layer, a ReLU and another linear layer (Chen et al. 2020, section 2.1).

  Attributes:
    hidden: width between the layers.
    width: of the embeddings.
    dtype: the type of the computation; parameters are float32.
  """

  hidden: int
  width: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b, d] -> [b, width]
    x = sharding.constrain_batch(x)
    up = nn.Dense(self.hidden, kernel_init=kernel_init, dtype=self.dtype, name="up")
    down = nn.Dense(self.width, kernel_init=kernel_init, dtype=self.dtype, name="down")
    return sharding.constrain_batch(down(nn.relu(sharding.constrain_batch(up(x), "tensor"))))
