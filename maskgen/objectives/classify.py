"""Linear probing and fine-tuning of an image encoder (Li et al. 2023, section 4.2 and appendix B)."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen import config as config_lib
from maskgen import images as images_lib
from maskgen import objectives, storage
from maskgen.config import fields
from maskgen.errors import UserError, nearest
from maskgen.models.image_encoder import EncoderPart
from maskgen.numerics import losses as losses_lib
from maskgen.numerics import mixing
from maskgen.numerics.positions import Positions
from maskgen.objectives import Batch, BatchSpec, Metrics, PredictFn, Tree, token_fns

TRAINED = ("all", "head")
NORMS = ("layer", "batch")
# The keys of a MAGE that describe its encoder. In earlier configs they were keys of this objective.
ENCODER_KEYS = (
  *("image_size", "tokenizer", "class_ids", "null_class", "width", "depth", "heads"),
  *("dtype", "attention", "remat", "scan"),
)


class Head(nn.Module):
  """Maps the pooled vector to logits.

  Attributes:
    classes: k, the number of classes.
    norm: "layer" for LayerNorm with scale and bias; "batch" for LayerNorm and BatchNorm, both without.
    std: of the kernel's normal initialisation. (timm's truncated normal, which the reference uses, cuts at -2
      and 2, many standard deviations away.)
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
    init = nn.initializers.normal(self.std)
    return nn.Dense(self.classes, kernel_init=init, name="logits")(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """Trains `main`: a head on an encoder's pooled vector and, optionally, the encoder.

  `maskgen.models.image_encoder` defines that vector. With `trained="head"`, the encoder is frozen and runs
  without dropout. Batch normalisation takes its statistics from the global batch or, with accumulation, from
  each micro-batch, as the reference does on each device; evaluation uses their running averages.

  Attributes:
    encoder: the model at `config.pretrained.encoder`. With name="pretrained", the section is filled in from
      that model's own config; other keys, such as dtype or remat, override it. Otherwise, the whole
      `config.objective` of that model, or name="vit" and the fields of `ViT`.
    classes: the number of classes.
    trained: "all", or "head" for a linear probe.
    norm: of the pooled vector: "layer", or "batch" (in addition), as is customary for a linear probe.
    dropout, drop_path: of the encoder during training, see `Transformer`; they override those in its section.
    label_smoothing: of the cross-entropy in training; evaluations report the plain one, like the reference.
    mixup, cutmix: alphas of `maskgen.numerics.mixing`, on pixels; 0 is off. With both, each example
      draws one of them.
  """

  serving: ClassVar[str] = "maskgen.serving.Classifier"
  pretrained_was: ClassVar[Mapping[str, str]] = {"mage": "encoder"}

  encoder: Mapping[str, Any] = fields.section(objectives.find_encoder, took=ENCODER_KEYS, kind="mage")
  classes: int
  trained: str = "all"
  norm: str = "layer"
  dropout: float = 0.0
  drop_path: float = 0.0
  label_smoothing: float = 0.0
  mixup: float = 0.0
  cutmix: float = 0.0

  def __post_init__(self):
    config_lib.check_at_least(self, 2, "classes")
    config_lib.check_at_least(self, 0, "mixup", "cutmix")
    config_lib.check_share(self, "dropout", "drop_path", "label_smoothing")
    for name, choices in (("trained", TRAINED), ("norm", NORMS)):
      value = getattr(self, name)
      if value not in choices:
        raise UserError(f"{name} '{value}' does not exist{nearest(value, choices)}")
    if self.trained == "head" and (self.dropout or self.drop_path):
      raise UserError("a frozen encoder runs without dropout and drop_path: set both to 0")
    _ = self.image_encoder  # this checks its fields

  @staticmethod
  def comparable(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section without the keys of a MAGE encoder that describe its decoder and its training."""
    encoder = section.get("encoder", {})
    if encoder.get("name") != "mage":
      return dict(section)
    return {**section, "encoder": {key: encoder[key] for key in ("name", *ENCODER_KEYS) if key in encoder}}

  @property
  def num_classes(self) -> int:
    return self.classes

  @property
  def captions(self) -> None:
    return None

  @property
  def codebook_size(self) -> int:
    tokenizer = self.image_encoder.encoder.tokenizer
    return tokenizer.codebook_size if tokenizer else 0

  def tokenizer_params(self, variables: Tree) -> Tree:
    return variables["frozen"]["tokenizer"]

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return self.image_encoder.encoder.image_shape

  @functools.cached_property
  def image_encoder(self) -> EncoderPart:
    """The encoder below the head, without the parameters that `pool` does not use."""
    encoder = self._source.encoder.with_dropout(self.dropout, self.drop_path)
    return EncoderPart(encoder, "frozen/encoder" if self.trained == "head" else "params/main", pooled=True)

  @functools.cached_property
  def _source(self) -> EncoderPart:
    """The encoder as a part of `config.pretrained.encoder`."""
    found = objectives.encoder_part(self.encoder, "config.objective.encoder")
    return dataclasses.replace(found, pooled=True)

  @property
  def head(self) -> Head:
    """The head; its initialisation follows the reference's two recipes."""
    return Head(self.classes, self.norm, std=0.01 if self.trained == "head" else 2e-5)

  def batch_spec(self) -> BatchSpec:
    num_tokens = 0 if self.mixup or self.cutmix else math.prod(self._grid)  # mixing needs pixels
    return BatchSpec(
      image_shape=self.image_shape,
      num_tokens=num_tokens,
      codebook_size=self.codebook_size,
      num_classes=self.classes,
    )

  def pretrained_shapes(self) -> dict[str, Tree]:
    return {"encoder": self._source.shapes()}

  def check_pretrained(self, name: str, config: Mapping[str, Any]) -> None:
    found = objectives.encoder_part(storage.model_section(config), "its objective")
    objectives.check_same(dataclasses.replace(found, pooled=True), self._source)

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    encoder, frozen = self._source.split(pretrained["encoder"])
    head = self.head.init(rng, jnp.zeros((1, self._source.encoder.width)), train=False)
    params = {"head": head["params"]}
    if self.trained == "head":
      frozen = {**frozen, "encoder": encoder}
    else:
      params = {**encoder, **params}
    return {"params": {"main": params}, "frozen": frozen, "extra": head.get("batch_stats", {})}

  def positions(self) -> dict[str, Positions]:
    return {"main/position": self._source.encoder.positions}

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
    dropout = rng if train and self.trained == "all" else None
    pooled = self.image_encoder.pool({"params": params, "frozen": frozen}, batch, dropout)
    logits, model_state = self._logits(params["main"], model_state, pooled, train=train)
    values = self._compare(logits, targets, self.label_smoothing if train else 0.0)
    return {"main": values["loss"].mean()}, {"accuracy": values["accuracy"].mean()}, model_state

  def _mix(self, batch: Batch, targets: jax.Array) -> tuple[Batch, jax.Array]:
    """Mixes images and targets [b, k], each example with its own key."""
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

  def _compare(self, logits: jax.Array, targets: jax.Array, smoothing: float = 0.0) -> Metrics:
    """Loss and accuracy, each [b]; for mixed targets, the larger one is correct."""
    smooth = (1.0 - smoothing) * targets + smoothing / self.classes
    correct = logits.argmax(axis=-1) == targets.argmax(axis=-1)
    loss = losses_lib.soft_cross_entropy(logits, smooth)
    return {"loss": loss, "accuracy": correct.astype(jnp.float32)}

  def _logits(
    self, params: Tree, model_state: Tree, pooled: jax.Array, *, train: bool
  ) -> tuple[jax.Array, Tree]:
    """Logits float32 [b, k], and the new running statistics."""
    variables = {"params": params["head"], "batch_stats": model_state}
    logits: Any
    logits, changed = self.head.apply(variables, pooled, train=train, mutable=["batch_stats"])
    return logits, changed.get("batch_stats", model_state)

  @property
  def _grid(self) -> tuple[int, int]:
    """The token grid (h', w') of an encoder with a tokenizer; otherwise (0, 0)."""
    tokenizer = self.image_encoder.encoder.tokenizer
    return tokenizer.token_grid(self.image_shape) if tokenizer else (0, 0)

  def predict_fns(self) -> dict[str, PredictFn]:
    part = self.image_encoder

    def predict(variables, batch, rng):
      pooled = part.pool(variables, batch)
      return self._logits(variables["params"]["main"], variables["extra"], pooled, train=False)[0]

    def classify(variables, batch, rng):
      return jax.nn.softmax(predict(variables, batch, rng))

    def loss(variables, batch, rng):
      return self._compare(predict(variables, batch, rng), jax.nn.one_hot(batch["label"], self.classes))

    fns = {"loss": loss, "classify": classify} | part.predict_fns()
    tokenizer = part.encoder.tokenizer
    if tokenizer is not None:
      fns |= token_fns.tokenizer_fns(tokenizer, self.image_shape, self.tokenizer_params)
    return fns
