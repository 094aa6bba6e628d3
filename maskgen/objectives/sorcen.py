"""Sorcen: MAGE, and a contrast of images with echoes of their own reconstructions.

It follows ImaGonEs/LEASE, whose authors also wrote Sorcen.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from maskgen import config as config_lib
from maskgen import sharding
from maskgen.errors import UserError
from maskgen.models.mage import Prediction
from maskgen.models.projection import Projection
from maskgen.numerics import losses as losses_lib
from maskgen.numerics import masking
from maskgen.objectives import Batch, BatchSpec, Metrics, Tree, mage

# Folded into an example's key for its echo. Its mask uses the key itself, whose two halves are numbers 0 and
# 1.
_ECHO = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(mage.Objective):
  """Trains `main`, MAGE's network, a projection and a predictor, taught by its own moving average.

  An echo is a sample of the codes that the decoder finds likely, without the likeliest one, in a random
  window; all other tokens are masked. The moving average, `config.ema.main`, encodes it. The predictor
  predicts the projection of the echo from that of the encoder's mean output, and each echo should be nearest
  to its own prediction, among those of all examples of the global batch. The other methods of a trained model
  use neither projection nor predictor.

  Attributes:
    contrastive_weight: of the contrastive loss; 0 does not compute it.
    uniformity_weight: of the mean squared cosine between examples; 0 does not compute it.
    temperature: of the contrastive loss.
    echo_choices: how many codes an echo chooses from at each position.
    echo_window: the smallest window, as a share of the grid's sides.
    echo_start: the step from which echoes are samples; before, they are the true codes.
    projection_hidden, projection_width: of the projection.
    predictor_hidden: of the predictor.
    share_embedding: whether the teacher has the encoder's present embeddings and final normalisation, and is
      an average in its blocks and projection alone, as the authors'.
  """

  averages: ClassVar[tuple[str, ...]] = ("main",)

  contrastive_weight: float = 0.1
  uniformity_weight: float = 0.01
  temperature: float = 0.3
  echo_choices: int = 15
  echo_window: float = 0.5
  echo_start: int = 0
  projection_hidden: int = 4096
  projection_width: int = 512
  predictor_hidden: int = 2048
  share_embedding: bool = False

  def __post_init__(self):
    super().__post_init__()
    config_lib.check_at_least(self, 0, "contrastive_weight", "uniformity_weight", "temperature", "echo_start")
    config_lib.check_at_least(
      self, 1, "echo_choices", "projection_hidden", "projection_width", "predictor_hidden"
    )
    if not self.temperature:
      raise UserError("temperature is 0: cosines are divided by it, give a value above 0")
    if self.echo_choices >= self.codebook_size:
      raise UserError(
        f"echo_choices is {self.echo_choices}: without the likeliest, {self.codebook_size - 1} codes remain"
      )
    if not 0.0 < self.echo_window <= 1.0:
      raise UserError(f"echo_window is {self.echo_window}: it is above 0 and at most 1")

  @property
  def projection(self) -> Projection:
    """The head of encoder and teacher."""
    return Projection(self.projection_hidden, self.projection_width, self.dtype, batch_norm=True)

  @property
  def predictor(self) -> Projection:
    """From the encoder's projection to the teacher's."""
    return Projection(self.predictor_hidden, self.projection_width, self.dtype, batch_norm=True)

  def batch_spec(self) -> BatchSpec:
    # The negatives of an echo are the predictions of all other examples of the global batch.
    return dataclasses.replace(super().batch_spec(), whole_batch=True)

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    parts = super().init(rng, pretrained)
    heads = {
      name: head.init(jax.random.fold_in(rng, i), jnp.zeros((1, width)))["params"]
      for i, (name, head, width) in enumerate(
        (("projection", self.projection, self.width), ("predictor", self.predictor, self.projection_width))
      )
    }
    return parts | {"params": {"main": parts["params"]["main"] | heads}}

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
    if self.uniformity_weight:
      metrics["uniformity"] = losses_lib.uniformity(found.latents.astype(jnp.float32).mean(axis=1))
      loss += self.uniformity_weight * metrics["uniformity"]
    if self.contrastive_weight:
      codes, window = self.echo(batch["key"], found)
      codes = jnp.where(step >= self.echo_start, codes, found.tokens)
      target = self.teach(params, frozen, codes, window)
      contrastive, nearest = self.contrast(params, found.latents, target)
      metrics |= {"contrastive_loss": contrastive.mean(), "contrastive_accuracy": nearest.mean()}
      loss += self.contrastive_weight * contrastive.mean()
    return {"main": loss}, metrics, model_state

  def echo(self, keys: jax.Array, found: Prediction) -> tuple[jax.Array, jax.Array]:
    """Samples echoes.

    Args:
      keys: PRNG keys [b].
      found: what the decoder predicts for the examples.

    Returns:
      codes: int32 [b, n].
      window: bool [b, n], True where the teacher sees them.
    """
    code_keys, window_keys = jnp.moveaxis(
      jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, _ECHO)))(keys), 1, 0
    )
    logits, codes = jax.lax.top_k(jax.lax.stop_gradient(found.logits), self.echo_choices + 1)
    chosen = jax.vmap(jax.random.categorical)(code_keys, logits[..., 1:])
    codes = jnp.take_along_axis(codes[..., 1:], chosen[..., None], axis=-1)[..., 0]
    return codes, masking.random_window(window_keys, self.grid, self.echo_window)

  def teach(self, params: Mapping[str, Tree], frozen: Tree, codes: jax.Array, window: jax.Array) -> jax.Array:
    """The teacher's projections [b, p] of the codes [b, n] in a window, bool [b, n]."""
    teacher = frozen["average"]["main"]
    if self.share_embedding:
      shared = ("embedding", "position", "embedding_norm", "encoder_norm")
      teacher = teacher | jax.lax.stop_gradient({name: params["main"][name] for name in shared})
    return self._project(teacher, self.latents({"main": teacher}, frozen, codes, ~window))

  def contrast(
    self, params: Mapping[str, Tree], latents: jax.Array, target: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """See `losses.info_nce`: echoes [b, p] are anchors, and what latents [b, 1 + k, d] predict, positives."""
    main: Any = params["main"]
    predicted: Any = self.predictor.apply({"params": main["predictor"]}, self._project(main, latents))
    return losses_lib.info_nce(target, predicted, sharding.gather(predicted), self.temperature)

  def _project(self, main: Any, latents: jax.Array) -> jax.Array:
    """Projections [b, p] of the mean over tokens, without the class position."""
    pooled = latents[:, 1:].astype(jnp.float32).mean(axis=1)
    found: Any = self.projection.apply({"params": main["projection"]}, pooled)
    projected: jax.Array = found
    return projected
