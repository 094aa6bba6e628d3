"""MaskGIT: masked prediction of image codes, given the class (Chang et al. 2022, section 3)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from maskgen import config as config_lib
from maskgen import images as images_lib
from maskgen.config import fields
from maskgen.errors import UserError
from maskgen.models.maskgit import MaskGit
from maskgen.models.remat import REMAT, check_remat
from maskgen.models.transformer import check_attention
from maskgen.models.vqgan import VQGAN
from maskgen.numerics import losses as losses_lib
from maskgen.numerics import masking
from maskgen.numerics import sampling as sampling_lib
from maskgen.numerics.positions import Positions
from maskgen.numerics.vocab import Vocab
from maskgen.objectives import Batch, BatchSpec, Metrics, PredictFn, Tree, check_image_size, token_fns

# Folded into an example's key to decide on its class; 0 and 1 are used for its mask.
_DROPOUT = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """Trains `main`, a transformer, on the codes of a frozen tokenizer.

  Attributes:
    image_size: (h, w) of the images.
    tokenizer: the tokenizer's network; its weights come from `config.pretrained.tokenizer`.
    classes: the number of classes; labels start at 0.
    width, depth, heads, hidden, dropout, dtype: see `MaskGit`.
    attention, remat, scan: how the network runs; results do not depend on these. See `Transformer`.
    condition_dropout: the share of examples that are trained without their class, which unconditional
      generation and guidance need. The published models have none.
    label_smoothing: of the cross-entropy over the codes.
    sampling: default options of generation and inpainting.
  """

  serving: ClassVar[str] = "maskgen.serving.TokenModel"
  captions: ClassVar[None] = None

  image_size: tuple[int, int]
  tokenizer: VQGAN = VQGAN()
  classes: int
  width: int = 768
  depth: int = 24
  heads: int = 16
  hidden: int = 0
  dropout: float = 0.1
  dtype: str = fields.precision("float32")
  attention: str = fields.operational("auto", plain="xla")
  remat: str = fields.operational("none", less_memory=REMAT[1:])
  scan: bool = fields.operational(False)
  condition_dropout: float = 0.1
  label_smoothing: float = 0.1
  sampling: sampling_lib.MaskedSampling = sampling_lib.MaskedSampling()

  def __post_init__(self):
    check_image_size(self.image_size)
    config_lib.check_at_least(self, 1, "classes", "width", "depth", "heads")
    config_lib.check_at_least(self, 0, "hidden")
    config_lib.check_dtype(self.dtype)
    check_attention(self.attention, self.dtype, self.dropout)
    check_remat(self.remat)
    config_lib.check_share(self, "dropout", "condition_dropout", "label_smoothing")
    if self.width % self.heads:
      raise UserError(f"a width of {self.width} does not divide into {self.heads} heads")
    if self.sampling.guidance != 1 and not self.condition_dropout:
      raise UserError(
        f"sampling.guidance is {self.sampling.guidance}: guidance needs a model that is trained with "
        "condition_dropout, leave it out"
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
    return self.classes

  @property
  def grid(self) -> tuple[int, int]:
    """The token grid (h', w')."""
    return self.tokenizer.token_grid(self.image_shape)

  @property
  def num_tokens(self) -> int:
    return self.grid[0] * self.grid[1]

  @property
  def model(self) -> MaskGit:
    """The network."""
    return MaskGit(
      vocab=Vocab(self.codebook_size, self.classes),
      num_tokens=self.num_tokens,
      width=self.width,
      depth=self.depth,
      heads=self.heads,
      hidden=self.hidden,
      dropout=self.dropout,
      dtype=self.dtype,
      attention=self.attention,
      remat=self.remat,
      scan=self.scan,
    )

  def batch_spec(self) -> BatchSpec:
    return BatchSpec(
      image_shape=self.image_shape,
      num_tokens=self.num_tokens,
      codebook_size=self.codebook_size,
      num_classes=self.classes,
    )

  def pretrained_shapes(self) -> dict[str, Tree]:
    return {"tokenizer": token_fns.tokenizer_shapes(self.tokenizer, self.image_shape)}

  def check_pretrained(self, name: str, config: Mapping[str, Any]) -> None:
    token_fns.check_pretrained_tokenizer(config, self.tokenizer)

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    tokens = jnp.zeros((1, self.num_tokens), jnp.int32)
    params = self.model.init(rng, tokens, tokens > 0, tokens[:, 0])["params"]
    tokenizer = pretrained["tokenizer"]["params"]["generator"]
    return {"params": {"main": params}, "frozen": {"tokenizer": tokenizer}, "extra": {}}

  def positions(self) -> dict[str, Positions]:
    return {"main/position": Positions(self.grid, leading=1)}

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
    values = self._scores(params, frozen, batch, rng if train else None)
    metrics = {name: value.mean() for name, value in values.items() if name != "loss"}
    return {"main": values["loss"].mean()}, metrics, model_state

  def _scores(self, params: Tree, frozen: Tree, batch: Batch, rng: jax.Array | None = None) -> Metrics:
    """Values [b] for training, if `rng` is given, and validation: `loss` and metrics."""
    tokens, label = self._codes(frozen, batch), batch["label"]
    mask, _ = masking.random_mask(batch["key"], self.num_tokens, masking.CosineRatio())
    if rng is not None:
      label = jnp.where(jax.vmap(self._drops)(batch["key"]), self.classes, label)
    logits = self._apply(params, tokens, mask, label, rng)
    loss = losses_lib.cross_entropy(logits, tokens, self.label_smoothing)
    correct = (logits.argmax(axis=-1) == tokens).astype(jnp.float32)
    return {
      "loss": losses_lib.masked_mean(loss, mask),
      "accuracy": losses_lib.masked_mean(correct, mask),
      "mask_ratio": mask.mean(axis=-1),
    }

  def _drops(self, key: jax.Array) -> jax.Array:
    """Whether the example with this key is trained without its class, a bool scalar."""
    return jax.random.bernoulli(jax.random.fold_in(key, _DROPOUT), self.condition_dropout)

  def _codes(self, frozen: Tree, batch: Batch) -> jax.Array:
    """The codes of a batch, int32 [b, n]."""
    if "tokens" in batch:
      return batch["tokens"].astype(jnp.int32)
    pixels = images_lib.to_float(batch["image"])
    tokens: Any = self.tokenizer.apply({"params": frozen["tokenizer"]}, pixels, method="tokenize")
    return jax.lax.stop_gradient(tokens)

  def _apply(self, params: Tree, tokens: Any, mask: Any, label: Any, rng: jax.Array | None = None) -> Any:
    """Logits float32 [b, n, codebook]; dropout is on if `rng` is given."""
    rngs = None if rng is None else {"dropout": rng}
    return self.model.apply({"params": params["main"]}, tokens, mask, label, train=rng is not None, rngs=rngs)

  def _label(self, batch: Batch, size: int) -> jax.Array:
    """The classes of a batch, int32 [b]; without any, no class."""
    if "label" in batch:
      return batch["label"]
    if not self.condition_dropout:
      raise UserError("this model was only trained with classes: give a label")
    return jnp.full((size,), self.classes, jnp.int32)

  def logits_fn(
    self, variables: Tree, batch: Batch, guidance: float | jax.Array, guidance_schedule: str
  ) -> sampling_lib.LogitsFn:
    """The logits function for `sampling.decode`, guided by the labels in `batch`."""
    params = variables["params"]
    conditional, unconditional = sampling_lib.needed(guidance, guidance_schedule)
    given = batch if conditional else {}

    def plain(tokens: jax.Array, unknown: jax.Array, t: jax.Array) -> jax.Array:
      return self._apply(params, tokens, unknown, self._label(given, len(tokens)))

    def guided(tokens: jax.Array, unknown: jax.Array, t: jax.Array) -> jax.Array:
      both = jnp.stack([batch["label"], jnp.full_like(batch["label"], self.classes)], axis=1).reshape(-1)
      logits = self._apply(params, jnp.repeat(tokens, 2, axis=0), jnp.repeat(unknown, 2, axis=0), both)
      logits = logits.reshape(-1, 2, *logits.shape[1:])
      return sampling_lib.guide(
        logits[:, 0], logits[:, 1], t, guidance=guidance, guidance_schedule=guidance_schedule
      )

    return guided if "label" in given and unconditional else plain

  def reusing_fn(
    self, variables: Tree, batch: Batch, guidance: float | jax.Array, guidance_schedule: str
  ) -> None:
    """Not supported."""

  def predict_fns(self) -> dict[str, PredictFn]:
    def loss(variables, batch, rng):
      batch = {**batch, "key": jax.random.split(rng, jax.tree.leaves(batch)[0].shape[0])}
      return self._scores(variables["params"], variables["frozen"], batch)

    def mask(variables, batch, rng):
      drawn, _ = masking.random_mask(batch["key"], self.num_tokens, masking.CosineRatio())
      return drawn.reshape(-1, *self.grid)

    def logits(variables, batch, rng):
      label = self._label(batch, len(batch["tokens"]))
      return self._apply(variables["params"], batch["tokens"], batch["token_mask"], label)

    codes = token_fns.tokenizer_fns(self.tokenizer, self.image_shape, self.tokenizer_params)
    sampled = token_fns.sampling_fns(self, codes["encode"], codes["decode"])
    return {fn.__name__: fn for fn in (loss, mask, logits)} | codes | sampled
