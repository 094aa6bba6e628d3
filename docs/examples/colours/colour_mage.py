"""An objective: MAGE, and a head that predicts the picture's colour histogram from the encoder's output."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from maskgen import config as config_lib
from maskgen import images as images_lib
from maskgen.models.mage import Prediction
from maskgen.objectives import Batch, BatchSpec, Metrics, PredictFn, Tree, mage


def histogram(images: jax.Array, bins: int) -> jax.Array:
  """The share of pixels whose value lies in each of `bins` ranges, float32 [b, c, bins]."""
  levels = (images_lib.to_float(images) * bins).astype(jnp.int32)
  return jax.nn.one_hot(levels.clip(0, bins - 1), bins).mean(axis=(1, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(mage.Objective):
  """Trains MAGE's network and the head; the parameters of both are in the group `main`.

  Attributes:
    bins: the number of ranges of each channel.
    histogram_weight: the weight of the head's loss; that of MAGE's is 1.
  """

  bins: int = 8
  histogram_weight: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    config_lib.check_at_least(self, 2, "bins")
    config_lib.check_at_least(self, 0, "histogram_weight")

  def batch_spec(self) -> BatchSpec:
    # Histograms are of pixels: cached tokens cannot replace them.
    return dataclasses.replace(super().batch_spec(), num_tokens=0, codebook_size=0)

  @property
  def head(self) -> nn.Dense:
    return nn.Dense(self.image_shape[-1] * self.bins)

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    parts = super().init(rng, pretrained)
    head = self.head.init(jax.random.fold_in(rng, 0), jnp.zeros((1, self.width)))["params"]
    return parts | {"params": {"main": parts["params"]["main"] | {"histogram": head}}}

  def histogram_logits(self, params: Tree, latents: jax.Array) -> jax.Array:
    """Logits [b, c, bins] from the encoder's output, without its class position."""
    pooled = latents[:, 1:].astype(jnp.float32).mean(axis=1)
    logits: Any = self.head.apply({"params": params["main"]["histogram"]}, pooled)
    return logits.reshape(len(pooled), -1, self.bins)

  def scores(self, params: Tree, frozen: Tree, batch: Batch, found: Prediction) -> Metrics:
    values = super().scores(params, frozen, batch, found)
    predicted = jax.nn.log_softmax(self.histogram_logits(params, found.latents))
    divergence = optax.kl_divergence(predicted, histogram(batch["image"], self.bins)).mean(axis=-1)
    loss = values["loss"] + self.histogram_weight * divergence
    return values | {"loss": loss, "histogram_loss": divergence}

  def predict_fns(self) -> dict[str, PredictFn]:
    def predict_histogram(variables, batch, rng):
      params, frozen = variables["params"], variables["frozen"]
      tokens = self.codes(frozen, batch)
      latents = self.latents(params, frozen, tokens, jnp.zeros(tokens.shape, bool))
      return jax.nn.softmax(self.histogram_logits(params, latents))

    return super().predict_fns() | {"histogram": predict_histogram}
