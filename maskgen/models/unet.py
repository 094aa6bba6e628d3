"""The conditional U-Net of latent diffusion (Rombach et al. 2022, section 3.3; Podell et al. 2023).

The fields of one module cover Stable Diffusion 1.5, 2.1 and XL. Submodules are named as in published weights,
with an underscore instead of a dot before an index. Letters: b batch, h w c image, n = h * w, t time width,
l d context.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen.config import check_at_least, check_dtype, fields
from maskgen.errors import UserError
from maskgen.models import remat as remat_lib
from maskgen.models.resnet import Downsample, ResnetBlock, Upsample, conv, group_norm, layer_norm
from maskgen.models.transformer import attend, check_attention

# Height and width of the original, top and left of the crop, height and width of the target, all in pixels.
NUM_SIZES = 6

# A constructor of a level's submodules, complete except for their name (and channels).
Layer = Callable[..., nn.Module]


class Condition(NamedTuple):
  """What a U-Net is conditioned on.

  Attributes:
    context: float [b, l, d], for cross-attention.
    pooled: float [b, p], or None for a model that takes none.
    sizes: float [b, 6], see `NUM_SIZES`, or None for a model that takes none.
  """

  context: jax.Array
  pooled: jax.Array | None = None
  sizes: jax.Array | None = None


def sinusoids(x: jax.Array, width: int) -> jax.Array:
  """Cosines, then sines of x * 10000^(-2 i / width), i < width / 2: [...] to float32 [..., width]."""
  frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
  angles = jnp.multiply.outer(x.astype(jnp.float32), frequencies)
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nn.Module):
  """Two layers with a swish in between."""

  width: int
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b, c] -> [b, t]
    x = nn.swish(nn.Dense(self.width, dtype=self.dtype, name="linear_1")(x))
    return nn.Dense(self.width, dtype=self.dtype, name="linear_2")(x)


class Attention(nn.Module):
  """Multi-head attention of x to a context, which may be x itself."""

  heads: int
  dtype: str
  attention: str

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:  # [b, n, c], [b, l, d] -> [b, n, c]
    width = x.shape[-1]

    def project(y: jax.Array, name: str) -> jax.Array:  # [b, n or l, h, c / h]
      y = nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)(y)
      return y.reshape(*y.shape[:2], self.heads, width // self.heads)

    query, key, value = project(x, "to_q"), project(context, "to_k"), project(context, "to_v")
    y = attend(query, key, value, attention=self.attention).reshape(x.shape)
    return nn.Dense(width, dtype=self.dtype, name="to_out_0")(y)


class Gate(nn.Module):
  """Half of a projection times the exact GELU of the other half (Shazeer 2020)."""

  hidden: int
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b, n, c] -> [b, n, hidden]
    value, gate = jnp.split(nn.Dense(2 * self.hidden, dtype=self.dtype, name="proj")(x), 2, axis=-1)
    return value * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
  """A gated layer four times as wide, then a projection back."""

  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b, n, c] -> [b, n, c]
    width = x.shape[-1]
    return nn.Dense(width, dtype=self.dtype, name="net_2")(Gate(4 * width, self.dtype, name="net_0")(x))


class TransformerBlock(nn.Module):
  """Self-attention, cross-attention and feed-forward layer, each applied to the normalised x and added."""

  heads: int
  dtype: str
  attention: str

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:  # [b, n, c], [b, l, d] -> [b, n, c]
    norm = functools.partial(layer_norm, 1e-5, self.dtype)
    attention = functools.partial(Attention, self.heads, self.dtype, self.attention)
    y = norm("norm1")(x)
    x = x + attention(name="attn1")(y, y)
    x = x + attention(name="attn2")(norm("norm2")(x), context)
    return x + FeedForward(self.dtype, name="ff")(norm("norm3")(x))


class SpatialTransformer(nn.Module):
  """Transformer blocks on the pixels of an image, with a residual connection."""

  depth: int
  heads: int
  groups: int
  dtype: str
  attention: str
  remat: str

  @nn.compact
  def __call__(self, image: jax.Array, context: jax.Array) -> jax.Array:  # [b, h, w, c], [b, l, d]
    block = remat_lib.remat_module(TransformerBlock, self.remat)
    width = image.shape[-1]
    x = group_norm(self.groups, 1e-6, self.dtype, "norm")(image).reshape(image.shape[0], -1, width)
    x = nn.Dense(width, dtype=self.dtype, name="proj_in")(x)
    for i in range(self.depth):
      x = block(self.heads, self.dtype, self.attention, name=f"transformer_blocks_{i}")(x, context)
    return image + nn.Dense(width, dtype=self.dtype, name="proj_out")(x).reshape(image.shape)


class DownBlock(nn.Module):
  """The layers of a level on the way down; they also return the skip connections."""

  layers: int
  resnet: Layer
  transformer: Layer | None
  downsample: Layer | None

  @nn.compact
  def __call__(
    self, x: jax.Array, time: jax.Array, context: jax.Array
  ) -> tuple[jax.Array, list[jax.Array]]:  # [b, h, w, c], [b, t], [b, l, d]
    skips = []
    for i in range(self.layers):
      x = self.resnet(name=f"resnets_{i}")(x, time)
      if self.transformer:
        x = self.transformer(name=f"attentions_{i}")(x, context)
      skips.append(x)
    if self.downsample:
      x = self.downsample(name="downsamplers_0")(x)
      skips.append(x)
    return x, skips


class MiddleBlock(nn.Module):
  """A transformer between two residual blocks."""

  resnet: Layer
  transformer: Layer

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array) -> jax.Array:
    x = self.resnet(name="resnets_0")(x, time)
    x = self.transformer(name="attentions_0")(x, context)
    return self.resnet(name="resnets_1")(x, time)


class UpBlock(nn.Module):
  """The layers of a level on the way up; each takes one skip connection."""

  resnet: Layer
  transformer: Layer | None
  upsample: Layer | None

  @nn.compact
  def __call__(
    self, x: jax.Array, skips: list[jax.Array], time: jax.Array, context: jax.Array
  ) -> jax.Array:  # the skips in the order of their use
    for i, skip in enumerate(skips):
      x = self.resnet(name=f"resnets_{i}")(jnp.concatenate([x, skip], axis=-1), time)
      if self.transformer:
        x = self.transformer(name=f"attentions_{i}")(x, context)
    return self.upsample(name="upsamplers_0")(x) if self.upsample else x


class Layout(nn.Module):
  """A coarse image computed from a pooled text by two layers, and enlarged."""

  side: int
  channels: int
  hidden: int
  dtype: str

  @nn.compact
  def __call__(self, pooled: jax.Array, size: tuple[int, int]) -> jax.Array:  # [b, p] -> [b, *size, c]
    x = nn.swish(nn.Dense(self.hidden, dtype=self.dtype, name="linear_1")(pooled))
    x = nn.Dense(self.side**2 * self.channels, dtype=self.dtype, name="linear_2")(x)
    x = x.reshape(-1, self.side, self.side, self.channels)
    return jax.image.resize(x, (len(x), *size, self.channels), "bilinear")


class UNet(nn.Module):
  """The network that predicts noise, or another of `diffusion.PREDICTIONS`; the defaults are SD 1.5's.

  Attributes:
    channels: of each level; each level has half the resolution of the one before.
    layers: residual blocks of each level on the way down; there is one more on the way up.
    depths: transformer blocks after each residual block of a level; 0 for none.
    middle_depth: transformer blocks at the bottom.
    heads: of the attentions of each level; the bottom has those of the last.
    in_channels, out_channels: c of the input and of the output.
    context_width: d.
    pooled_width: p, the width of a pooled text that is added to the time embedding, as in SDXL; 0 for none.
    size_width: sinusoids for each of the six sizes that go with it; 0 for a model that takes no sizes.
    layout: side of a coarse image, computed from the pooled text, that is added to the first layer's output;
      0 for none. No published model has it; small models trained from scratch need it to follow words for
      places.
    scale_shift: whether time and pooled text scale and shift normalised activations (as in no published
      model), or are added before the normalisation; see `ResnetBlock`.
    groups, epsilon: of the group normalisations.
    dtype: the type of the computation; parameters are float32, and so are softmax, statistics and output.
    attention: see `maskgen.models.transformer.attend`.
    remat: what a backward pass recomputes in each residual and each transformer block, see
      `maskgen.models.remat`.
  """

  channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers: int = 2
  depths: tuple[int, ...] = (1, 1, 1, 0)
  middle_depth: int = 1
  heads: tuple[int, ...] = (8, 8, 8, 8)
  in_channels: int = 4
  out_channels: int = 4
  context_width: int = 768
  pooled_width: int = 0
  size_width: int = 256
  layout: int = 0
  scale_shift: bool = False
  groups: int = 32
  epsilon: float = 1e-5
  dtype: str = fields.precision("float32")
  attention: str = fields.operational("auto", plain="xla")
  remat: str = fields.operational("none", less_memory=remat_lib.REMAT[1:])

  def __post_init__(self):
    positive = ("channels", "layers", "middle_depth", "heads", "in_channels", "out_channels", "context_width")
    check_at_least(self, 1, *positive, "groups")
    check_at_least(self, 0, "depths", "pooled_width", "size_width", "layout", "epsilon")
    check_dtype(self.dtype)
    check_attention(self.attention, self.dtype, 0.0)
    remat_lib.check_remat(self.remat)
    if not len(self.channels) == len(self.depths) == len(self.heads):
      raise UserError(
        f"{len(self.channels)} channels, {len(self.depths)} depths and {len(self.heads)} heads: give one of "
        "each per level"
      )
    for channels, heads in zip(self.channels, self.heads, strict=True):
      if channels % heads or channels % self.groups:
        raise UserError(f"{channels} channels do not divide into {heads} heads and {self.groups} groups")
    super().__post_init__()

  @property
  def factor(self) -> int:
    """The number that must divide height and width."""
    return 2 ** (len(self.channels) - 1)

  @property
  def takes_sizes(self) -> bool:
    """Whether conditions need `sizes`."""
    return self.pooled_width > 0 and self.size_width > 0

  @nn.compact
  def __call__(self, noisy: jax.Array, time: jax.Array, condition: Condition) -> jax.Array:
    """Predicts what the noise schedule's `prediction` names.

    Args:
      noisy: float [b, h, w, c].
      time: [b], timesteps of the noise schedule, 0 .. 999 for all published models.
      condition: what to generate.

    Returns:
      float32 [b, h, w, c].

    Raises:
      UserError: if h or w is not divisible by `factor`, or the condition lacks what this model takes.
    """
    if noisy.shape[1] % self.factor or noisy.shape[2] % self.factor:
      raise UserError(
        f"a latent image of {noisy.shape[1]}x{noisy.shape[2]} is not divisible by {self.factor}: resize it"
      )
    time_width = 4 * self.channels[0]
    embed = functools.partial(TimeEmbedding, time_width, self.dtype)
    time = embed(name="time_embedding")(sinusoids(time, self.channels[0]))
    if self.pooled_width:
      time = time + embed(name="add_embedding")(self._added(condition))
    context = condition.context.astype(self.dtype)

    def resnet(level: int) -> Layer:
      block = remat_lib.remat_module(ResnetBlock, self.remat)
      options = (self.channels[level], self.groups, self.epsilon, self.dtype, self.scale_shift)
      return functools.partial(block, *options)

    def transformer(level: int, depth: int) -> Any:
      options = (depth, self.heads[level], self.groups, self.dtype, self.attention, self.remat)
      return functools.partial(SpatialTransformer, *options) if depth else None

    last = len(self.channels) - 1
    downsample: Layer = functools.partial(Downsample, ((1, 1), (1, 1)), self.dtype)
    upsample: Layer = functools.partial(Upsample, self.dtype)
    x = conv(self.channels[0], 3, self.dtype, "conv_in")(noisy)
    if self.layout:
      layout = Layout(self.layout, self.channels[0], 4 * time_width, self.dtype, name="layout_in")
      x = x + layout(self._pooled(condition), (x.shape[1], x.shape[2]))
    skips = [x]
    for level in range(last + 1):
      parts = resnet(level), transformer(level, self.depths[level]), downsample if level < last else None
      x, new = DownBlock(self.layers, *parts, name=f"down_blocks_{level}")(x, time, context)
      skips += new
    x = MiddleBlock(resnet(last), transformer(last, self.middle_depth), name="mid_block")(x, time, context)
    for level in reversed(range(last + 1)):
      parts = resnet(level), transformer(level, self.depths[level]), upsample if level > 0 else None
      taken = [skips.pop() for _ in range(self.layers + 1)]
      x = UpBlock(*parts, name=f"up_blocks_{last - level}")(x, taken, time, context)
    x = nn.swish(group_norm(self.groups, self.epsilon, self.dtype, "conv_norm_out")(x))
    return conv(self.out_channels, 3, "float32", "conv_out")(x)

  def _added(self, condition: Condition) -> jax.Array:
    """Pooled text and sinusoids of sizes (Podell et al. 2023, section 2.2): [b, p + 6 * size_width]."""
    pooled = self._pooled(condition)
    if not self.size_width:
      return pooled
    assert condition.sizes is not None  # checked by `_pooled`
    sizes = sinusoids(condition.sizes, self.size_width).reshape(len(condition.sizes), -1)
    return jnp.concatenate([pooled, sizes], axis=-1)

  def _pooled(self, condition: Condition) -> jax.Array:
    if condition.pooled is None or (self.size_width and condition.sizes is None):
      taken = "a pooled text and sizes" if self.size_width else "a pooled text"
      raise UserError(f"this U-Net takes {taken}, which the condition lacks: pass them")
    return condition.pooled.astype(jnp.float32)
