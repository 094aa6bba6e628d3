"""The decoder of masked autoencoders: from some patches of an image to the pixels of all (He et al. 2022).

Letters: b batch, n patches, k patches that the encoder sees, d encoder width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen import sharding
from maskgen.config import fields
from maskgen.models.remat import REMAT
from maskgen.models.transformer import Transformer, embedding_init, kernel_init
from maskgen.models.vit import ViT
from maskgen.numerics import masking
from maskgen.numerics.positions import sines


class PixelDecoder(nn.Module):
  """Blocks over all patches, of which those that the encoder did not see are one learned token.

  Attributes:
    grid: the numbers of patches along the height and width of an image.
    outputs: the number of values predicted for a patch.
    width, depth, heads: of the decoder; positions are fixed, see `positions.sines`.
    epsilon: of the norms.
    dtype: the type of the computation; parameters and predictions are float32.
    attention, remat, scan: how the blocks are run, see `Transformer`.
  """

  grid: tuple[int, int]
  outputs: int
  width: int = 512
  depth: int = 8
  heads: int = 16
  epsilon: float = 1e-6
  dtype: str = fields.precision("float32")
  attention: str = fields.operational("auto", plain="xla")
  remat: str = fields.operational("none", less_memory=REMAT[1:])
  scan: bool = fields.operational(False)

  @nn.compact
  def __call__(self, latents: jax.Array, kept: jax.Array) -> jax.Array:
    """Predictions float32 [b, n, outputs].

    Args:
      latents: [b, l + k, d], the encoder's output: l leading positions, such as a class position, then the
        patches that it saw.
      kept: int32 [b, k], which these are, ascending.
    """
    leading, num_patches = latents.shape[1] - kept.shape[1], self.grid[0] * self.grid[1]
    x = nn.Dense(self.width, kernel_init=kernel_init, dtype=self.dtype, name="input")(latents)
    mask_token = sharding.gather(self.param("mask_token", embedding_init, (1, self.width))).astype(x.dtype)
    seen = jax.nn.one_hot(kept, num_patches, dtype=bool).any(axis=1)[..., None]
    patches = jnp.where(seen, masking.spread(x[:, leading:], kept, num_patches), mask_token[None])
    positions = jnp.pad(sines(self.grid, self.width), ((leading, 0), (0, 0)))
    x = jnp.concatenate([x[:, :leading], patches], axis=1) + positions[None].astype(x.dtype)
    x = Transformer(
      self.depth,
      self.heads,
      dtype=self.dtype,
      attention=self.attention,
      remat=self.remat,
      scan=self.scan,
      epsilon=self.epsilon,
      name="decoder",
    )(sharding.constrain_batch(x), train=False)
    x = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(x[:, leading:])
    head = nn.Dense(self.outputs, kernel_init=kernel_init, dtype=self.dtype, name="head")
    found: jax.Array = head(x).astype(jnp.float32)
    return found


def decoder_of(encoder: ViT, channels: int, width: int, depth: int, heads: int) -> PixelDecoder:
  """A decoder of these sizes to the patches of an encoder, for images of `channels`; it runs as that does."""
  how = {name: getattr(encoder, name) for name in ("epsilon", "dtype", "attention", "remat", "scan")}
  outputs = encoder.patch**2 * channels
  return PixelDecoder(encoder.grid, outputs, width=width, depth=depth, heads=heads, **how)


def init(encoder: ViT, decoder: PixelDecoder, channels: int, rng: jax.Array) -> dict[str, Any]:
  """Fresh parameters, `encoder` and `decoder`."""
  images, kept = jnp.zeros((1, *encoder.image_size, channels)), jnp.zeros((1, 1), jnp.int32)
  encoder_rng, decoder_rng = jax.random.split(rng)
  latents, variables = encoder.init_with_output(encoder_rng, images, kept, method="encode_kept")
  return {"encoder": variables["params"], "decoder": decoder.init(decoder_rng, latents, kept)["params"]}
