"""VQGAN in MaskGIT's variant (Esser et al. 2021; Chang et al. 2022): convolutions only, no attention.

Letters: b batch, h w c image, h' w' token grid, d code width, K codes.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen import sharding
from maskgen.config import check_at_least, check_dtype, fields
from maskgen.errors import UserError

SHORTCUTS = ("input", "reference")


class Quantized(NamedTuple):
  """What the quantizer returns.

  Attributes:
    tokens: int32 [b, h', w'], the index of the nearest code.
    codes: float32 [b, h', w', d], those codes; no straight-through gradient yet.
    distances: float32 [b, h', w', K], squared euclidean distances to all codes.
  """

  tokens: jax.Array
  codes: jax.Array
  distances: jax.Array


class ResidualBlock(nn.Module):
  """(norm, swish, 3x3 convolution) twice, plus a shortcut."""

  channels: int
  norm_groups: int
  shortcut: str
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    h = x
    for i in range(2):
      h = nn.swish(norm(self.norm_groups, self.dtype, f"norm_{i}")(h))
      h = conv(self.channels, 3, self.dtype, f"conv_{i}", use_bias=False)(h)
    if x.shape[-1] == self.channels:
      return x + h
    # The published networks project h instead of x, dropping the input; "reference" loads them.
    source = h if self.shortcut == "reference" else x
    return h + conv(self.channels, 1, self.dtype, "shortcut", use_bias=False)(source)


def residual_block(remat: str) -> type[ResidualBlock]:
  """The class of residual blocks for a choice of `maskgen.models.remat`."""
  return ResidualBlock if remat == "none" else nn.remat(ResidualBlock)


class Encoder(nn.Module):
  """Images [b, h, w, c] to latents [b, h', w', d].

  With `exact`, the first layer, those at the coarsest resolution and the sums of residual blocks are float32,
  whatever `dtype` is. This costs little without a backward pass, and fewer latents change their nearest code.
  """

  channels: int
  multipliers: tuple[int, ...]
  strides: tuple[int, ...]
  blocks: int
  code_width: int
  norm_groups: int
  shortcut: str
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array, remat: str = "none", exact: bool = False) -> jax.Array:
    ends = "float32" if exact else self.dtype
    x = conv(self.channels, 3, ends, "conv_in", use_bias=False)(x)
    for level, multiplier in enumerate(self.multipliers):
      dtype = ends if level == len(self.strides) else self.dtype
      for i in range(self.blocks):
        x = self.block(multiplier, f"level_{level}_block_{i}", remat, dtype)(x).astype(ends)
      if level < len(self.strides):
        window = (self.strides[level],) * 2
        x = nn.avg_pool(x, window, window)
    for i in range(2):
      x = self.block(self.multipliers[-1], f"middle_block_{i}", remat, ends)(x)
    x = nn.swish(norm(self.norm_groups, ends, "norm_out")(x))
    return conv(self.code_width, 1, "float32", "conv_out")(x)

  def block(self, multiplier: int, name: str, remat: str, dtype: str) -> nn.Module:
    channels = self.channels * multiplier
    return residual_block(remat)(channels, self.norm_groups, self.shortcut, dtype, name=name)


class Decoder(nn.Module):
  """Codes [b, h', w', d] to images [b, h, w, c], not clipped."""

  channels: int
  multipliers: tuple[int, ...]
  strides: tuple[int, ...]
  blocks: int
  image_channels: int
  norm_groups: int
  shortcut: str
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array, remat: str = "none") -> jax.Array:
    x = conv(self.channels * self.multipliers[-1], 3, self.dtype, "conv_in")(x)
    for i in range(2):
      x = self.block(self.multipliers[-1], f"middle_block_{i}", remat)(x)
    for level, multiplier in reversed(list(enumerate(self.multipliers))):
      for i in range(self.blocks):
        x = self.block(multiplier, f"level_{level}_block_{i}", remat)(x)
      if level > 0:
        stride = self.strides[level - 1]
        x = jnp.repeat(jnp.repeat(x, stride, axis=1), stride, axis=2)
        x = conv(x.shape[-1], 3, self.dtype, f"level_{level}_upsample")(x)
    x = nn.swish(norm(self.norm_groups, self.dtype, "norm_out")(x))
    return conv(self.image_channels, 3, "float32", "conv_out")(x)

  def block(self, multiplier: int, name: str, remat: str) -> nn.Module:
    channels = self.channels * multiplier
    return residual_block(remat)(channels, self.norm_groups, self.shortcut, self.dtype, name=name)


class VQGAN(nn.Module):
  """Encoder, codebook and decoder; the defaults are MaskGIT's 256-pixel tokenizer.

  Attributes:
    channels: width of the first level.
    multipliers: width of each level, as a multiple of `channels`.
    strides: down-sampling between levels, one fewer than the levels; their product is the factor.
    blocks: residual blocks in each level.
    codebook_size: K.
    code_width: d.
    normalize_codes: whether latents and codes are scaled to unit length, as in ViT-VQGAN (Yu et al. 2022).
    norm_groups: groups of the group normalisation.
    shortcut: "input", or "reference" for the published networks (see `ResidualBlock`).
    image_channels: c.
    dtype: the type of the computation; parameters, codes and distances are float32, and of `tokenize` more.
  """

  channels: int = 128
  multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
  strides: tuple[int, ...] = (2, 2, 2, 2)
  blocks: int = 2
  codebook_size: int = 1024
  code_width: int = 256
  normalize_codes: bool = False
  norm_groups: int = 32
  shortcut: str = "input"
  image_channels: int = 3
  dtype: str = fields.precision("float32")

  def __post_init__(self):
    positive = ("channels", "multipliers", "strides", "blocks", "codebook_size", "code_width")
    check_at_least(self, 1, *positive, "norm_groups", "image_channels")
    check_dtype(self.dtype)
    if len(self.strides) != len(self.multipliers) - 1:
      raise UserError(
        f"{len(self.multipliers)} multipliers need {len(self.multipliers) - 1} strides "
        f"(got {len(self.strides)})"
      )
    if self.channels % self.norm_groups:
      raise UserError(f"channels={self.channels} is not divisible by norm_groups={self.norm_groups}")
    if self.shortcut not in SHORTCUTS:
      raise UserError(f"shortcut '{self.shortcut}' does not exist; known: {', '.join(SHORTCUTS)}")
    super().__post_init__()

  def setup(self):
    shared: dict[str, Any] = dict(
      channels=self.channels,
      multipliers=self.multipliers,
      strides=self.strides,
      blocks=self.blocks,
      norm_groups=self.norm_groups,
      shortcut=self.shortcut,
      dtype=self.dtype,
    )
    self.encoder = Encoder(code_width=self.code_width, **shared)
    self.decoder = Decoder(image_channels=self.image_channels, **shared)
    init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
    self.codebook = self.param("codebook", init, (self.codebook_size, self.code_width))

  @property
  def factor(self) -> int:
    """The down-sampling factor: pixels per token along each side."""
    return math.prod(self.strides)

  def token_grid(self, image_shape: tuple[int, ...]) -> tuple[int, int]:
    """The token grid (h', w') of images (h, w, c).

    Raises:
      UserError: if h or w is not divisible by the factor, or c is another number of channels.
    """
    height, width, channels = image_shape
    if height % self.factor or width % self.factor:
      raise UserError(
        f"an image of {height}x{width} pixels is not divisible by the tokenizer's down-sampling factor "
        f"{self.factor}: resize or crop it to a multiple of {self.factor}"
      )
    if channels != self.image_channels:
      raise UserError(f"images have {channels} channels, but the tokenizer takes {self.image_channels}")
    return height // self.factor, width // self.factor

  def encode(self, images: jax.Array, remat: str = "none", exact: bool = False) -> jax.Array:
    """Images float32 [b, h, w, c] in [0, 1] to latents float32 [b, h', w', d].

    `remat` determines what a backward pass recomputes in each block, see `maskgen.models.remat`, and `exact`
    which layers are float32, see `Encoder`.
    """
    if images.dtype != jnp.float32:
      raise TypeError(f"the tokenizer takes float32 images in [0, 1], not {images.dtype}")
    self.token_grid(images.shape[1:])
    latents = self.encoder(images, remat, exact)
    return unit(latents) if self.normalize_codes else latents

  def quantize(self, latents: jax.Array) -> Quantized:
    """Finds the nearest code of each latent [b, h', w', d]."""
    codebook = self.codes()
    # Distances are often nearly equal: without full precision, kinds of devices would choose different codes.
    products = jnp.matmul(latents, codebook.T, precision="highest")
    code_norms = jnp.square(codebook).sum(axis=-1)[None, None, None]
    distances = jnp.square(latents).sum(axis=-1, keepdims=True) - 2.0 * products + code_norms
    tokens = jnp.argmin(distances, axis=-1).astype(jnp.int32)
    return Quantized(tokens, codebook[tokens], distances)

  def codes(self) -> jax.Array:
    """The codebook, float32 [K, d], of unit length where codes are normalised."""
    codebook = sharding.gather(self.codebook)
    return unit(codebook) if self.normalize_codes else codebook

  def decode(self, codes: jax.Array, remat: str = "none") -> jax.Array:
    """Codes float32 [b, h', w', d] to images float32 [b, h, w, c], not clipped; `remat` as in `encode`."""
    return self.decoder(codes, remat)

  def tokenize(self, images: jax.Array) -> jax.Array:
    """Images float32 [b, h, w, c] in [0, 1] to tokens int32 [b, h' * w'], row by row; without a gradient."""
    return self.quantize(self.encode(images, exact=True)).tokens.reshape(images.shape[0], -1)

  def detokenize(self, tokens: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Tokens int32 [b, h' * w'] to images float32 [b, h, w, c], clipped to [0, 1]."""
    codes = self.codes()[tokens.reshape(-1, *grid)]
    return jnp.clip(self.decode(codes), 0.0, 1.0)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Encodes, quantizes and decodes; touches every parameter, for `init`."""
    return self.decode(self.quantize(self.encode(images)).codes)


def unit(x: jax.Array) -> jax.Array:
  """Scales vectors along the last axis to unit length."""
  return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-12)


def conv(channels: int, size: int, dtype: str, name: str, use_bias: bool = True) -> nn.Conv:
  """A convolution that keeps the image size."""
  return nn.Conv(channels, (size, size), use_bias=use_bias, dtype=dtype, name=name)


def norm(groups: int, dtype: str, name: str) -> nn.GroupNorm:
  """The group normalisation of all VQGAN layers."""
  return nn.GroupNorm(groups, epsilon=1e-6, dtype=dtype, name=name)
