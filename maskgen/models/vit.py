"""Vision transformers as image encoders: SigLIP (Zhai et al. 2023), CLIP (Radford et al. 2021), DINOv2 (Oquab
et al. 2023) and its registers (Darcet et al. 2023), DINOv3 (Siméoni et al. 2025), MAE (He et al. 2022).

Letters: b batch, h w image, n patches, r registers, d width, p projected width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen import sharding
from maskgen.config import check_at_least, check_dtype, fields
from maskgen.errors import UserError, nearest
from maskgen.models.attention_pool import CrossAttention
from maskgen.models.remat import REMAT, check_remat
from maskgen.models.transformer import (
  ACTIVATIONS,
  QKV,
  SWIGLU,
  Mlp,
  Transformer,
  check_attention,
  embedding_init,
  kernel_init,
)
from maskgen.numerics import rotary
from maskgen.numerics.positions import sines

POOLING = ("mean", "class", "registers", "attention")


class AttentionHead(nn.Module):
  """One learned query that attends to the patches, then x + mlp(norm(x)) (Zhai et al. 2022, section 2.4)."""

  heads: int
  hidden: int
  activation: str
  epsilon: float
  dtype: str
  attention: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b, n, d] -> [b, d]
    probe = sharding.gather(self.param("probe", kernel_init, (1, x.shape[-1])))
    query = jnp.broadcast_to(probe.astype(self.dtype)[None], (x.shape[0], *probe.shape))
    y = CrossAttention(self.heads, self.dtype, self.attention, name="attention")(query, x)[:, 0]
    mlp = Mlp(self.hidden, 0.0, self.dtype, self.activation, name="mlp")
    return y + mlp(nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(y), train=False)


class ViT(nn.Module):
  """Pre-norm blocks over patches and their positions; the defaults are those of SigLIP's B/16.

  So400m/14 has patch=14, width=1152, depth=27, heads=16 and hidden=4304.

  Attributes:
    image_size: (h, w) of its input; images of other sizes are resized.
    patch: side of a patch, in pixels.
    width, depth, heads: d, the number of blocks, and the heads of each.
    hidden: width inside the MLPs, by default 4 d.
    pooling: what represents the image: "mean", the mean of the patches; "class", the output at a class
      position in front of them; "registers", the mean of the registers; or "attention", what a learned query
      reads from the patches.
    fixed_positions: whether the embeddings of positions are MAE's, see `positions.sines`, and not learned.
    rotary_base: of rotary positions, which replace the embeddings, see `maskgen.numerics.rotary`; DINOv3's is
      100. 0 for embeddings.
    registers: r, positions in front of the patches, behind the class position, that are no part of an image.
    projection: p, the width of `embed`, or 0 for none.
    activation: inside the MLPs, see `Transformer`.
    epsilon: of the norms.
    layer_scale, qkv_bias: see `Transformer`.
    embedding_norm: whether the input of the blocks is normalised, as in CLIP.
    patch_bias: whether the embedding of patches has a bias.
    mean, std: of the pixels in each channel, with which images are standardised; as many as channels.
    dropout, drop_path: during training, see `Transformer`.
    dtype: the type of the computation; parameters are float32.
    attention, remat, scan: how the blocks are run, see `Transformer`.
  """

  image_size: tuple[int, int] = (224, 224)
  patch: int = 16
  width: int = 768
  depth: int = 12
  heads: int = 12
  hidden: int = 0
  pooling: str = "mean"
  fixed_positions: bool = False
  rotary_base: float = 0.0
  registers: int = 0
  projection: int = 0
  activation: str = "gelu_tanh"
  epsilon: float = 1e-6
  layer_scale: bool = False
  qkv_bias: str = QKV
  embedding_norm: bool = False
  patch_bias: bool = True
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[float, ...] = (0.5, 0.5, 0.5)
  dropout: float = 0.0
  drop_path: float = 0.0
  dtype: str = fields.precision("float32")
  attention: str = fields.operational("auto", plain="xla")
  remat: str = fields.operational("none", less_memory=REMAT[1:])
  scan: bool = fields.operational(False)

  def __post_init__(self):
    check_at_least(self, 1, "patch", "width", "depth", "heads")
    check_at_least(self, 0, "hidden", "registers", "projection", "epsilon", "rotary_base")
    check_dtype(self.dtype)
    check_attention(self.attention, self.dtype, self.dropout)
    check_remat(self.remat)
    for name, choices in (("pooling", POOLING), ("activation", (*ACTIVATIONS, SWIGLU))):
      if (value := getattr(self, name)) not in choices:
        raise UserError(f"{name} '{value}' does not exist{nearest(value, choices)}")
    if len(self.image_size) != 2 or any(side < 1 or side % self.patch for side in self.image_size):
      raise UserError(f"image_size is {self.image_size}: give (height, width), multiples of {self.patch}")
    if not self.mean or len(self.mean) != len(self.std):
      raise UserError(f"mean is {self.mean} and std is {self.std}: give one number of each for every channel")
    if self.width % self.heads:
      raise UserError(f"a width of {self.width} does not divide into {self.heads} heads")
    if self.fixed_positions and self.width % 4:
      raise UserError(f"width is {self.width}: fixed positions need a multiple of 4")
    if self.rotary_base and self.fixed_positions:
      raise UserError(f"rotary_base is {self.rotary_base} and fixed_positions is True: give one of them")
    if self.rotary_base and self.width % (4 * self.heads):
      raise UserError(
        f"a width of {self.width} in {self.heads} heads is no multiple of 4 each, which rotary positions need"
      )
    if any(self.qkv_bias.count(letter) != 1 or letter not in QKV for letter in self.qkv_bias):
      raise UserError(f"qkv_bias is '{self.qkv_bias}': give some letters of '{QKV}', each once")
    if self.registers and self.pooling not in ("class", "registers"):
      raise UserError(f"registers is {self.registers}: they need pooling='class' or 'registers'")
    if self.pooling == "registers" and not self.registers:
      raise UserError("pooling is 'registers', of which there are none: give at least 1")
    super().__post_init__()

  @property
  def grid(self) -> tuple[int, int]:
    """The numbers of patches of an image along its height and width."""
    return self.image_size[0] // self.patch, self.image_size[1] // self.patch

  @property
  def channels(self) -> int:
    """The number of channels of images."""
    return len(self.mean)

  @property
  def num_patches(self) -> int:
    """The number of patches of an image."""
    return self.grid[0] * self.grid[1]

  @property
  def leading(self) -> int:
    """The number of positions in front of those of the patches: 1 for a class position, or 0."""
    return int(self.pooling == "class")

  def setup(self):
    side, hidden = (self.patch, self.patch), self.hidden or 4 * self.width
    self.patch_embedding = nn.Conv(
      self.width, side, side, "VALID", use_bias=self.patch_bias, kernel_init=kernel_init, dtype=self.dtype
    )
    if self.fixed_positions:  # zero for a class position
      self.position = jnp.pad(sines(self.grid, self.width), ((self.leading, 0), (0, 0)))
    elif not self.rotary_base:
      self.position = self.param("position", embedding_init, (self.leading + self.num_patches, self.width))
    if self.leading:
      self.class_token = self.param("class_token", embedding_init, (1, self.width))
    if self.registers:
      self.register_tokens = self.param("register_tokens", embedding_init, (self.registers, self.width))
    if self.embedding_norm:
      self.input_norm = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype)
    self.encoder = Transformer(
      self.depth,
      self.heads,
      dropout=self.dropout,
      dtype=self.dtype,
      attention=self.attention,
      remat=self.remat,
      scan=self.scan,
      drop_path=self.drop_path,
      hidden=self.hidden,
      activation=self.activation,
      epsilon=self.epsilon,
      layer_scale=self.layer_scale,
      qkv_bias=self.qkv_bias,
    )
    self.encoder_norm = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype)
    if self.pooling == "attention":
      self.attention_head = AttentionHead(
        self.heads, hidden, self.activation, self.epsilon, self.dtype, self.attention
      )
    if self.projection:
      self.embedding = nn.Dense(self.projection, use_bias=False, kernel_init=kernel_init, dtype=self.dtype)

  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Images float32 [b, h, w, c] in [0, 1], of any size, to float [b, n, d], normalised, row by row."""
    return self._encode(images, train)[:, self.leading + self.registers :]

  def pool(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Images to one vector each, float32 [b, d], by `pooling`, after the norm."""
    x = self._encode(images, train)
    if self.pooling in ("mean", "registers"):
      x = x if self.pooling == "mean" else x[:, : self.registers]
      return x.astype(jnp.float32).mean(axis=1)
    x = x[:, 0] if self.pooling == "class" else self.attention_head(x)
    return x.astype(jnp.float32)

  def embed(self, images: jax.Array) -> jax.Array:
    """The features of the published model: `pool`, projected if it projects, float32 [b, d or p]."""
    x = self.pool(images)
    return self.embedding(x).astype(jnp.float32) if self.projection else x

  def standardize(self, images: jax.Array) -> jax.Array:
    """Images float32 [b, h, w, c] in [0, 1] as the network sees them, resized if their size differs."""
    shape = (images.shape[0], *self.image_size, images.shape[-1])
    if images.shape != shape:
      images = jax.image.resize(images, shape, "bilinear")
    mean, std = (jnp.array(value)[None, None, None] for value in (self.mean, self.std))
    return (images - mean) / std

  def to_pixels(self, standardized: jax.Array) -> jax.Array:
    """The inverse of `standardize`, except for the size, and not clipped."""
    mean, std = (jnp.array(value)[None, None, None] for value in (self.mean, self.std))
    return standardized * std + mean

  def encode_kept(
    self, images: jax.Array, kept: jax.Array | None, *, padded: bool = False, train: bool = False
  ) -> jax.Array:
    """Encodes a part of the patches: leading positions and patches [b, leading + r + k, d], normalised.

    Args:
      images: as in `__call__`.
      kept: int32 [b, k], the patches that the network sees, or None for all.
      padded: whether n may stand in `kept` for none, see `masking.padded_mask`: what is computed in such
        places is arbitrary, and the same elsewhere as without them.
      train: whether to apply dropout.
    """
    return self._encode(images, train, kept, padded=padded)

  def embed_patches(self, images: jax.Array) -> jax.Array:
    """Images as in `__call__` to the embeddings of patches [b, n, d], before positions are added."""
    x = self.patch_embedding(self.standardize(images))
    return x.reshape(x.shape[0], -1, self.width)

  def _encode(
    self,
    images: jax.Array,
    train: bool,
    kept: jax.Array | None = None,
    condition: jax.Array | None = None,
    padded: bool = False,
  ) -> jax.Array:
    """[b, h, w, c] -> [b, n or k, d] with the leading positions; for `condition` see `Block`."""
    x, seen = self.embed_patches(images), None
    if self.leading:
      x = jnp.concatenate([self._each(self.class_token, x), x], axis=1)
    if not self.rotary_base:
      x = x + (self.position if self.fixed_positions else sharding.gather(self.position))[None]
    if kept is not None:
      at = jnp.pad(kept + self.leading, ((0, 0), (self.leading, 0)))
      x = jnp.take_along_axis(x, at[..., None], axis=1, mode="clip" if padded else None)
      if padded:
        before = ((0, 0), (self.leading + self.registers, 0))
        seen = jnp.pad(kept < self.num_patches, before, constant_values=True)
    if self.registers:
      first, rest = x[:, : self.leading], x[:, self.leading :]
      x = jnp.concatenate([first, self._each(self.register_tokens, x), rest], axis=1)
    if self.embedding_norm:
      x = self.input_norm(x)
    x = sharding.constrain_batch(x.astype(self.dtype))
    x = self.encoder(x, train=train, condition=condition, waves=_waves(self, kept), seen=seen)
    return self.encoder_norm(x)

  def _each(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
    """Tokens [k, d] in front of each example of x: [b, k, d]."""
    tokens = sharding.gather(tokens).astype(x.dtype)
    return jnp.broadcast_to(tokens[None], (x.shape[0], *tokens.shape))


def _waves(network: ViT, kept: jax.Array | None = None) -> jax.Array | None:
  """The `rotary.waves` of the positions that the network sees, [b or 1, leading + r + n or k, 2, c / 2]."""
  if not network.rotary_base:
    return None
  first = network.leading + network.registers
  head = network.width // network.heads
  found = jnp.asarray(rotary.waves(network.grid, head, network.rotary_base, first))
  if kept is None:
    return found[None]
  front = jnp.broadcast_to(jnp.arange(first)[None], (len(kept), first))
  return sharding.constrain_batch(found[jnp.concatenate([front, kept + first], axis=1)])


def block_states(
  network: ViT, params: Any, images: jax.Array, kept: jax.Array | None = None, **options: Any
) -> jax.Array:
  """What enters the first block and leaves each one, [depth + 1, b, leading + r + n, d], before the norm.

  Args:
    network: the encoder.
    params: its parameters.
    images: as of `ViT.__call__`.
    kept: int32 [b, k], the patches that the network sees; by default all.
    **options: of `apply`, such as `train` and `rngs`.
  """
  _, stored = network.apply(
    {"params": params}, images, kept=kept, method="encode_kept", mutable=["states"], **options
  )
  found: jax.Array = stored["states"]["encoder"]["blocks"]
  return found


def class_attention(network: ViT, params: Any, states: jax.Array) -> jax.Array:
  """How much the class position attends to each patch in the last block, the mean of its heads.

  Args:
    network: an encoder with a class position.
    params: its parameters.
    states: of all patches, from `block_states`.

  Returns:
    float32 [b, n]; the sum is less than 1 by the attention to other positions.
  """
  block = params["encoder"][f"block_{network.depth - 1}"]
  norm = nn.LayerNorm(epsilon=network.epsilon, dtype=network.dtype)
  x: Any = norm.apply({"params": block["attention_norm"]}, states[-2])
  heads = (*x.shape[:2], network.heads, -1)

  def project(name: str) -> jax.Array:
    dense = nn.Dense(network.width, name[0] in network.qkv_bias, dtype=network.dtype)
    found: Any = dense.apply({"params": block["attention"][name]}, x)
    return found.reshape(heads)

  query, key, waves = project("query")[:, 0], project("key"), _waves(network)
  if waves is not None:  # which leave the class position as it is
    key = rotary.rotate(key, waves)
  scores = jnp.einsum("bhc,bkhc->bhk", query, key, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(scores / query.shape[-1] ** 0.5)
  return weights[..., network.leading + network.registers :].mean(axis=1)
