"""The causal text transformer of CLIP (Radford et al. 2021, section 2.4), in two halves.

`embed` looks up ids and `encode` runs the transformer on any embeddings: vectors of other origin can be mixed
with those of words. Submodules are named as in published weights, with an underscore instead of a dot before
an index. Letters: b batch, l positions, d width, p pooled width.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen.config import check_at_least, check_dtype, fields
from maskgen.errors import UserError, nearest
from maskgen.models import remat as remat_lib
from maskgen.models.resnet import layer_norm
from maskgen.models.transformer import ACTIVATIONS, attend, check_attention


class Encoded(NamedTuple):
  """The text transformer's outputs for a prompt.

  Attributes:
    last: float32 [b, l, d], after the last block, normalised.
    penultimate: float32 [b, l, d], after the second-to-last block, not normalised.
    pooled: float32 [b, p], `last` at the end of the prompt, projected if the model has a projection.
  """

  last: jax.Array
  penultimate: jax.Array
  pooled: jax.Array


class Embeddings(nn.Module):
  """The tables of words and of positions."""

  vocabulary_size: int
  positions: int
  width: int

  def setup(self):
    self.token_embedding = nn.Embed(self.vocabulary_size, self.width)
    self.position_embedding = nn.Embed(self.positions, self.width)

  def words(self, ids: jax.Array) -> jax.Array:  # [b, l] -> [b, l, d]
    return self.token_embedding(ids).astype(jnp.float32)

  def add_positions(self, x: jax.Array) -> jax.Array:  # [b, l, d] -> [b, l, d]
    return x + self.position_embedding.embedding[None, : x.shape[1]]


class CausalAttention(nn.Module):
  """Multi-head attention of each position to itself and earlier ones."""

  heads: int
  dtype: str
  attention: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b, l, d] -> [b, l, d]
    width = x.shape[-1]

    def project(name: str) -> jax.Array:  # [b, l, h, d / h]
      y = nn.Dense(width, dtype=self.dtype, name=name)(x)
      return y.reshape(*x.shape[:2], self.heads, width // self.heads)

    query, key, value = project("q_proj"), project("k_proj"), project("v_proj")
    y = attend(query, key, value, attention=self.attention, causal=True).reshape(x.shape)
    return nn.Dense(width, dtype=self.dtype, name="out_proj")(y)


class Mlp(nn.Module):
  """Two layers."""

  hidden: int
  activation: str
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b, l, d] -> [b, l, d]
    y = ACTIVATIONS[self.activation](nn.Dense(self.hidden, dtype=self.dtype, name="fc1")(x))
    return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(y)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  heads: int
  hidden: int
  activation: str
  epsilon: float
  dtype: str
  attention: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b, l, d] -> [b, l, d]
    y = layer_norm(self.epsilon, self.dtype, "layer_norm1")(x)
    x = x + CausalAttention(self.heads, self.dtype, self.attention, name="self_attn")(y)
    y = layer_norm(self.epsilon, self.dtype, "layer_norm2")(x)
    return x + Mlp(self.hidden, self.activation, self.dtype, name="mlp")(y)


class Stack(nn.Module):
  """A sequence of blocks."""

  depth: int
  block: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[b, l, d] to the outputs of the second-to-last and the last block, both [b, l, d]."""
    before = x
    for i in range(self.depth):
      before, x = x, self.block(name=f"layers_{i}")(x)
    return before, x


class TextEncoder(nn.Module):
  """CLIP's text encoder; the defaults are those of Stable Diffusion 1.5.

  Attributes:
    vocabulary_size: the number of ids.
    positions: the largest l.
    width: d.
    depth: the number of blocks.
    heads: of each attention.
    hidden: width inside the MLPs.
    activation: a name in `ACTIVATIONS`; OpenAI's models have "quick_gelu", OpenCLIP's "gelu".
    projection: p, or 0 for none, in which case p is d.
    epsilon: of the normalisations.
    dtype: the type of the computation; parameters are float32, and so are softmax and statistics.
    attention: see `maskgen.models.transformer.attend`.
    remat: what a backward pass recomputes in each block, see `maskgen.models.remat`.
  """

  vocabulary_size: int = 49408
  positions: int = 77
  width: int = 768
  depth: int = 12
  heads: int = 12
  hidden: int = 3072
  activation: str = "quick_gelu"
  projection: int = 0
  epsilon: float = 1e-5
  dtype: str = fields.precision("float32")
  attention: str = fields.operational("auto", plain="xla")
  remat: str = fields.operational("none", less_memory=remat_lib.REMAT[1:])

  def __post_init__(self):
    check_at_least(self, 1, "vocabulary_size", "positions", "width", "depth", "heads", "hidden")
    check_at_least(self, 0, "projection", "epsilon")
    check_dtype(self.dtype)
    check_attention(self.attention, self.dtype, 0.0)
    remat_lib.check_remat(self.remat)
    if self.width % self.heads:
      raise UserError(f"a width of {self.width} does not divide into {self.heads} heads")
    if self.activation not in ACTIVATIONS:
      raise UserError(f"activation '{self.activation}' does not exist{nearest(self.activation, ACTIVATIONS)}")
    super().__post_init__()

  def setup(self):
    def block(name: str) -> nn.Module:
      return remat_lib.remat_module(Block, self.remat)(
        self.heads, self.hidden, self.activation, self.epsilon, self.dtype, self.attention, name=name
      )

    self.embeddings = Embeddings(self.vocabulary_size, self.positions, self.width)
    self.encoder = Stack(self.depth, block)
    self.final_layer_norm = layer_norm(self.epsilon, "float32")
    if self.projection:
      self.text_projection = nn.Dense(self.projection, use_bias=False)

  @property
  def pooled_width(self) -> int:
    """The width p of the pooled text."""
    return self.projection or self.width

  def embed(self, ids: jax.Array) -> jax.Array:
    """Looks up ids int32 [b, l]; float32 [b, l, d], without positions."""
    return self.embeddings.words(ids)

  def encode(self, embeddings: jax.Array, end: jax.Array) -> Encoded:
    """Runs the transformer.

    Args:
      embeddings: float [b, l, d], of words or from elsewhere; positions are added here.
      end: int32 [b], the position of the prompt's (first) end id.

    Raises:
      UserError: if l exceeds the model's positions.
    """
    length = embeddings.shape[1]
    if length > self.positions:
      raise UserError(f"a prompt of {length} positions is too long: this text encoder has {self.positions}")
    x = self.embeddings.add_positions(embeddings.astype(jnp.float32)).astype(self.dtype)
    penultimate, x = self.encoder(x)
    last = self.final_layer_norm(x)
    pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
    if self.projection:
      pooled = self.text_projection(pooled)
    return Encoded(last, penultimate.astype(jnp.float32), pooled)

  def __call__(self, ids: jax.Array, end: jax.Array) -> Encoded:
    """`embed`, then `encode`."""
    return self.encode(self.embed(ids), end)
