"""Conditional MAGE: a frozen encoder and a decoder with a condition (Li et al. 2023, appendix A.2).

Letters: b batch, n tokens, k tokens visible to the encoder, l positions of the condition, c their width.
"""

import abc
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from maskgen import config as config_lib
from maskgen import objectives, sharding
from maskgen.errors import UserError
from maskgen.models.image_encoder import EncoderPart
from maskgen.models.mage import Mage, decoding_fns
from maskgen.models.transformer import embedding_init
from maskgen.numerics import sampling as sampling_lib
from maskgen.objectives import Batch, BatchSpec, Tree, mage

# The trained parameters of `Mage`; the others belong to the encoder.
_TRAINED = re.compile(r"(decoder|head|condition|layout)(_|$)")
# Folded into an example's key to decide on its condition; 0 and 1 are used for its mask.
_DROPOUT = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditional(mage.Objective, abc.ABC):
  """Trains `main`, the decoder and the parameters of its condition, on the latents of a frozen encoder.

  The encoder's features remain those of the pretrained model. The decoder is initialized from that model's.

  Attributes:
    condition_key: the key of a batch from which the condition is computed.
    condition_width: c.
    condition_dropout: the share of examples that are trained without their condition, which unconditional
      generation and guidance need.
    layout: see `Mage`; 0, as in the paper, for none.
  """

  condition_key: ClassVar[str]

  condition_width: int = 768
  condition_dropout: float = 0.1
  layout: int = 0

  def __post_init__(self):
    super().__post_init__()
    config_lib.check_at_least(self, 1, "condition_width")
    config_lib.check_at_least(self, 0, "layout")
    if self.embed_codes:
      raise UserError("embed_codes has no effect here: set it in the MAGE that the decoder starts from")
    config_lib.check_share(self, "condition_dropout")

  @property
  def model(self) -> Mage:
    """The network."""
    return super().model.clone(condition_width=self.condition_width, layout=self.layout)

  def batch_spec(self) -> BatchSpec:
    return dataclasses.replace(super().batch_spec(), num_classes=self.num_classes, captions=self.captions)

  @property
  def image_encoder(self) -> EncoderPart:
    return dataclasses.replace(super().image_encoder, params="frozen/encoder")

  def pretrained_shapes(self) -> dict[str, Tree]:
    tokenizer = super().pretrained_shapes()["tokenizer"]["params"]["generator"]
    tokens = jax.ShapeDtypeStruct((1, self.num_tokens), jnp.int32)
    mask = jax.ShapeDtypeStruct(tokens.shape, bool)
    main = jax.eval_shape(super().model.init, jax.random.key(0), tokens, mask)["params"]
    return {"mage": {"params": {"main": main}, "frozen": {"tokenizer": tokenizer}}}

  def check_pretrained(self, name: str, config: Mapping[str, Any]) -> None:
    found = objectives.build(config["objective"]) if "objective" in config else None
    if not isinstance(found, mage.Objective) or isinstance(found, Conditional):
      raise UserError(
        "it is not an unconditional MAGE: give a model trained with objective 'mage' or 'mage_c'"
      )
    objectives.check_tokenizer(found.tokenizer, self.tokenizer)
    encoder = ("class_ids", "null_class", "width", "depth", "heads", "fixed_positions", "add_visible")
    for field in ("image_size", *encoder, "decoder_width", "decoder_depth", "decoder_heads"):
      theirs, ours = getattr(found, field), getattr(self, field)
      if theirs != ours:
        raise UserError(f"its objective has {field}={theirs}, config.objective has {ours}: make them equal")

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    network_rng, condition_rng = jax.random.split(rng)
    tokens = jnp.zeros((1, self.num_tokens), jnp.int32)
    fresh = self.model.init(network_rng, tokens, tokens > 0)["params"]
    params = {**fresh, **pretrained["mage"]["params"]["main"]}
    main = {name: value for name, value in params.items() if _TRAINED.match(name)}
    main |= self._init_condition(condition_rng)
    encoder = {name: value for name, value in params.items() if not _TRAINED.match(name)}
    frozen = {"tokenizer": pretrained["mage"]["frozen"]["tokenizer"], "encoder": encoder}
    return {"params": {"main": main}, "frozen": frozen, "extra": {}}

  def network_params(self, params: Mapping[str, Tree], frozen: Tree) -> Tree:
    return {**frozen["encoder"], **params["main"]}

  @abc.abstractmethod
  def _init_condition(self, rng: jax.Array) -> dict[str, Tree]:
    """Returns newly initialized parameters of the condition."""

  @abc.abstractmethod
  def _condition(self, params: Mapping[str, Tree], batch: Batch) -> jax.Array:
    """The condition of each example, float32 [b, l, c]."""

  @abc.abstractmethod
  def _no_condition(self, params: Mapping[str, Tree]) -> jax.Array:
    """The condition of examples without one, float32 [1, l, c]."""

  def latents(
    self, params: Tree, frozen: Tree, tokens: jax.Array, mask: jax.Array, kept: Any = None, rng: Any = None
  ) -> jax.Array:
    # The encoder is not trained: no dropout in it.
    return super().latents(params, frozen, tokens, mask, kept)

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
    condition = nothing = jnp.repeat(self._no_condition(params), len(latents), axis=0)
    if self.condition_key in batch:
      condition = self._condition(params, batch)
    if rng is not None:
      drop = jax.vmap(self._drops)(batch["key"])
      condition = jnp.where(drop[:, None, None], nothing, condition)
    decoded = self.apply("decode", params, frozen, latents, mask, kept, condition, rng=rng)
    return decoded[:, 1:, : self.codebook_size]

  def _drops(self, key: jax.Array) -> jax.Array:
    """Whether the example with this key is trained without its condition, a bool scalar."""
    return jax.random.bernoulli(jax.random.fold_in(key, _DROPOUT), self.condition_dropout)

  def logits_fn(
    self, variables: Tree, batch: Batch, guidance: float | jax.Array, guidance_schedule: str
  ) -> sampling_lib.LogitsFn:
    return self._decoding_fns(variables, batch, guidance, guidance_schedule)[0]

  def reusing_fn(
    self, variables: Tree, batch: Batch, guidance: float | jax.Array, guidance_schedule: str
  ) -> sampling_lib.ReusingFn:
    return self._decoding_fns(variables, batch, guidance, guidance_schedule)[1]

  def _decoding_fns(
    self, variables: Tree, batch: Batch, guidance: float | jax.Array, guidance_schedule: str
  ) -> tuple[Any, Any]:
    params = variables["params"]
    network = self.model, self.network_params(params, variables["frozen"])
    nothing = jnp.repeat(self._no_condition(params), len(batch["key"]), axis=0)
    conditional, unconditional = sampling_lib.needed(guidance, guidance_schedule)
    if self.condition_key not in batch or not conditional:
      return decoding_fns(*network, nothing)
    condition = self._condition(params, batch)
    if not unconditional:
      return decoding_fns(*network, condition)
    both = jnp.stack([condition, nothing], axis=1).reshape(-1, *condition.shape[1:])

    def guided(logits: jax.Array, t: jax.Array) -> jax.Array:
      logits = logits.reshape(-1, 2, *logits.shape[1:])
      return sampling_lib.guide(
        logits[:, 0], logits[:, 1], t, guidance=guidance, guidance_schedule=guidance_schedule
      )

    return decoding_fns(*network, both, 2, guided)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(Conditional):
  """Class-conditional MAGE: the condition is an embedding of the class.

  Attributes:
    classes: the number of classes; labels start at 0.
  """

  condition_key: ClassVar[str] = "label"

  classes: int

  def __post_init__(self):
    super().__post_init__()
    config_lib.check_at_least(self, 1, "classes")

  @property
  def num_classes(self) -> int:
    return self.classes

  def _init_condition(self, rng: jax.Array) -> dict[str, Tree]:
    # The last row means no class.
    return {"class_embedding": embedding_init(rng, (self.classes + 1, self.condition_width))}

  def _condition(self, params: Mapping[str, Tree], batch: Batch) -> jax.Array:
    return sharding.gather(params["main"]["class_embedding"])[batch["label"]][:, None]

  def _no_condition(self, params: Mapping[str, Tree]) -> jax.Array:
    return params["main"]["class_embedding"][None, -1:]
