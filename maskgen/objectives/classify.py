"""Linear probing and fine-tuning of a MAGE encoder (Li et al. 2023, section 4.2 and appendix B)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen import config as config_lib
from maskgen import images as images_lib
from maskgen import objectives
from maskgen.config import fields
from maskgen.errors import UserError, nearest
from maskgen.models.mage import Encoder
from maskgen.models.remat import REMAT, check_remat
from maskgen.models.transformer import check_attention
from maskgen.models.vqgan import VQGAN
from maskgen.numerics import losses as losses_lib
from maskgen.numerics import mixing
from maskgen.numerics.positions import Positions
from maskgen.numerics.vocab import Vocab
from maskgen.objectives import Batch, BatchSpec, Metrics, PredictFn, Tree, check_image_size, mage

TRAINED = ("all", "head")
NORMS = ("layer", "batch")
# The encoder's part of MAGE's parameters; classifying leaves its final normalisation out.
ENCODER = ("embedding", "position", "embedding_norm", "encoder")


class Head(nn.Module):
  """From pooled tokens to logits.

  Attributes:
    classes: k.
    norm: "layer" is LayerNorm with scale and bias; "batch" is LayerNorm, then BatchNorm, both without.
    std: of the kernel's truncated normal initialisation.
  """

  classes: int
  norm: str
  std: float

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:  # [b, d] -> [b, k]
    if self.norm == "layer":
      x = nn.LayerNorm(epsilon=1e-6, name="norm")(x)
    else:
      x = nn.standardize(x, axis=-1, epsilon=1e-6)
      x = nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-6,
        use_bias=False,
        use_scale=False,
        use_fast_variance=False,
        name="batch_norm",
      )(x)
    init = nn.initializers.truncated_normal(self.std)
    return nn.Dense(self.classes, kernel_init=init, name="logits")(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """Trains `main`, a head on the mean of the encoder's tokens, and the encoder with it or not.

  No token is masked. With `trained="head"` the encoder is frozen and runs without dropout. Batch
  normalisation takes its statistics from the whole global batch, or, under accumulation, from each
  micro-batch, as the reference does on each device; evaluation uses their running averages.

  Attributes:
    image_size: (h, w) of the images.
    classes: how many classes the data has.
    tokenizer, class_ids, null_class, width, depth, heads: the networks of `config.pretrained.mage`, where
      their weights come from, see `maskgen.objectives.mage`.
    trained: "all", or "head" for a linear probe.
    norm: of the pooled features: "layer", or "batch" (on top of it), as is customary for a linear probe.
    dropout, drop_path: of the encoder, see `Transformer`.
    label_smoothing: of the cross-entropy.
    mixup, cutmix: alphas of `maskgen.numerics.mixing`, on pixels; 0 is off. With both, each example
      draws one.
    dtype, attention, remat, scan: how the encoder is run, see `Transformer`.
  """

  serving: ClassVar[str] = "maskgen.serving.Classifier"

  image_size: tuple[int, int]
  classes: int
  tokenizer: VQGAN = VQGAN()
  class_ids: int = 1
  null_class: int = 0
  width: int = 768
  depth: int = 12
  heads: int = 12
  trained: str = "all"
  norm: str = "layer"
  dropout: float = 0.0
  drop_path: float = 0.0
  label_smoothing: float = 0.0
  mixup: float = 0.0
  cutmix: float = 0.0
  dtype: str = fields.precision("float32")
  attention: str = fields.operational("auto", plain="xla")
  remat: str = fields.operational("none", less_memory=REMAT[1:])
  scan: bool = fields.operational(False)

  def __post_init__(self):
    check_image_size(self.image_size)
    config_lib.check_at_least(self, 2, "classes")
    config_lib.check_at_least(self, 1, "width", "depth", "heads")
    config_lib.check_at_least(self, 0, "mixup", "cutmix")
    config_lib.check_dtype(self.dtype)
    check_attention(self.attention, self.dtype, self.dropout)
    check_remat(self.remat)
    config_lib.check_share(self, "dropout", "drop_path", "label_smoothing")
    for name, choices in (("trained", TRAINED), ("norm", NORMS)):
      value = getattr(self, name)
      if value not in choices:
        raise UserError(f"{name} '{value}' does not exist{nearest(value, choices)}")
    if self.trained == "head" and (self.dropout or self.drop_path):
      raise UserError("a frozen encoder runs without dropout and drop_path: set both to 0")
    if self.width % self.heads:
      raise UserError(f"a width of {self.width} does not divide into {self.heads} heads")

  @property
  def num_classes(self) -> int:
    return self.classes

  @property
  def captions(self) -> None:
    return None

  @property
  def codebook_size(self) -> int:
    return self.tokenizer.codebook_size

  def tokenizer_params(self, variables: Tree) -> Tree:
    return variables["frozen"]["tokenizer"]

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return (*self.image_size, self.tokenizer.image_channels)

  @property
  def grid(self) -> tuple[int, int]:
    """The token grid (h', w')."""
    return self.tokenizer.token_grid(self.image_shape)

  @property
  def encoder(self) -> Encoder:
    """The network below the head."""
    return Encoder(
      vocab=Vocab(self.codebook_size, self.class_ids, self.null_class),
      num_tokens=self.grid[0] * self.grid[1],
      width=self.width,
      depth=self.depth,
      heads=self.heads,
      dropout=self.dropout,
      dtype=self.dtype,
      attention=self.attention,
      remat=self.remat,
      scan=self.scan,
      drop_path=self.drop_path,
    )

  @property
  def head(self) -> Head:
    """The network that is new; its initialisations are those of the reference's two recipes."""
    return Head(self.classes, self.norm, std=0.01 if self.trained == "head" else 2e-5)

  def batch_spec(self) -> BatchSpec:
    num_tokens = 0 if self.mixup or self.cutmix else self.encoder.num_tokens  # those mix pixels
    return BatchSpec(
      image_shape=self.image_shape,
      num_tokens=num_tokens,
      codebook_size=self.codebook_size,
      num_classes=self.classes,
    )

  def pretrained_shapes(self) -> dict[str, Tree]:
    def init(rng: jax.Array) -> Tree:
      tokenizer = self.tokenizer.init(rng, jnp.zeros((1, *self.image_shape)))["params"]
      tokens = jnp.zeros((1, self.encoder.num_tokens), jnp.int32)
      encoder = self.encoder.init(rng, tokens, method="pool")["params"]
      return {"params": {"main": encoder}, "frozen": {"tokenizer": tokenizer}}

    return {"mage": jax.eval_shape(init, jax.random.key(0))}

  def check_pretrained(self, name: str, config: Mapping[str, Any]) -> None:
    found = objectives.build(config["objective"]) if "objective" in config else None
    if not isinstance(found, mage.Objective):
      raise UserError("it is no masked generative encoder: give a model trained by the mage objective")
    for field in ("image_size", "class_ids", "null_class", "width", "depth", "heads"):
      theirs, ours = getattr(found, field), getattr(self, field)
      if theirs != ours:
        raise UserError(f"it has {field}={theirs}, config.objective has {ours}: make them equal")
    objectives.check_tokenizer(found.tokenizer, self.tokenizer)
    shapes = jax.eval_shape(found.init, jax.random.key(0), found.pretrained_shapes())
    if not set(ENCODER) <= shapes["params"]["main"].keys():
      origin = config.get("pretrained", {}).get("mage", "the model it was made from")
      raise UserError(f"its encoder was frozen: give {origin}, which has the same one")

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    encoder = pretrained["mage"]["params"]["main"]
    head = self.head.init(rng, jnp.zeros((1, self.width)), train=False)
    frozen, params = pretrained["mage"]["frozen"], {"head": head["params"]}
    if self.trained == "head":
      frozen = {**frozen, "encoder": encoder}
    else:
      params = {**encoder, **params}
    return {"params": {"main": params}, "frozen": frozen, "extra": head.get("batch_stats", {})}

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
    targets = jax.nn.one_hot(batch["label"], self.classes)
    if train:
      batch, targets = self._mix(batch, targets)
    pooled = self._pool(params["main"], frozen, batch, rng, train=train)
    logits, model_state = self._logits(params["main"], model_state, pooled, train=train)
    values = self._compare(logits, targets)
    return {"main": values["loss"].mean()}, {"accuracy": values["accuracy"].mean()}, model_state

  def _mix(self, batch: Batch, targets: jax.Array) -> tuple[Batch, jax.Array]:
    """Mixes images and targets [b, k], each example by its own key."""
    if not self.mixup and not self.cutmix:
      return batch, targets
    pixels, keys = images_lib.to_float(batch["image"]), batch["key"]
    if self.mixup and self.cutmix:
      mixed = mixing.mixup_or_cutmix(keys, pixels, targets, self.mixup, self.cutmix)
    elif self.mixup:
      mixed = mixing.mixup(keys, pixels, targets, self.mixup)
    else:
      mixed = mixing.cutmix(keys, pixels, targets, self.cutmix)
    return {**batch, "image": mixed[0]}, mixed[1]

  def _compare(self, logits: jax.Array, targets: jax.Array) -> Metrics:
    """Loss and accuracy, each [b]; of mixed targets the larger is the right one."""
    smooth = (1.0 - self.label_smoothing) * targets + self.label_smoothing / self.classes
    correct = logits.argmax(axis=-1) == targets.argmax(axis=-1)
    loss = losses_lib.soft_cross_entropy(logits, smooth)
    return {"loss": loss, "accuracy": correct.astype(jnp.float32)}

  def _pool(self, params: Tree, frozen: Tree, batch: Batch, rng: jax.Array, *, train: bool) -> jax.Array:
    """The encoder's mean token, float32 [b, d]."""
    if "tokens" in batch:
      tokens = batch["tokens"].astype(jnp.int32)
    else:
      tokens = self._tokenize(frozen, batch["image"])
    train = train and self.trained == "all"
    variables = {"params": self._encoder_params(params, frozen)}
    rngs = {"dropout": rng} if train else None
    pooled: Any = self.encoder.apply(variables, tokens, train=train, rngs=rngs, method="pool")
    return pooled

  def _encoder_params(self, params: Tree, frozen: Tree) -> Tree:
    return {name: (frozen["encoder"] if self.trained == "head" else params)[name] for name in ENCODER}

  def _logits(
    self, params: Tree, model_state: Tree, pooled: jax.Array, *, train: bool
  ) -> tuple[jax.Array, Tree]:
    """Logits float32 [b, k], and the new running statistics."""
    variables = {"params": params["head"], "batch_stats": model_state}
    logits: Any
    logits, changed = self.head.apply(variables, pooled, train=train, mutable=["batch_stats"])
    return logits, changed.get("batch_stats", model_state)

  def _tokenize(self, frozen: Tree, images: jax.Array) -> Any:
    pixels = images_lib.to_float(images)
    return self.tokenizer.apply({"params": frozen["tokenizer"]}, pixels, method="tokenize")

  def predict_fns(self) -> dict[str, PredictFn]:
    def predict(variables, batch, rng):
      params, frozen = variables["params"]["main"], variables["frozen"]
      pooled = self._pool(params, frozen, batch, rng, train=False)
      return self._logits(params, variables["extra"], pooled, train=False)[0]

    def classify(variables, batch, rng):
      return jax.nn.softmax(predict(variables, batch, rng))

    def loss(variables, batch, rng):
      return self._compare(predict(variables, batch, rng), jax.nn.one_hot(batch["label"], self.classes))

    def features(variables, batch, rng):
      pooled = self._pool(variables["params"]["main"], variables["frozen"], batch, rng, train=False)
      return nn.standardize(pooled, axis=-1, epsilon=1e-6)

    def encode(variables, batch, rng):
      return self._tokenize(variables["frozen"], batch["image"])

    def decode(variables, batch, rng):
      params = {"params": variables["frozen"]["tokenizer"]}
      return self.tokenizer.apply(params, batch["tokens"], self.grid, method="detokenize")

    def reconstruct(variables, batch, rng):
      return decode(variables, {"tokens": encode(variables, batch, rng)}, rng)

    return {fn.__name__: fn for fn in (loss, classify, features, encode, decode, reconstruct)}
