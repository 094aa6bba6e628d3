"""The decoders of masked autoencoders: from some patches of an image to the pixels of all (He et al. 2022).

Letters: b batch, n patches, k patches that the encoder sees, d encoder width.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen import sharding
from maskgen.config import fields
from maskgen.models.attention_pool import CrossAttention
from maskgen.models.remat import REMAT, remat_module
from maskgen.models.transformer import Attention, Dropout, Mlp, Transformer, embedding_init, kernel_init
from maskgen.models.vit import ViT
from maskgen.numerics import masking
from maskgen.numerics.positions import sines

# The parts of a block of `CrossDecoder`, in CropMAE's order.
PARTS = ("cross", "mlp", "self")


class PixelDecoder(nn.Module):
  """Blocks over all patches, of which those that the encoder did not see are one learned token.

  Attributes:
    grid: the numbers of patches along the height and width of an image.
    outputs: the number of values predicted for a patch.
    width, depth, heads: of the decoder; positions are fixed, see `positions.sines`.
    hidden: width inside the MLPs, by default 4 `width`.
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
  hidden: int = 0
  dtype: str = fields.precision("float32")
  attention: str = fields.operational("auto", plain="xla")
  remat: str = fields.operational("none", less_memory=REMAT[1:])
  scan: bool = fields.operational(False)

  @nn.compact
  def __call__(
    self, latents: jax.Array, kept: jax.Array, others: jax.Array | None = None, *, train: bool = False
  ) -> jax.Array:
    """Predictions float32 [b, n, outputs].

    Args:
      latents: [b, l + k, d], the encoder's output: l leading positions, such as a class position, then the
        patches that it saw.
      kept: int32 [b, k], which these are, ascending.
      others: [b, m, d], the encoder's output for another view, for `CrossDecoder`.
      train: whether to apply dropout, where there is any.
    """
    leading, num_patches = latents.shape[1] - kept.shape[1], self.grid[0] * self.grid[1]
    enter = nn.Dense(self.width, kernel_init=kernel_init, dtype=self.dtype, name="input")
    x = enter(latents)
    mask_token = sharding.gather(self.param("mask_token", embedding_init, (1, self.width))).astype(x.dtype)
    seen = jax.nn.one_hot(kept, num_patches, dtype=bool).any(axis=1)[..., None]
    patches = jnp.where(seen, masking.spread(x[:, leading:], kept, num_patches), mask_token[None])
    positions = jnp.pad(sines(self.grid, self.width), ((leading, 0), (0, 0)))
    x = jnp.concatenate([x[:, :leading], patches], axis=1) + positions[None].astype(x.dtype)
    x = self.blocks(sharding.constrain_batch(x), None if others is None else enter(others), train)
    x = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(x[:, leading:])
    head = nn.Dense(self.outputs, kernel_init=kernel_init, dtype=self.dtype, name="head")
    found: jax.Array = head(x).astype(jnp.float32)
    return found

  def blocks(self, x: jax.Array, others: jax.Array | None, train: bool) -> jax.Array:
    """The output of the blocks for x, both [b, l + n, width], beside others [b, m, width]."""
    del others, train
    found: jax.Array = Transformer(
      self.depth,
      self.heads,
      dtype=self.dtype,
      attention=self.attention,
      remat=self.remat,
      scan=self.scan,
      hidden=self.hidden,
      epsilon=self.epsilon,
      name="decoder",
    )(x, train=False)
    return found


class VisibleHead(nn.Module):
  """Predicts patches from the encoder's output for them: three layers, each normalised, and a linear one.

  Attributes:
    width: of the layers.
    outputs: the number of values predicted for a patch.
    epsilon: of the norms, of which the last has no parameters.
    dtype: the type of the computation; parameters and predictions are float32.
  """

  width: int
  outputs: int
  epsilon: float
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b, k, d] -> float32 [b, k, outputs]
    dense = functools.partial(nn.Dense, kernel_init=kernel_init, dtype=self.dtype)
    for i in range(2):
      x = dense(self.width, name=f"layer_{i}")(x)
      x = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=f"norm_{i}")(x)
      x = nn.gelu(x, approximate=False)
    x = nn.standardize(dense(self.width, name="layer_2")(x), axis=-1, epsilon=self.epsilon)
    found: jax.Array = dense(self.outputs, name="out")(x).astype(jnp.float32)
    return found


class CrossBlock(nn.Module):
  """Attention to another view, an MLP and self-attention, each added to x; see `CrossDecoder`."""

  heads: int
  hidden: int
  order: tuple[str, ...]
  post_norm: bool
  dropout: float
  epsilon: float
  dtype: str
  attention: str
  train: bool

  @nn.compact
  def __call__(self, x: jax.Array, others: jax.Array) -> jax.Array:  # [b, n, d], [b, m, d] -> [b, n, d]
    def norm(name: str) -> nn.Module:
      return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=name)

    options = (self.dtype, self.attention)
    for part in self.order:
      own = norm(f"{part}_norm")
      y = x if self.post_norm else own(x)
      if part == "cross":
        seen = others if self.post_norm else norm("others_norm")(others)
        cross = CrossAttention(self.heads, *options, self.dropout, name="cross_attention")
        y = cross(y, seen, train=self.train)
      elif part == "self":
        attention = Attention(self.heads, self.dropout, *options, name="self_attention")
        y = attention(y.reshape(-1, y.shape[-1]), y.shape[1], train=self.train).reshape(y.shape)
      else:
        y = Mlp(self.hidden, self.dropout, self.dtype, name="mlp")(y, train=self.train)
      if part != "mlp":  # which drops its output itself
        y = Dropout(self.dropout)(y, train=self.train)
      x = own(x + y) if self.post_norm else x + y
    return x


class CrossDecoder(PixelDecoder):
  """The same with blocks that also attend to another view of the image (CropMAE, SiamMAE, CroCo).

  The other view enters by the same projection, without positions.

  Attributes:
    hidden: width inside the MLPs.
    order: "cross", "mlp" and "self", the parts of a block from first to last.
    post_norm: whether each norm comes after its sum; if not, it comes before its part, and the other view is
      normalised before it is attended to, too.
    dropout: on attention weights, on the output of each part and inside the MLPs during training.
  """

  hidden: int = 2048
  order: tuple[str, ...] = PARTS
  post_norm: bool = True
  dropout: float = 0.0

  def blocks(self, x: jax.Array, others: jax.Array | None, train: bool) -> jax.Array:
    for i in range(self.depth):
      x = remat_module(CrossBlock, self.remat)(
        self.heads,
        self.hidden,
        self.order,
        self.post_norm,
        self.dropout,
        self.epsilon,
        self.dtype,
        self.attention,
        train,
        name=f"block_{i}",
      )(sharding.constrain_batch(x), others)
    return x


def fields_from(encoder: ViT) -> dict[str, Any]:
  """The fields of a decoder that follow from its encoder."""
  how = {name: getattr(encoder, name) for name in ("epsilon", "dtype", "attention", "remat", "scan")}
  return {"grid": encoder.grid, "outputs": encoder.patch**2 * encoder.channels, **how}


def decoder_of(encoder: ViT, width: int, depth: int, heads: int) -> PixelDecoder:
  """A decoder of these sizes to the patches of an encoder; it runs as that does."""
  return PixelDecoder(**fields_from(encoder), width=width, depth=depth, heads=heads)


def init(encoder: ViT, decoder: PixelDecoder, rng: jax.Array) -> dict[str, Any]:
  """Fresh parameters, `encoder` and `decoder`."""
  images, kept = jnp.zeros((1, *encoder.image_size, encoder.channels)), jnp.zeros((1, 1), jnp.int32)
  encoder_rng, decoder_rng = jax.random.split(rng)
  latents, variables = encoder.init_with_output(encoder_rng, images, kept, method="encode_kept")
  return {
    "encoder": variables["params"],
    "decoder": decoder.init(decoder_rng, latents, kept, latents)["params"],
  }
