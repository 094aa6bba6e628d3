"""The diffusion objective: a text-to-image model of pixels (Ho et al. 2020; Rombach et al. 2022).

Letters: b batch, h w image, l positions of a caption.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from maskgen import config as config_lib
from maskgen import images as images_lib
from maskgen.errors import UserError
from maskgen.models.patches import Patches
from maskgen.models.text_encoder import TextEncoder
from maskgen.models.text_to_image import ERROR_KEYS, TextToImage
from maskgen.models.unet import Condition, UNet
from maskgen.numerics import diffusion
from maskgen.numerics.text import Captions
from maskgen.objectives import Batch, BatchSpec, Metrics, PredictFn, Tree, check_image_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """Trains `main`, a text encoder and a U-Net, to denoise captioned images.

  The pooled text is added to the U-Net's time embedding.

  Attributes:
    image_size: (h, w) of the images.
    patch: the side in pixels of the squares that are single pixels to the U-Net; larger ones cost less.
    captions: how captions are tokenized.
    text_encoder: its vocabulary and number of positions are set from `captions`.
    unet: its input and output channels are set from `patch`, its widths of context and pooled text from the
      text encoder.
    schedule: of the noise; timesteps are drawn uniformly, and the loss is the mean squared error.
    caption_dropout: the share of examples that are trained with an empty caption, which guidance needs.
    sampling: default options of generation.
  """

  serving: ClassVar[str] = "maskgen.serving.TextToImageModel"

  image_size: tuple[int, int]
  patch: int = 1
  captions: Captions
  text_encoder: TextEncoder = TextEncoder()
  unet: UNet = UNet()
  schedule: diffusion.Schedule = diffusion.Schedule()
  caption_dropout: float = 0.1
  sampling: diffusion.DiffusionSampling = diffusion.DiffusionSampling()

  def __post_init__(self):
    check_image_size(self.image_size)
    config_lib.check_at_least(self, 1, "patch")
    config_lib.check_share(self, "caption_dropout")
    side = self.patch * self.unet.factor
    if self.image_size[0] % side or self.image_size[1] % side:
      raise UserError(
        f"image_size is {self.image_size}: height and width must be multiples of {side}, patch times the "
        "U-Net's factor"
      )
    diffusion.visited(self.schedule, self.sampling.sampler, self.sampling.steps)

  @property
  def codebook_size(self) -> int:
    return 0

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return (*self.image_size, 3)

  @property
  def num_classes(self) -> int:
    return 0

  @property
  def model(self) -> TextToImage:
    """The networks."""
    encoder = self.text_encoder.clone(
      vocabulary_size=self.captions.opened.vocabulary_size, positions=self.captions.length
    )
    patches = Patches(self.patch)
    unet = self.unet.clone(
      in_channels=patches.latent_channels,
      out_channels=patches.latent_channels,
      context_width=encoder.width,
      pooled_width=encoder.pooled_width,
      size_width=0,
    )
    return TextToImage((encoder,), unet, patches, self.schedule)

  def batch_spec(self) -> BatchSpec:
    return BatchSpec(image_shape=self.image_shape, captions=self.captions)

  def pretrained_shapes(self) -> dict[str, Tree]:
    return {}

  def check_pretrained(self, name: str, config: Mapping[str, Any]) -> None:
    """Nothing is pretrained."""

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    return {"params": {"main": self.model.init(rng)}, "frozen": {}, "extra": {}}

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
    captions = batch["caption"]
    if train:
      keys = jax.vmap(lambda key: jax.random.fold_in(key, ERROR_KEYS))(batch["key"])
      drop = jax.vmap(lambda key: jax.random.bernoulli(key, self.caption_dropout))(keys)
      captions = jnp.where(drop[:, None], self._empty, captions)
    return {"main": self._errors(params["main"], batch, captions).mean()}, {}, model_state

  def _errors(self, params: Tree, batch: Batch, captions: jax.Array) -> jax.Array:
    """The mean squared error of each example, [b], at a timestep and with noise drawn for it."""
    images = images_lib.to_float(batch["image"])
    return self.model.errors(params, images, [self._condition(params, captions)], batch["key"])[0]

  def _condition(self, params: Tree, captions: jax.Array) -> Condition:
    """The U-Net's condition for captions int32 [b, l]."""
    end = (captions == self.captions.opened.end_id).argmax(axis=1)
    return self.model.condition(params, self.model.embed(params, [captions]), end)

  @property
  def _empty(self) -> jax.Array:
    """An empty caption, int32 [1, l]."""
    return jnp.asarray(self.captions.read([""]))

  def predict_fns(self) -> dict[str, PredictFn]:
    def loss(variables, batch, rng):
      batch = {**batch, "key": jax.random.split(rng, len(batch["image"]))}
      return {"loss": self._errors(variables["params"]["main"], batch, batch["caption"])}

    def generate(variables, batch, rng, **options):
      params, options = variables["params"]["main"], dataclasses.asdict(self.sampling) | options
      model, count = self.model, len(batch["key"])
      condition = self._condition(params, jnp.tile(self._empty, (count, 1)))
      null = self._condition(params, batch["negative"]) if "negative" in batch else condition
      if "caption" in batch:
        condition = self._condition(params, batch["caption"])
      elif "negative" not in batch:
        options["guidance"] = 1.0
      grid = [side // self.patch for side in self.image_size]
      shape = (*grid, model.unet.in_channels)
      noise = jax.vmap(lambda key: jax.random.normal(key, shape))(batch["key"])
      return model.generate(params, noise, condition, null, **options)

    return {"loss": loss, "generate": generate}
