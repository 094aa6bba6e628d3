"""MR-MAE: a masked autoencoder whose encoder also mimics a teacher at visible patches (Gao et al. 2023)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from maskgen import config as config_lib
from maskgen import objectives
from maskgen.config import fields
from maskgen.models.image_encoder import EncoderPart
from maskgen.models.transformer import kernel_init
from maskgen.numerics import losses as losses_lib
from maskgen.objectives import Batch, Metrics, PredictFn, Tree, frozen_teacher, masked_pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(masked_pixels.Objective):
  """Trains `main`: encoder and decoder of `masked_pixels`, and a linear head that predicts a frozen teacher.

  The loss of `masked_pixels` is at masked patches; added to it is, at visible ones, the distance between the
  head's output and the teacher's patch tokens for the whole image. The authors' code is not public; how the
  distance is measured is MaskAlign's: these tokens are standardised, and it is twice the smooth L1 distance.
  Of the predictions, only `loss` uses the head and the teacher. Exports hold both: the teacher's license
  applies to them.

  Attributes:
    teacher: the model at `config.pretrained.teacher`, an image encoder with the same grid of patches; as
      `encoder` of `maskgen.objectives.classify`, it may be name="pretrained".
    mimic_weight: of the distance.
  """

  teacher: Mapping[str, Any] = fields.section(objectives.find_encoder)
  mimic_weight: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    config_lib.check_at_least(self, 0, "mimic_weight")
    encoder = self.encoder
    frozen_teacher.check(self._teacher, encoder.grid, encoder.channels, "the encoder", "patches")

  @functools.cached_property
  def _teacher(self) -> EncoderPart:
    return objectives.encoder_part(self.teacher, "config.objective.teacher")

  @property
  def head(self) -> nn.Dense:
    """From the encoder's output to the teacher's width."""
    width = self._teacher.encoder.width
    return nn.Dense(width, kernel_init=kernel_init, dtype=self.encoder.dtype)

  def pretrained_shapes(self) -> dict[str, Tree]:
    return {"teacher": self._teacher.shapes()}

  def check_pretrained(self, name: str, config: Mapping[str, Any]) -> None:
    frozen_teacher.check_pretrained(self._teacher, config)

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    parts = super().init(rng, pretrained)
    head = self.head.init(jax.random.fold_in(rng, 0), jnp.zeros((1, self.encoder.width)))["params"]
    return parts | {
      "params": {"main": parts["params"]["main"] | {"head": head}},
      "frozen": {"teacher": frozen_teacher.freeze(self._teacher, pretrained["teacher"])},
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
    masked = self.mask(batch["key"])
    found = self.both_errors(
      params, self.images(batch), self.teach(frozen, batch), *masked, rng if train else None
    )
    metrics = {name: value.mean() for name, value in found.items()}
    return {"main": metrics.pop("loss")}, metrics, model_state

  def teach(self, frozen: Tree, batch: Batch) -> jax.Array:
    """The teacher's patch tokens of a batch, [b, n, e]."""
    return self._teacher.encoder.encode(frozen["teacher"]["params"], frozen["teacher"]["frozen"], batch)

  def both_errors(
    self,
    params: Mapping[str, Tree],
    images: jax.Array,
    taught: jax.Array,
    mask: jax.Array,
    kept: jax.Array,
    rng: Any = None,
  ) -> dict[str, jax.Array]:
    """`pixel_error`, `mimic_error` and their weighted sum `loss` for each example, float32 [b].

    Args:
      params: as `init` returns them.
      images: float32 [b, h, w, c] in [0, 1].
      taught: the teacher's patch tokens, [b, n, e].
      mask: bool [b, n], what is masked.
      kept: int32 [b, k], the visible patches, ascending.
      rng: for dropout and drop path of the encoder, or None.
    """
    main: Any = params["main"]
    options: Any = {} if rng is None else {"train": True, "rngs": {"dropout": rng}}
    latents: Any = self.encoder.apply(
      {"params": main["encoder"]}, images, kept, method="encode_kept", **options
    )
    decoded: Any = self.decoder.apply({"params": main["decoder"]}, latents, kept)
    pixels = losses_lib.masked_mean(jnp.square(decoded - self.targets(images)[0]).mean(axis=-1), mask)
    found: Any = self.head.apply({"params": main["head"]}, latents[:, -kept.shape[1] :])
    seen = jnp.take_along_axis(taught.astype(jnp.float32), kept[..., None], axis=1)
    target = nn.standardize(seen, axis=-1, epsilon=1e-5)
    mimic = 2.0 * losses_lib.mean_per_example(optax.losses.huber_loss(found.astype(jnp.float32), target))
    return {"loss": pixels + self.mimic_weight * mimic, "pixel_error": pixels, "mimic_error": mimic}

  def predict_fns(self) -> dict[str, PredictFn]:
    def loss(variables, batch, rng):
      masked = self.mask(jax.random.split(rng, len(batch["image"])))
      taught = self.teach(variables["frozen"], batch)
      return self.both_errors(variables["params"], self.images(batch), taught, *masked)

    return super().predict_fns() | {"loss": loss}
