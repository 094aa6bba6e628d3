"""MAGE-C: MAGE with a contrastive loss on the encoder's output (Li et al. 2023, section 3.3)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from maskgen import config as config_lib
from maskgen import sharding
from maskgen.errors import UserError
from maskgen.models.projection import Projection
from maskgen.numerics import losses as losses_lib
from maskgen.objectives import Batch, BatchSpec, Metrics, Tree, mage

_VIEWS = 2
# Folded into an example's key for its second view. The first view uses the key itself, whose two halves are
# numbers 0 and 1.
_SECOND = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(mage.Objective):
  """Trains `main`, MAGE's network and a projection head, on two views of each record.

  Both views are masked and reconstructed. The encoder's output, averaged over its visible tokens without the
  class position, passes through the head. Each view's embedding should be closest to that of the other view
  of its record, among both views of all records of the global batch. Predictions do not use the head.

  Attributes:
    contrastive_weight: of the contrastive loss, lambda; 0 does not compute it.
    temperature: of the contrastive loss, tau.
    projection_hidden, projection_width: of the head; not given in the paper, the defaults are SimCLR's.
  """

  contrastive_weight: float = 0.1
  temperature: float = 0.2
  projection_hidden: int = 2048
  projection_width: int = 128

  def __post_init__(self):
    super().__post_init__()
    config_lib.check_at_least(self, 0, "contrastive_weight", "temperature")
    config_lib.check_at_least(self, 1, "projection_hidden", "projection_width")
    if not self.temperature:
      raise UserError("temperature is 0: cosines are divided by it, give a value above 0")

  @property
  def projection(self) -> Projection:
    """The head."""
    return Projection(self.projection_hidden, self.projection_width, self.dtype)

  def batch_spec(self) -> BatchSpec:
    # The negatives of an example are all other examples of the global batch.
    return dataclasses.replace(super().batch_spec(), views=_VIEWS, whole_batch=True)

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    parts = super().init(rng, pretrained)
    head = self.projection.init(jax.random.fold_in(rng, 0), jnp.zeros((1, self.width)))["params"]
    return parts | {"params": {"main": parts["params"]["main"] | {"projection": head}}}

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
    views = _both_views(batch)
    found = self.predict_masked(params, frozen, views, rng if train else None)
    values = self.scores(params, frozen, views, found)
    means = {name: value.mean() for name, value in values.items()}
    loss = means.pop("loss")
    metrics = means | {"reconstructive_loss": loss}
    if self.contrastive_weight:
      pooled = found.latents[:, 1:].astype(jnp.float32).mean(axis=1)
      embeddings: Any = self.projection.apply({"params": params["main"]["projection"]}, pooled)
      embeddings = sharding.constrain_batch(embeddings.reshape(-1, _VIEWS, self.projection_width))
      # Only embeddings cross devices, not the activations that they are computed from.
      contrastive, nearest = losses_lib.nt_xent(embeddings, sharding.gather(embeddings), self.temperature)
      metrics |= {"contrastive_loss": contrastive.mean(), "contrastive_accuracy": nearest.mean()}
      loss += self.contrastive_weight * contrastive.mean()
    return {"main": loss}, metrics, model_state


def _both_views(batch: Batch) -> dict[str, jax.Array]:
  """A batch of 2b rows: example i becomes rows 2i and 2i + 1, so that no row changes its device."""
  name = "tokens" if "tokens" in batch else "image"
  second = {
    name: batch[f"{name}2"],
    "key": jax.vmap(lambda key: jax.random.fold_in(key, _SECOND))(batch["key"]),
  }
  return {
    name: jnp.stack([batch[name], other], axis=1).reshape(-1, *other.shape[1:])
    for name, other in second.items()
  }
