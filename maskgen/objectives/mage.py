"""The MAGE objective: masked prediction of image codes with a variable ratio (Li et al. 2023, section 3)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from maskgen import config as config_lib
from maskgen import images as images_lib
from maskgen.config import fields
from maskgen.errors import UserError
from maskgen.models.image_encoder import EncoderPart, MageEncoder
from maskgen.models.mage import Encoder, Mage, Prediction, decoding_fns
from maskgen.models.remat import REMAT, check_remat
from maskgen.models.transformer import check_attention
from maskgen.models.vqgan import VQGAN
from maskgen.numerics import losses as losses_lib
from maskgen.numerics import masking
from maskgen.numerics import sampling as sampling_lib
from maskgen.numerics.positions import Positions
from maskgen.numerics.text import Captions
from maskgen.numerics.vocab import Vocab
from maskgen.objectives import (
  Batch,
  BatchSpec,
  Metrics,
  PredictFn,
  Tree,
  check_image_size,
  token_fns,
)

# The root mean square length of rows that start as codes; 1 and 3 began to learn as fast.
_CODE_LENGTH = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """Trains `main`, the encoder and decoder, on the codes of a frozen tokenizer.

  Attributes:
    image_size: (h, w) of the images.
    tokenizer: the tokenizer's network; its weights come from `config.pretrained.tokenizer`.
    class_ids, null_class: the number of rows between the codes and [MASK] in the embedding table, and the
      one that the class position holds. A converted model keeps the reference's values; see `Vocab`.
    width, depth, heads, decoder_width, decoder_depth, decoder_heads, dropout, dtype: see `Mage`.
    attention, remat, scan: how the network runs; results do not depend on these. See `Transformer`.
    fixed_positions: whether the encoder has fixed position embeddings beside learned ones, as LEASE's.
    add_visible: see `Mage`; as LEASE's decoder.
    mask_ratio: the distribution of the mask ratio.
    label_smoothing: of the cross-entropy over the codes.
    embed_codes: whether the embedding table, which is also the output layer, starts from the tokenizer's
      codes, so that similar codes start similar. The paper's starts random, from which a large codebook
      needs much data.
    sampling: default options of generation and inpainting.
  """

  serving: ClassVar[str] = "maskgen.serving.TokenModel"
  captions: ClassVar[Captions | None] = None

  image_size: tuple[int, int]
  tokenizer: VQGAN = VQGAN()
  class_ids: int = 1
  null_class: int = 0
  width: int = 768
  depth: int = 12
  heads: int = 12
  decoder_width: int = 768
  decoder_depth: int = 8
  decoder_heads: int = 16
  dropout: float = 0.1
  dtype: str = fields.precision("float32")
  attention: str = fields.operational("auto", plain="xla")
  remat: str = fields.operational("none", less_memory=REMAT[1:])
  scan: bool = fields.operational(False)
  fixed_positions: bool = False
  add_visible: bool = False
  mask_ratio: masking.MaskRatio = masking.MaskRatio()
  label_smoothing: float = 0.1
  embed_codes: bool = False
  sampling: sampling_lib.MaskedSampling = sampling_lib.MaskedSampling()

  def __post_init__(self):
    check_image_size(self.image_size)
    sizes = ("width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads")
    config_lib.check_at_least(self, 1, *sizes, "class_ids")
    if not 0 <= self.null_class < self.class_ids:
      raise UserError(
        f"null_class is {self.null_class}: with class_ids={self.class_ids}, give 0 to {self.class_ids - 1}"
      )
    config_lib.check_dtype(self.dtype)
    check_attention(self.attention, self.dtype, self.dropout)
    check_remat(self.remat)
    config_lib.check_share(self, "dropout", "label_smoothing")
    for width, heads in ((self.width, self.heads), (self.decoder_width, self.decoder_heads)):
      if width % heads:
        raise UserError(f"a width of {width} does not divide into {heads} heads")
    if self.fixed_positions and self.width % 4:
      raise UserError(f"width is {self.width}: fixed positions need a multiple of 4")
    if masking.num_dropped(self.num_tokens, self.mask_ratio) >= self.num_tokens:
      raise UserError(
        f"mask_ratio.low={self.mask_ratio.low} leaves the encoder none of {self.num_tokens} tokens: lower it"
      )
    if self.sampling.guidance != 1 and not self.num_classes and self.captions is None:
      raise UserError(
        f"sampling.guidance is {self.sampling.guidance}: guidance needs a model with classes or captions, "
        "leave it out"
      )

  @property
  def codebook_size(self) -> int:
    return self.tokenizer.codebook_size

  def tokenizer_params(self, variables: Tree) -> Tree:
    return variables["frozen"]["tokenizer"]

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return (*self.image_size, self.tokenizer.image_channels)

  @property
  def num_classes(self) -> int:
    return 0

  @property
  def grid(self) -> tuple[int, int]:
    """The token grid (h', w')."""
    return self.tokenizer.token_grid(self.image_shape)

  @property
  def num_tokens(self) -> int:
    return self.grid[0] * self.grid[1]

  @property
  def model(self) -> Mage:
    """The network."""
    return Mage(
      vocab=Vocab(self.codebook_size, self.class_ids, self.null_class),
      num_tokens=self.num_tokens,
      width=self.width,
      depth=self.depth,
      heads=self.heads,
      decoder_width=self.decoder_width,
      decoder_depth=self.decoder_depth,
      decoder_heads=self.decoder_heads,
      dropout=self.dropout,
      dtype=self.dtype,
      attention=self.attention,
      remat=self.remat,
      scan=self.scan,
      fixed_grid=self.grid if self.fixed_positions else None,
      add_visible=self.add_visible,
    )

  def batch_spec(self) -> BatchSpec:
    return BatchSpec(
      image_shape=self.image_shape, num_tokens=self.num_tokens, codebook_size=self.codebook_size
    )

  @property
  def image_encoder(self) -> EncoderPart:
    """The encoder, which other objectives can use."""
    network = Encoder(**{name: getattr(self.model, name) for name in fields.of(Encoder)} | {"dropout": 0.0})
    return EncoderPart(MageEncoder(network, self.tokenizer, self.image_size), "params/main")

  def pretrained_shapes(self) -> dict[str, Tree]:
    return {"tokenizer": token_fns.tokenizer_shapes(self.tokenizer, self.image_shape)}

  def check_pretrained(self, name: str, config: Mapping[str, Any]) -> None:
    token_fns.check_pretrained_tokenizer(config, self.tokenizer)

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    tokens = jnp.zeros((1, self.num_tokens), jnp.int32)
    params = self.model.init(rng, tokens, tokens > 0)["params"]
    tokenizer = pretrained["tokenizer"]["params"]["generator"]
    if self.embed_codes:
      table = self._embed_codes(jax.random.fold_in(rng, 0), tokenizer, params["embedding"])
      params = {**params, "embedding": table}
    return {"params": {"main": params}, "frozen": {"tokenizer": tokenizer}, "extra": {}}

  def _embed_codes(self, rng: jax.Array, tokenizer: Tree, table: jax.Array) -> jax.Array:
    """The embedding table [v, d] with a random projection of the tokenizer's codes in its first rows."""
    codes: Any = self.tokenizer.apply({"params": tokenizer}, method="codes")
    codes = codes - codes.mean(axis=0)[None]
    length = jnp.sqrt(jnp.square(codes).sum(axis=-1).mean())
    projection = jax.random.normal(rng, (codes.shape[1], self.width)) / self.width**0.5
    embedded = table.at[: self.codebook_size].set(_CODE_LENGTH / length * codes @ projection)
    return jnp.where(length > 0, embedded, table)  # a baseline without a tokenizer has codes of zeros

  def positions(self) -> dict[str, Positions]:
    return dict.fromkeys(("main/position", "main/decoder_position"), Positions(self.grid, leading=1))

  def losses(
    self,
    params: Mapping[str, Tree],
    frozen: Tree,
    model_state: Tree,
    batch: Batch,
    rng: jax.Array,
    step: jax.Array,
    *,
    train: bool,
  ) -> tuple[dict[str, jax.Array], Metrics, Tree]:
    found = self.predict_masked(params, frozen, batch, rng if train else None)
    values = self.scores(params, frozen, batch, found)
    metrics = {name: value.mean() for name, value in values.items() if name != "loss"}
    return {"main": values["loss"].mean()}, metrics, model_state

  def predict_masked(self, params: Tree, frozen: Tree, batch: Batch, rng: Any = None) -> Prediction:
    """Masks the codes of a batch with its keys and predicts them; dropout is on if `rng` is given."""
    tokens = self.codes(frozen, batch)
    mask, kept = masking.random_mask(batch["key"], self.num_tokens, self.mask_ratio)
    latents = self.latents(params, frozen, tokens, mask, kept, rng)
    logits = self.logits(params, frozen, batch, latents, mask, kept, rng)
    return Prediction(tokens, mask, kept, latents, logits)

  def codes(self, frozen: Tree, batch: Batch) -> jax.Array:
    """The codes of a batch, int32 [b, n]."""
    if "tokens" in batch:
      return batch["tokens"].astype(jnp.int32)
    pixels = images_lib.to_float(batch["image"])
    tokens: Any = self.tokenizer.apply({"params": frozen["tokenizer"]}, pixels, method="tokenize")
    return jax.lax.stop_gradient(tokens)

  def latents(
    self, params: Tree, frozen: Tree, tokens: jax.Array, mask: jax.Array, kept: Any = None, rng: Any = None
  ) -> jax.Array:
    """The encoder's output [b, 1 + k, d], see `Mage.encode`; dropout is on if `rng` is given."""
    return self.apply("encode", params, frozen, tokens, mask, kept, rng=rng)

  def logits(
    self,
    params: Mapping[str, Tree],
    frozen: Tree,
    batch: Batch,
    latents: jax.Array,
    mask: jax.Array,
    kept: jax.Array | None = None,
    rng: jax.Array | None = None,
  ) -> jax.Array:
    """The decoder's logits over the codes, float32 [b, n, codebook]; dropout is on if `rng` is given."""
    return self.apply("decode", params, frozen, latents, mask, kept, rng=rng)[:, 1:, : self.codebook_size]

  def scores(self, params: Mapping[str, Tree], frozen: Tree, batch: Batch, found: Prediction) -> Metrics:
    """Values [b] for training and validation: `loss`, whose mean is minimized, and metrics.

    To add a head, add its parameters to the group `main` in `init` and override this method: predict from
    `found.latents` and return the values of `super()` with the head's loss added to `loss`.
    """
    loss = losses_lib.cross_entropy(found.logits, found.tokens, self.label_smoothing)
    correct = (found.logits.argmax(axis=-1) == found.tokens).astype(jnp.float32)
    return {
      "loss": losses_lib.masked_mean(loss, found.mask),
      "accuracy": losses_lib.masked_mean(correct, found.mask),
      "mask_ratio": found.mask.mean(axis=-1),
    }

  def apply(
    self, method: str, params: Mapping[str, Tree], frozen: Tree, *args: Any, rng: jax.Array | None = None
  ) -> Any:
    """Calls a method of the network; dropout is on if `rng` is given."""
    variables = {"params": self.network_params(params, frozen)}
    if rng is None:
      return self.model.apply(variables, *args, method=method)
    return self.model.apply(variables, *args, train=True, rngs={"dropout": rng}, method=method)

  def network_params(self, params: Mapping[str, Tree], frozen: Tree) -> Tree:
    """All parameters of `model`."""
    return params["main"]

  def logits_fn(
    self, variables: Tree, batch: Batch, guidance: float | jax.Array, guidance_schedule: str
  ) -> sampling_lib.LogitsFn:
    """The logits function for `sampling.decode`; without a condition, guidance has no effect."""
    return lambda tokens, unknown, t: self._logits(variables, batch, tokens, unknown)

  def _logits(self, variables: Tree, batch: Batch, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    params, frozen = variables["params"], variables["frozen"]
    return self.logits(params, frozen, batch, self.latents(params, frozen, tokens, mask), mask)

  def reusing_fn(
    self, variables: Tree, batch: Batch, guidance: float | jax.Array, guidance_schedule: str
  ) -> sampling_lib.ReusingFn:
    """Like `logits_fn`, the function for `sampling.decode` that reuses features."""
    return decoding_fns(self.model, self.network_params(variables["params"], variables["frozen"]))[1]

  def predict_fns(self) -> dict[str, PredictFn]:
    def loss(variables, batch, rng):
      batch = {**batch, "key": jax.random.split(rng, jax.tree.leaves(batch)[0].shape[0])}
      params, frozen = variables["params"], variables["frozen"]
      return self.scores(params, frozen, batch, self.predict_masked(params, frozen, batch))

    def mask(variables, batch, rng):
      drawn, _ = masking.random_mask(batch["key"], self.num_tokens, self.mask_ratio)
      return drawn.reshape(-1, *self.grid)

    def logits(variables, batch, rng):
      return self._logits(variables, batch, batch["tokens"], batch["token_mask"])

    codes = token_fns.tokenizer_fns(self.tokenizer, self.image_shape, self.tokenizer_params)
    sampled = token_fns.sampling_fns(self, codes["encode"], codes["decode"])
    own = {"loss": loss, "mask": mask, "logits": logits}
    return own | self.image_encoder.predict_fns() | codes | sampled
