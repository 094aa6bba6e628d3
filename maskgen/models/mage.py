"""MAGE: one transformer that generates images and represents them (Li et al. 2023, section 3).

Letters: b batch, n tokens, k tokens the encoder sees, d encoder width, v vocabulary. Position 0 of every
sequence is the class position; the tokens follow.

A call with `cached=True` evaluates only the class position and the `kept` tokens, and takes the others from
an earlier call over all positions in which the collection `cache` was mutable.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen import sharding
from maskgen.config import fields
from maskgen.models.remat import REMAT
from maskgen.models.transformer import Dropout, Transformer, embedding_init, kernel_init
from maskgen.numerics import masking
from maskgen.numerics.positions import sines
from maskgen.numerics.vocab import Vocab


class Prediction(NamedTuple):
  """What the network predicts for masked tokens.

  Attributes:
    tokens: int32 [b, n], the codes.
    mask: bool [b, n], True where a code is hidden.
    kept: int32 [b, k], the positions that the encoder sees.
    latents: [b, 1 + k, d], the encoder's output at the class position and the kept positions.
    logits: float32 [b, n, codebook], the decoder's output.
  """

  tokens: jax.Array
  mask: jax.Array
  kept: jax.Array
  latents: jax.Array
  logits: jax.Array


class Encoder(nn.Module):
  """The encoder of `Mage`, under the same parameter names; the defaults are ViT-B's.

  Attributes:
    vocab: the token ids.
    num_tokens: n.
    width, depth, heads: of the encoder.
    dropout: on embeddings, attention weights, projections and MLPs, during training.
    dtype: the type of the computation; parameters and logits are float32.
    attention, remat, scan: how the blocks are run, see `Transformer`.
    drop_path: of the encoder's blocks, during training, see `Transformer`.
    fixed_grid: the token grid (h', w'), if fixed position embeddings, see `positions.sines`, are added behind
      the first normalisation to the learned ones in front of it.
  """

  vocab: Vocab
  num_tokens: int
  width: int = 768
  depth: int = 12
  heads: int = 12
  dropout: float = 0.1
  dtype: str = fields.precision("float32")
  attention: str = fields.operational("auto", plain="xla")
  remat: str = fields.operational("none", less_memory=REMAT[1:])
  scan: bool = fields.operational(False)
  drop_path: float = 0.0
  fixed_grid: tuple[int, int] | None = None

  def setup(self):
    self.embedding = self.param("embedding", embedding_init, (self.vocab.size, self.width))
    self.position = self.param("position", embedding_init, (1 + self.num_tokens, self.width))
    self.embedding_norm = self.norm()
    self.embedding_dropout = Dropout(self.dropout)
    self.encoder = self.transformer(self.depth, self.heads, self.drop_path)
    self.encoder_norm = self.norm()

  def norm(self, epsilon: float = 1e-6) -> nn.LayerNorm:
    """A layer normalisation in the type of the computation."""
    return nn.LayerNorm(epsilon=epsilon, dtype=self.dtype)

  def transformer(self, depth: int, heads: int, drop_path: float = 0.0) -> Transformer:
    """A stack of blocks with this module's options."""
    return Transformer(
      depth, heads, self.dropout, self.dtype, self.attention, self.remat, self.scan, drop_path
    )

  def blocks(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    kept: jax.Array | None,
    *,
    train: bool,
    cached: bool = False,
  ) -> jax.Array:
    """The last encoder block's output, before the final normalisation.

    Args:
      tokens: int32 [b, n], codes.
      mask: bool [b, n]; masked tokens are replaced by [MASK].
      kept: int32 [b, k], the positions the encoder sees, or None for all.
      train: whether to apply dropout.
      cached: whether to use the cache of an earlier call, see above.

    Returns:
      [b, 1 + k, d].
    """
    ids = jnp.where(mask, self.vocab.mask_id, tokens)
    ids = jnp.pad(ids, ((0, 0), (1, 0)), constant_values=self.vocab.null_class_id)
    embedding, position = sharding.gather((self.embedding, self.position))
    x = sharding.constrain_batch((embedding[ids] + position[None]).astype(self.dtype))
    x = self.embedding_dropout(self.embedding_norm(x), train=train)
    if self.fixed_grid is not None:
      fixed = jnp.pad(sines(self.fixed_grid, self.width), ((1, 0), (0, 0)))
      x = x + fixed[None].astype(x.dtype)
    at = None if kept is None else jnp.pad(kept + 1, ((0, 0), (1, 0)))
    if at is not None:
      x = jnp.take_along_axis(x, at[..., None], axis=1)
    return self.encoder(x, train=train, at=at if cached else None)

  def encode(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    kept: jax.Array | None = None,
    *,
    train: bool = False,
    cached: bool = False,
  ) -> jax.Array:
    """Latents [b, 1 + k, d]; the arguments are those of `blocks`."""
    return self.encoder_norm(self.blocks(tokens, mask, kept, train=train, cached=cached))

  def pool(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
    """The mean of the last block's output over unmasked tokens [b, n]; float32 [b, d].

    It excludes the class position and precedes the final normalisation (section 4.2 and appendix).
    """
    x = self.blocks(tokens, jnp.zeros(tokens.shape, bool), None, train=train)
    return x[:, 1:].astype(jnp.float32).mean(axis=1)


class Mage(Encoder):
  """Encoder over the kept tokens, decoder over all; the defaults are ViT-B's.

  Attributes:
    decoder_width, decoder_depth, decoder_heads: of the decoder.
    condition_width: c, the width of the conditions that `decode` takes; 0 for a model that takes none.
    layout: hidden width of two layers that compute, from the mean of a condition over l, padding included, a
      vector for each position, which is added to the decoder's input; 0 for none, as in the paper. These
      parameters are applied once for an image instead of at every position, so that many of them are cheap.
      Their number depends on n: a warm start at another image size needs them in `init_fresh`.
    add_visible: whether the decoder sees, in the place of a visible token, its sum with the class position's
      feature.
  """

  decoder_width: int = 768
  decoder_depth: int = 8
  decoder_heads: int = 16
  condition_width: int = 0
  layout: int = 0
  add_visible: bool = False

  def setup(self):
    super().setup()

    def dense(width: int) -> nn.Dense:
      return nn.Dense(width, kernel_init=kernel_init, dtype=self.dtype)

    self.decoder_input = dense(self.decoder_width)
    self.decoder_position = self.param(
      "decoder_position", embedding_init, (1 + self.num_tokens, self.decoder_width)
    )
    if self.condition_width:
      self.condition_input = dense(self.decoder_width)
    if self.layout:
      self.layout_hidden = dense(self.layout)
      self.layout_output = dense((1 + self.num_tokens) * self.decoder_width)
    self.decoder = self.transformer(self.decoder_depth, self.decoder_heads)
    self.decoder_norm = self.norm()
    self.head = dense(self.width)
    self.head_norm = self.norm(1e-5)  # the reference's epsilon
    self.head_bias = self.param("head_bias", nn.initializers.zeros, (self.vocab.size,))

  def decode(
    self,
    latents: jax.Array,
    mask: jax.Array,
    kept: jax.Array | None = None,
    condition: jax.Array | None = None,
    *,
    train: bool = False,
    cached: bool = False,
  ) -> jax.Array:
    """Logits float32 [b, 1 + n, v] from latents [b, 1 + k, d] and the same mask and kept positions.

    If `cached`, logits [b, 1 + k, v], given without a condition: that of the earlier call is in the cache.

    The class position's feature replaces every masked token, dropped or not (section 3.1). A condition, float
    [b, l, c] of any l, is projected and appended to the sequence (appendix A.2) without positions: where the
    order matters, as in text, features already encode it.
    """
    b, _, width = latents.shape
    # Positions of all examples form one axis, as in the blocks.
    x = sharding.constrain_batch(self.decoder_input(latents.reshape(-1, width))).reshape(
      b, -1, self.decoder_width
    )
    class_feature = x[:, :1]
    at = jnp.pad(kept + 1, ((0, 0), (1, 0))) if cached and kept is not None else None
    if kept is not None and at is None:
      # Dropped positions are masked below.
      x = jnp.concatenate([class_feature, masking.spread(x[:, 1:], kept, mask.shape[1])], axis=1)
    # The class position keeps its own feature, alone.
    hidden = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=self.add_visible)[..., None]
    position = sharding.gather(self.decoder_position)[None].astype(x.dtype)
    if at is not None:
      hidden, position = jnp.take_along_axis(hidden, at[..., None], axis=1), position[0][at]
    x = jnp.where(hidden, class_feature, x + class_feature if self.add_visible else x) + position
    length = x.shape[1]
    if self.layout:
      x = x + self.layout_of(condition, at)
    if condition is not None:
      condition = sharding.constrain_batch(self.condition_input(condition.reshape(-1, self.condition_width)))
      x = jnp.concatenate([x, condition.reshape(b, -1, self.decoder_width)], axis=1)
    x = self.decoder(x, train=train, at=at)[:, :length]
    x = self.decoder_norm(x).reshape(-1, self.decoder_width)
    x = self.head_norm(nn.gelu(sharding.constrain_batch(self.head(x)), approximate=False))
    # The head is tied to the embedding table, which gets gradients from the input only.
    table = sharding.gather(jax.lax.stop_gradient(self.embedding).astype(x.dtype))
    logits = jnp.einsum("nd,vd->nv", x, table, preferred_element_type=jnp.float32)
    return (logits + self.head_bias[None]).reshape(b, -1, self.vocab.size)

  def layout_of(self, condition: jax.Array | None, at: jax.Array | None) -> jax.Array:
    """What `layout` adds to the decoder's input, [b, 1 + n, d]; at the positions `at`, from the cache."""
    if at is not None:
      stored: Any = self.get_variable("cache", "layout")
      return jnp.take_along_axis(stored, at[..., None], axis=1)
    assert condition is not None, "a network with a layout takes a condition"
    x = sharding.constrain_batch(self.layout_hidden(condition.mean(axis=1)))
    x = sharding.constrain_batch(self.layout_output(nn.gelu(x, approximate=False)))
    x = x.reshape(len(x), -1, self.decoder_width)
    if self.is_mutable_collection("cache"):
      self.put_variable("cache", "layout", x)
    return x

  def code_logits(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    kept: jax.Array | None = None,
    condition: jax.Array | None = None,
    *,
    train: bool = False,
    cached: bool = False,
    branches: int = 1,
  ) -> jax.Array:
    """Logits over the codes only, float32 [b, n, codebook]; if `cached`, [b, k, codebook] of the kept.

    With several branches the encoder, which takes no condition, runs once for all of them: the condition and
    the logits have b * branches rows, those of one example adjacent and therefore on one device.
    """
    latents = self.encode(tokens, mask, kept, train=train, cached=cached)
    if branches > 1:
      latents, mask = jnp.repeat(latents, branches, axis=0), jnp.repeat(mask, branches, axis=0)
      kept = None if kept is None else jnp.repeat(kept, branches, axis=0)
    logits = self.decode(latents, mask, kept, condition, train=train, cached=cached)
    return logits[:, 1:, : self.vocab.codebook]

  def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Touches every parameter, for `init`."""
    width = self.condition_width
    return self.code_logits(tokens, mask, condition=jnp.zeros((len(tokens), 1, width)) if width else None)


def decoding_fns(
  model: Mage,
  params: Any,
  condition: jax.Array | None = None,
  branches: int = 1,
  join: Callable[[jax.Array, jax.Array], jax.Array] = lambda logits, t: logits,
) -> tuple[Callable[..., jax.Array], Callable[..., Any]]:
  """The network for `sampling.decode`: a function to logits, and one that reuses features where it can.

  Args:
    model: the network.
    params: its parameters.
    condition: see `Mage.code_logits`.
    branches: likewise.
    join: (logits [b * branches, q, codebook], t) -> logits [b, q, codebook].
  """

  def run(variables, *args, **options):
    return model.apply(variables, *args, branches=branches, method="code_logits", **options)

  def logits_fn(tokens, unknown, t):
    return join(run({"params": params}, tokens, unknown, condition=condition), t)

  def reusing_fn(tokens, unknown, t):
    first, cache = run({"params": params}, tokens, unknown, condition=condition, mutable=["cache"])

    def again(tokens, unknown, where, t):
      return join(run({"params": params, **cache}, tokens, unknown, where, cached=True), t)

    return join(first, t), again

  return logits_fn, reusing_fn
