"""The autoencoder of latent diffusion (Rombach et al. 2022, section 3.1): images to latents and back.

Submodules are named as in published weights, with an underscore instead of a dot before an index.
Letters: b batch, h w image, h' w' latent image, c latent channels.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen.config import check_at_least, check_dtype, fields
from maskgen.errors import UserError
from maskgen.models import remat as remat_lib
from maskgen.models.resnet import Downsample, ResnetBlock, Upsample, conv, group_norm
from maskgen.models.transformer import attend, check_attention

EPSILON = 1e-6

Layer = Callable[..., nn.Module]


class Gaussian(NamedTuple):
  """Each image's distribution of latents, scaled for the U-Net, as float32 [b, h', w', c]."""

  mean: jax.Array
  std: jax.Array

  def sample(self, key: jax.Array) -> jax.Array:
    """Samples a latent, float32 [b, h', w', c]."""
    return self.mean + self.std * jax.random.normal(key, self.mean.shape)


class PixelAttention(nn.Module):
  """Single-head attention between all pixels, with a residual connection."""

  groups: int
  dtype: str
  attention: str

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:  # [b, h, w, c] -> [b, h, w, c]
    width = image.shape[-1]
    x = group_norm(self.groups, EPSILON, self.dtype, "group_norm")(image).reshape(image.shape[0], -1, width)
    query, key, value = (
      nn.Dense(width, dtype=self.dtype, name=name)(x)[:, :, None] for name in ("to_q", "to_k", "to_v")
    )
    y = attend(query, key, value, attention=self.attention)[:, :, 0]
    return image + nn.Dense(width, dtype=self.dtype, name="to_out_0")(y).reshape(image.shape)


class MiddleBlock(nn.Module):
  """Attention between two residual blocks."""

  resnet: Layer
  attention: Layer

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.resnet(name="resnets_0")(x)
    x = self.attention(name="attentions_0")(x)
    return self.resnet(name="resnets_1")(x)


class Level(nn.Module):
  """Residual blocks, followed by an optional `resize`: the name and the module."""

  layers: int
  resnet: Layer
  resize: tuple[str, Layer] | None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.layers):
      x = self.resnet(name=f"resnets_{i}")(x)
    if self.resize:
      name, resize = self.resize
      x = resize(name=name)(x)
    return x


class Coder(nn.Module):
  """The fields and blocks that encoder and decoder share."""

  channels: tuple[int, ...]
  layers: int
  out_channels: int
  groups: int
  dtype: str
  attention: str
  remat: str

  def resnet(self, level: int) -> Layer:
    block = remat_lib.remat_module(ResnetBlock, self.remat)
    return functools.partial(block, self.channels[level], self.groups, EPSILON, self.dtype)

  def middle(self) -> nn.Module:
    attention = functools.partial(PixelAttention, self.groups, self.dtype, self.attention)
    return MiddleBlock(self.resnet(-1), attention, name="mid_block")

  def out(self, x: jax.Array) -> jax.Array:
    x = nn.swish(group_norm(self.groups, EPSILON, self.dtype, "conv_norm_out")(x))
    return conv(self.out_channels, 3, "float32", "conv_out")(x)


class Encoder(Coder):
  """Images [b, h, w, 3] to moments [b, h', w', 2 c]."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = conv(self.channels[0], 3, self.dtype, "conv_in")(x)
    downsample = functools.partial(Downsample, ((0, 1), (0, 1)), self.dtype)
    for level in range(len(self.channels)):
      resize = ("downsamplers_0", downsample) if level < len(self.channels) - 1 else None
      x = Level(self.layers, self.resnet(level), resize, name=f"down_blocks_{level}")(x)
    return self.out(self.middle()(x))


class Decoder(Coder):
  """Latents [b, h', w', c] to images [b, h, w, 3]."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.middle()(conv(self.channels[-1], 3, self.dtype, "conv_in")(x))
    upsample = functools.partial(Upsample, self.dtype)
    for i, level in enumerate(reversed(range(len(self.channels)))):
      resize = ("upsamplers_0", upsample) if level > 0 else None
      x = Level(self.layers + 1, self.resnet(level), resize, name=f"up_blocks_{i}")(x)
    return self.out(x)


class AutoencoderKL(nn.Module):
  """Encoder and decoder; the defaults are those of Stable Diffusion 1 and 2.

  Attributes:
    channels: of each level; each level has half the resolution of the one before.
    layers: residual blocks of each level of the encoder; the decoder has one more.
    image_channels: of the images.
    latent_channels: c.
    scale: multiplies latents, so that they have about unit variance.
    groups: of the group normalisations.
    dtype: the type of the computation; parameters are float32, and so are softmax, statistics and outputs.
      SDXL's decoder overflows in float16.
    attention: see `maskgen.models.transformer.attend`.
    remat: what a backward pass recomputes in each residual block, see `maskgen.models.remat`.
  """

  channels: tuple[int, ...] = (128, 256, 512, 512)
  layers: int = 2
  image_channels: int = 3
  latent_channels: int = 4
  scale: float = 0.18215
  groups: int = 32
  dtype: str = fields.precision("float32")
  attention: str = fields.operational("auto", plain="xla")
  remat: str = fields.operational("none", less_memory=remat_lib.REMAT[1:])

  def __post_init__(self):
    check_at_least(self, 1, "channels", "layers", "image_channels", "latent_channels", "groups")
    check_at_least(self, 0, "scale")
    check_dtype(self.dtype)
    check_attention(self.attention, self.dtype, 0.0)
    remat_lib.check_remat(self.remat)
    for channels in self.channels:
      if channels % self.groups:
        raise UserError(f"{channels} channels do not divide into {self.groups} groups")
    super().__post_init__()

  def setup(self):
    options = (self.groups, self.dtype, self.attention, self.remat)
    self.encoder = Encoder(self.channels, self.layers, 2 * self.latent_channels, *options)
    self.decoder = Decoder(self.channels, self.layers, self.image_channels, *options)
    self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1))
    self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1))

  @property
  def factor(self) -> int:
    """Pixels per latent pixel along each side."""
    return 2 ** (len(self.channels) - 1)

  def encode(self, images: jax.Array) -> Gaussian:
    """Images float32 [b, h, w, 3] in [0, 1] to their latents.

    Raises:
      UserError: if h or w is not divisible by `factor`.
    """
    if images.shape[1] % self.factor or images.shape[2] % self.factor:
      raise UserError(
        f"an image of {images.shape[1]}x{images.shape[2]} pixels is not divisible by {self.factor}: resize it"
      )
    mean, log_variance = jnp.split(self.quant_conv(self.encoder(2.0 * images - 1.0)), 2, axis=-1)
    return Gaussian(self.scale * mean, self.scale * jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0)))

  def decode(self, latents: jax.Array) -> jax.Array:
    """Latents float32 [b, h', w', c] to images float32 [b, h, w, 3], roughly in [0, 1] but not clipped."""
    return self.decoder(self.post_quant_conv(latents / self.scale)) / 2.0 + 0.5

  def __call__(self, images: jax.Array) -> jax.Array:
    """Encodes to the mean and decodes it."""
    return self.decode(self.encode(images).mean)
