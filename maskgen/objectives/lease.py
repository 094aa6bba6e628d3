"""LEASE: MAGE, and a contrast of visible patches with the clusters of a teacher's patches.

It follows ImaGonEs/LEASE, where clusters are a file that another project made. Here they are found while the
model trains (`maskgen.numerics.clusters`), so that any image encoder can teach, and the model itself.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen import config as config_lib
from maskgen import objectives
from maskgen.config import fields
from maskgen.errors import UserError
from maskgen.models.image_encoder import EncoderPart
from maskgen.models.mage import Prediction
from maskgen.models.transformer import kernel_init
from maskgen.numerics import clusters
from maskgen.numerics import losses as losses_lib
from maskgen.objectives import Batch, BatchSpec, Metrics, Tree, frozen_teacher, mage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(mage.Objective):
  """Trains `main`, MAGE's network and a projection, taught by a frozen image encoder or a moving average.

  The teacher sees the whole picture. Its patch tokens are assigned to clusters, and the projection of each
  token that the encoder sees should be close to the centroid of its patch's cluster. The projection is linear
  and has the teacher's width; predictions do not use it, nor the teacher, which exports leave out.

  Attributes:
    teacher: the model at `config.pretrained.teacher`, an image encoder with a patch for each token; as
      `encoder` of `maskgen.objectives.classify`, it may be name="pretrained". By default the encoder's own
      moving average, `config.ema.main`.
    clusters: the number of clusters, K.
    neighbours: how many of the nearest other centroids share a token's target.
    contrastive_weight: of the contrastive loss; 0 does not compute it.
    temperature, neighbour_temperature: see `losses.centroid_contrast`.
  """

  training_only: ClassVar[tuple[str, ...]] = ("teacher",)

  teacher: Mapping[str, Any] = fields.section(objectives.find_encoder, default_factory=dict)
  clusters: int = 16_384
  neighbours: int = 5
  contrastive_weight: float = 0.1
  temperature: float = 0.1
  neighbour_temperature: float = 0.1

  def __post_init__(self):
    super().__post_init__()
    config_lib.check_at_least(self, 2, "clusters")
    config_lib.check_at_least(self, 0, "neighbours", "contrastive_weight")
    for name in ("temperature", "neighbour_temperature"):
      config_lib.check_at_least(self, 0, name)
      if not getattr(self, name):
        raise UserError(f"{name} is 0: cosines are divided by it, give a value above 0")
    if self.neighbours >= self.clusters:
      raise UserError(f"neighbours={self.neighbours} of {self.clusters} clusters: give fewer than clusters")
    channels = self.tokenizer.image_channels
    frozen_teacher.check(self._teacher, self.grid, channels, "the tokenizer", "tokens")

  @functools.cached_property
  def _teacher(self) -> EncoderPart:
    """The teacher as a part of `config.pretrained.teacher`, or of this model."""
    if not self.teacher:
      return self.image_encoder
    return objectives.encoder_part(self.teacher, "config.objective.teacher")

  @property
  def averages(self) -> tuple[str, ...]:
    """The groups whose moving averages teach."""
    return () if self.teacher else ("main",)

  @property
  def projection(self) -> nn.Dense:
    """From the encoder's output to the teacher's width."""
    return nn.Dense(self._teacher.encoder.width, use_bias=False, kernel_init=kernel_init, dtype=self.dtype)

  def batch_spec(self) -> BatchSpec:
    found = super().batch_spec()
    # Another teacher sees pixels: cached tokens cannot replace them.
    return dataclasses.replace(found, num_tokens=0, codebook_size=0) if self.teacher else found

  def pretrained_shapes(self) -> dict[str, Tree]:
    found = super().pretrained_shapes()
    return found | {"teacher": self._teacher.shapes()} if self.teacher else found

  def check_pretrained(self, name: str, config: Mapping[str, Any]) -> None:
    if name == "teacher":
      frozen_teacher.check_pretrained(self._teacher, config)
    else:
      super().check_pretrained(name, config)

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    parts = super().init(rng, pretrained)
    projection = self.projection.init(jax.random.fold_in(rng, 0), jnp.zeros((1, self.width)))["params"]
    frozen = parts["frozen"]
    if self.teacher:
      frozen = frozen | {"teacher": frozen_teacher.freeze(self._teacher, pretrained["teacher"])}
    return {
      "params": {"main": parts["params"]["main"] | {"projection": projection}},
      "frozen": frozen,
      "extra": {"clusters": clusters.init(self.clusters, self._teacher.encoder.width)},
    }

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
    means = {name: value.mean() for name, value in self.scores(params, frozen, batch, found).items()}
    loss = means.pop("loss")
    metrics = means | {"reconstructive_loss": loss}
    if self.contrastive_weight:
      known = model_state["clusters"]
      patches = self.teach(frozen, batch, found.tokens)
      features = patches.reshape(-1, patches.shape[-1])
      ids, learned = clusters.update(known, features, jax.random.fold_in(rng, 0))
      ids = ids.reshape(patches.shape[:2])
      contrastive, nearest = self.contrast(params, clusters.centroids(known), ids, found)
      metrics |= {
        "contrastive_loss": contrastive.mean(),
        "contrastive_accuracy": nearest.mean(),
        "cluster_perplexity": clusters.perplexity(learned),
      }
      loss += self.contrastive_weight * contrastive.mean()
      model_state = {"clusters": learned if train else known}
    return {"main": loss}, metrics, model_state

  def teach(self, frozen: Tree, batch: Batch, tokens: jax.Array) -> jax.Array:
    """The teacher's patch tokens [b, n, e] of a batch, whose codes are int32 [b, n]."""
    encode = self._teacher.encoder.encode
    if not self.teacher:
      return encode(frozen["average"]["main"], frozen, {"tokens": tokens})
    return encode(frozen["teacher"]["params"], frozen["teacher"]["frozen"], batch)

  def contrast(
    self, params: Mapping[str, Tree], centroids: jax.Array, ids: jax.Array, found: Prediction
  ) -> tuple[jax.Array, jax.Array]:
    """The contrastive loss of each example, and the share of tokens whose centroid is the nearest one.

    Args:
      params: as `init` returns them.
      centroids: float32 [K, e], of unit norm.
      ids: int32 [b, n], the clusters of the patches.
      found: of these examples; its masked tokens do not take part.

    Returns:
      float32 [b] each, means over the visible tokens.
    """
    projected: Any = self.projection.apply({"params": params["main"]["projection"]}, found.latents[:, 1:])
    values = losses_lib.centroid_contrast(
      projected,
      centroids,
      jnp.take_along_axis(ids, found.kept, axis=1),
      temperature=self.temperature,
      neighbours=self.neighbours,
      neighbour_temperature=self.neighbour_temperature,
    )
    visible = ~jnp.take_along_axis(found.mask, found.kept, axis=1)
    loss, nearest = (losses_lib.masked_mean(value, visible) for value in values)
    return loss, nearest
