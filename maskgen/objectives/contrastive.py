"""Contrastive learning of images and texts: CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023), LiT (Zhai
et al. 2022).

Letters: b batch, l positions of a caption, p width of the joint space.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen import config as config_lib
from maskgen import objectives, sharding, storage
from maskgen.config import fields
from maskgen.errors import UserError, nearest
from maskgen.models.image_encoder import EncoderPart
from maskgen.models.text_encoder import TextEncoder
from maskgen.models.transformer import kernel_init
from maskgen.numerics import losses as losses_lib
from maskgen.numerics.positions import Positions
from maskgen.numerics.text import Captions
from maskgen.objectives import Batch, BatchSpec, Metrics, PredictFn, Tree

TRAINED = ("all", "text")
LOSSES = ("sigmoid", "softmax")
# Cosines are multiplied by no more than this (Radford et al. 2021, section 2.5).
_LARGEST_SCALE = 100.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """Trains `main`, an image and a text encoder, so that the embeddings of an image and its caption agree.

  Each image is compared with the captions of the whole global batch. The image's embedding is the encoder's
  pooled vector, the text's is read at its end id and projected to the same width.

  Attributes:
    encoder: the image encoder, name="vit" and the fields of `ViT`. SigLIP's has pooling="attention". If it is
      frozen, the model at `config.pretrained.encoder`, as in `classify`: name="pretrained" fills it in.
    trained: "all"; or "text" for a frozen image encoder, which is LiT.
    captions: how captions are tokenized.
    text_encoder: its vocabulary and number of positions are set from `captions`, its projection is p.
    embedding_width: p, to which images are projected, too, as in CLIP; 0 for the image encoder's width,
      without a projection of images, as in SigLIP and LiT.
    loss: "sigmoid" for a logistic loss of each pair, SigLIP's; or "softmax" for cross-entropies over the
      captions of each image and over the images of each caption, CLIP's.
    temperature: by which cosines are divided, at the beginning: it is learned. CLIP's is 0.07.
    bias: of the logits of "sigmoid", at the beginning: it is learned.
    chunk: how many captions a device compares with its images at once; fewer take less memory.
  """

  serving: ClassVar[str] = "maskgen.serving.Model"
  num_classes: ClassVar[int] = 0
  codebook_size: ClassVar[int] = 0

  encoder: Mapping[str, Any] = fields.section(objectives.find_encoder)
  trained: str = "all"
  captions: Captions
  text_encoder: TextEncoder = TextEncoder()
  embedding_width: int = 0
  loss: str = "sigmoid"
  temperature: float = 0.1
  bias: float = -10.0
  chunk: int = fields.operational(4096, less_memory=(1024, 256))

  def __post_init__(self):
    config_lib.check_at_least(self, 0, "embedding_width", "temperature")
    config_lib.check_at_least(self, 1, "chunk")
    for name, choices in (("trained", TRAINED), ("loss", LOSSES)):
      if (value := getattr(self, name)) not in choices:
        raise UserError(f"{name} '{value}' does not exist{nearest(value, choices)}")
    if not self.temperature:
      raise UserError("temperature is 0: cosines are divided by it, give a value above 0")
    if self.trained == "all" and self._source.encoder.parts:
      raise UserError(
        "encoder has frozen parts, which this objective cannot train: give trained='text' and the trained "
        "model as config.pretrained.encoder"
      )

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return self._source.encoder.image_shape

  @functools.cached_property
  def _source(self) -> EncoderPart:
    """The image encoder as a part of `config.pretrained.encoder`."""
    found = objectives.encoder_part(self.encoder, "config.objective.encoder")
    return dataclasses.replace(found, pooled=True)

  @functools.cached_property
  def image_encoder(self) -> EncoderPart:
    """The image encoder."""
    group = "frozen" if self.trained == "text" else "params/main"
    return EncoderPart(self._source.encoder, f"{group}/encoder", pooled=True)

  @property
  def width(self) -> int:
    """The width p."""
    return self.embedding_width or self._source.encoder.width

  @property
  def reader(self) -> TextEncoder:
    """The text encoder."""
    return self.text_encoder.clone(
      vocabulary_size=self.captions.opened.vocabulary_size,
      positions=self.captions.length,
      projection=self.width,
    )

  @property
  def head(self) -> nn.Dense:
    """The projection of images, which is used if `embedding_width` is set."""
    return nn.Dense(self.embedding_width, use_bias=False, kernel_init=kernel_init)

  def batch_spec(self) -> BatchSpec:
    return BatchSpec(image_shape=self.image_shape, captions=self.captions, whole_batch=True)

  def pretrained_shapes(self) -> dict[str, Tree]:
    return {"encoder": self._source.shapes()} if self.trained == "text" else {}

  def check_pretrained(self, name: str, config: Mapping[str, Any]) -> None:
    found = objectives.encoder_part(storage.model_section(config), "its objective")
    objectives.check_same(dataclasses.replace(found, pooled=True), self._source)

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    image_rng, head_rng, text_rng = jax.random.split(rng, 3)
    ids, end = jnp.zeros((1, self.captions.length), jnp.int32), jnp.zeros((1,), jnp.int32)
    frozen: dict[str, Tree] = {}
    params = {
      "text_encoder": self.reader.init(text_rng, ids, end)["params"],
      "contrast": {"scale": jnp.float32(-math.log(self.temperature))},
    }
    if self.loss == "sigmoid":
      params["contrast"]["bias"] = jnp.float32(self.bias)
    if self.embedding_width:
      params["head"] = self.head.init(head_rng, jnp.zeros((1, self._source.encoder.width)))["params"]
    if self.trained == "all":
      params["encoder"] = self._source.encoder.init(image_rng, pooled=True)
    else:
      encoder, parts = self._source.split(pretrained["encoder"])
      frozen = {**parts, "encoder": encoder}
    return {"params": {"main": params}, "frozen": frozen, "extra": {}}

  def positions(self) -> dict[str, Positions]:
    learned = self.trained == "all" and not getattr(self._source.encoder.network, "fixed_positions", False)
    return {"main/encoder/position": self._source.encoder.positions} if learned else {}

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
    dropout = rng if train and self.trained == "all" else None
    images = self.embed_images({"params": params, "frozen": frozen}, batch, dropout)
    loss, nearest = self.compare(params, images, self.embed_texts(params, batch["caption"]))
    metrics = {"accuracy": nearest.mean(), "temperature": 1.0 / self._logits(params)[0]}
    return {"main": loss.mean()}, metrics, model_state

  def embed_images(self, variables: Tree, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    """Embeddings of images, float32 [b, p], of any length."""
    pooled = self.image_encoder.pool(variables, batch, rng)
    if not self.embedding_width:
      return pooled
    found: Any = self.head.apply({"params": variables["params"]["main"]["head"]}, pooled)
    return found

  def embed_texts(self, params: Mapping[str, Tree], captions: jax.Array) -> jax.Array:
    """Embeddings of captions int32 [b, l], float32 [b, p], of any length."""
    end = (captions == self.captions.opened.end_id).argmax(axis=1)
    encoded: Any = self.reader.apply({"params": params["main"]["text_encoder"]}, captions, end)
    return encoded.pooled

  def compare(
    self, params: Mapping[str, Tree], images: jax.Array, texts: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """The loss of each image and caption, and whether the image's own caption is the nearest; float32 [b].

    Args:
      params: as `init` returns them.
      images: embeddings float32 [b, p], of any length.
      texts: those of their captions.
    """
    scale, bias = self._logits(params)
    # Only embeddings cross devices, not the activations that they are computed from.
    images, texts = (sharding.constrain_batch(losses_lib.unit_length(x)) for x in (images, texts))
    loss, nearest = losses_lib.contrast(images, sharding.gather(texts), scale, bias, self.chunk)
    if bias is None:
      other, _ = losses_lib.contrast(texts, sharding.gather(images), scale, None, self.chunk)
      loss = (loss + other) / 2
    return loss, nearest

  def _logits(self, params: Mapping[str, Tree]) -> tuple[jax.Array, jax.Array | None]:
    """The factor of cosines, and the bias if the loss has one."""
    found = params["main"]["contrast"]
    if self.loss == "sigmoid":
      return jnp.exp(found["scale"]), found["bias"]
    return jnp.exp(jnp.minimum(found["scale"], math.log(_LARGEST_SCALE))), None

  def predict_fns(self) -> dict[str, PredictFn]:
    def embed_image(variables, batch, rng):
      return losses_lib.unit_length(self.embed_images(variables, batch))

    def embed_text(variables, batch, rng):
      return losses_lib.unit_length(self.embed_texts(variables["params"], batch["caption"]))

    own: tuple[PredictFn, ...] = (embed_image, embed_text)
    return {fn.__name__: fn for fn in own} | self.image_encoder.predict_fns()
