"""LMD: a masked autoencoder of another one's latents, of which more and more are masked (Ma et al. 2024)."""

import dataclasses
import functools
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from maskgen import config as config_lib
from maskgen import images as images_lib
from maskgen import objectives
from maskgen.config import fields
from maskgen.errors import UserError
from maskgen.importers import diffusers
from maskgen.models import latents as latents_lib
from maskgen.models.image_encoder import EncoderPart, LatentVitEncoder
from maskgen.models.patches import unpatchify
from maskgen.numerics import masking
from maskgen.objectives import (
  Batch,
  Metrics,
  PredictFn,
  Tree,
  check_image_size,
  frozen_autoencoder,
  masked_pixels,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(masked_pixels.Objective):
  """Trains `main`: the encoder and decoder of `masked_pixels`, with latents in place of pixels.

  The mask ratio rises from `first_ratio` to `mask_ratio` as the noise of a cosine schedule does. A step is
  compiled once, for as many patches as are visible at first; positions that are masked later are in no
  attention, so that losses and gradients are those of the visible patches alone, but they cost as much.
  Predictions mask as after the rise. The methods of `masked_pixels` take latents as images.

  From the authors' code: latents are the mean of their distribution, targets, loss and the cosine schedule.
  Those of Stable Diffusion are scaled to about unit variance here, and the code's decoder subtracts its
  positions, which the signs of parameters can undo. The paper has two other schedules as well.

  Attributes:
    image_size: (h, w) of the images.
    autoencoder: the `config.objective` of a tokenizer at `config.pretrained.autoencoder`; or the section
      `decoder` that `maskgen.tools.convert --format=diffusers` writes for a text-to-image model.
    encoder: see `masked_pixels`; its patches are squares of latents. A given image_size, mean or std is
      ignored: these follow from the autoencoder.
    mask_ratio: the share of patches that are masked after the rise.
    first_ratio: the same at step 0.
    rise_steps: the number of steps of the rise. The authors take two thirds of all.
  """

  image_size: tuple[int, int]
  autoencoder: Mapping[str, Any] = fields.section(partial(objectives.find, diffusers=diffusers.Folder))
  first_ratio: float = 0.15
  rise_steps: int

  def __post_init__(self):
    check_image_size(self.image_size)
    config_lib.check_share(self, "first_ratio")
    config_lib.check_at_least(self, 1, "rise_steps")
    if self.first_ratio > self.mask_ratio:
      raise UserError(
        f"first_ratio is {self.first_ratio} and mask_ratio {self.mask_ratio}: give no more at first"
      )
    *size, channels = latents_lib.shape(self.network, self.image_size)
    mean, std = (0.0,) * channels, (1.0,) * channels
    object.__setattr__(self, "encoder", self.encoder.clone(image_size=tuple(size), mean=mean, std=std))
    super().__post_init__()
    if not self._least:
      raise UserError(f"first_ratio={self.first_ratio} masks no patch: some must be masked")

  @functools.cached_property
  def network(self) -> latents_lib.Autoencoder:
    """The autoencoder."""
    return frozen_autoencoder.read(self.autoencoder)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return (*self.image_size, self.network.image_channels)

  @property
  def image_encoder(self) -> EncoderPart:
    """The encoder and the autoencoder in front of it, which other objectives can use."""
    network = self.encoder.clone(hidden=self.encoder.hidden or 4 * self.encoder.width)
    encoder = LatentVitEncoder(network, autoencoder=self.network, image_size=self.image_size)
    return EncoderPart(encoder, "params/main/encoder")

  @property
  def _least(self) -> int:
    """The number of patches that are masked at first."""
    first = masking.MaskRatio.constant(self.first_ratio)
    return masking.num_dropped(self.encoder.num_patches, first)

  def pretrained_shapes(self) -> dict[str, Tree]:
    return {"autoencoder": frozen_autoencoder.shapes(self.autoencoder, self.network)}

  def check_pretrained(self, name: str, config: Mapping[str, Any]) -> None:
    frozen_autoencoder.check_pretrained(self.autoencoder, self.network, config)

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    autoencoder = frozen_autoencoder.select(self.autoencoder, pretrained["autoencoder"])
    return super().init(rng, pretrained) | {"frozen": {"autoencoder": autoencoder}}

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
    mask, kept = self.mask(batch["key"], step)
    loss = self.errors(params, self.latents(frozen, batch), mask, kept, rng if train else None)
    return {"main": loss.mean()}, {"mask_ratio": mask.mean()}, model_state

  def latents(self, frozen: Tree, batch: Batch) -> jax.Array:
    """The latents of a batch, float32 [b, h', w', d], without a gradient."""
    return latents_lib.encode(self.network, frozen["autoencoder"], images_lib.to_float(batch["image"]))

  def mask(self, keys: jax.Array, step: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """What is masked, and the visible patches, see `masking.padded_mask`.

    Args:
      keys: PRNG keys [b].
      step: the number of completed updates; by default, the rise is over.
    """
    count, least = self.encoder.num_patches, self._least
    step = jnp.int32(self.rise_steps) if step is None else step
    masked = masking.num_masked_at(step, count, self.first_ratio, self.mask_ratio, self.rise_steps)
    return masking.padded_mask(keys, count, masked, least)

  def predict(
    self, params: Mapping[str, Tree], images: jax.Array, kept: jax.Array, rng: Any = None
  ) -> jax.Array:
    main: Any = params["main"]
    options: Any = {} if rng is None else {"train": True, "rngs": {"dropout": rng}}
    variables = {"params": main["encoder"]}
    encoded = self.encoder.apply(variables, images, kept, padded=True, method="encode_kept", **options)
    found: Any = self.decoder.apply({"params": main["decoder"]}, encoded, kept)
    return found

  def predict_fns(self) -> dict[str, PredictFn]:
    def loss(variables, batch, rng):
      masked = self.mask(jax.random.split(rng, len(batch["image"])))
      return {"loss": self.errors(variables["params"], self.latents(variables["frozen"], batch), *masked)}

    def reconstruct(variables, batch, rng):
      latents = self.latents(variables["frozen"], batch)
      hidden, kept = self.mask(jax.random.split(rng, len(latents)))
      target, offset, scale = self.targets(latents)
      # Visible patches as they are; normalised predictions with the mean and scale of the true patch.
      found = jnp.where(hidden[..., None], self.predict(variables["params"], latents, kept), target)
      found = (found * scale + offset).reshape(-1, *self.encoder.grid, found.shape[-1])
      found = unpatchify(found, self.encoder.patch)
      return latents_lib.decode(self.network, variables["frozen"]["autoencoder"], found)

    return super().predict_fns() | {"loss": loss, "reconstruct": reconstruct}
