"""MaskGIT: one bidirectional transformer over all tokens and their class (Chang et al. 2022, section 3.2).

Letters: b batch, n tokens, d width, v vocabulary. Position 0 of every sequence is the class.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen import sharding
from maskgen.config import fields
from maskgen.models.remat import REMAT
from maskgen.models.transformer import Dropout, Transformer, embedding_init, kernel_init
from maskgen.numerics.vocab import Vocab

_EPSILON = 1e-12  # BERT's


class MaskGit(nn.Module):
  """BERT with a head that is tied to the embedding; the defaults are those of the published models.

  Attributes:
    vocab: the token ids; [MASK] at the class position means no class.
    num_tokens: n.
    width, depth, heads: of the transformer.
    hidden: width inside the MLPs, by default 4 d.
    dropout: on embeddings, attention weights, projections and MLPs, during training.
    dtype: the type of the computation; parameters and logits are float32.
    attention, remat, scan: how the blocks are run, see `Transformer`.
  """

  vocab: Vocab
  num_tokens: int
  width: int = 768
  depth: int = 24
  heads: int = 16
  hidden: int = 0
  dropout: float = 0.1
  dtype: str = fields.precision("float32")
  attention: str = fields.operational("auto", plain="xla")
  remat: str = fields.operational("none", less_memory=REMAT[1:])
  scan: bool = fields.operational(False)

  def setup(self):
    def norm() -> nn.LayerNorm:
      return nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype)

    self.embedding = self.param("embedding", embedding_init, (self.vocab.size, self.width))
    self.position = self.param("position", embedding_init, (1 + self.num_tokens, self.width))
    self.embedding_norm = norm()
    self.embedding_dropout = Dropout(self.dropout)
    self.encoder = Transformer(
      self.depth,
      self.heads,
      self.dropout,
      self.dtype,
      self.attention,
      self.remat,
      self.scan,
      hidden=self.hidden,
      activation="gelu_tanh",
      post_norm=True,
      epsilon=_EPSILON,
    )
    self.head = nn.Dense(self.width, kernel_init=kernel_init, dtype=self.dtype)
    self.head_norm = norm()
    self.head_bias = self.param("head_bias", nn.initializers.zeros, (self.vocab.size,))

  def __call__(
    self, tokens: jax.Array, mask: jax.Array, label: jax.Array, *, train: bool = False
  ) -> jax.Array:
    """Logits over the codes.

    Args:
      tokens: int32 [b, n], codes.
      mask: bool [b, n], True where a code is hidden.
      label: int32 [b], classes; the number of classes means no class.
      train: whether dropout is on.

    Returns:
      float32 [b, n, codebook].
    """
    ids = jnp.where(mask, self.vocab.mask_id, tokens)
    ids = jnp.concatenate([self.vocab.codebook + label[:, None], ids], axis=1)
    embedding, position = sharding.gather((self.embedding, self.position))
    x = sharding.constrain_batch((embedding[ids] + position[None]).astype(self.dtype))
    x = self.encoder(self.embedding_dropout(self.embedding_norm(x), train=train), train=train)[:, 1:]
    x = self.head_norm(nn.gelu(sharding.constrain_batch(self.head(x.reshape(-1, self.width)))))
    table = embedding[: self.vocab.codebook].astype(x.dtype)
    logits = jnp.einsum("nd,vd->nv", x, table, preferred_element_type=jnp.float32)
    logits = logits + self.head_bias[None, : self.vocab.codebook]
    return logits.reshape(len(tokens), -1, self.vocab.codebook)
