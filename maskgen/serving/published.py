"""Published models that are not trained here, as `maskgen.tools.convert` writes them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from maskgen import config as config_lib
from maskgen import objectives, storage
from maskgen.config import fields
from maskgen.importers import diffusers
from maskgen.models import image_encoder
from maskgen.models.image_encoder import EncoderPart
from maskgen.models.vilex import FrozenTextToImage
from maskgen.numerics import diffusion
from maskgen.numerics.text import Captions
from maskgen.objectives import PredictFn, Tree


@dataclasses.dataclass(frozen=True)
class TextToImageSampling(diffusion.DiffusionSampling):
  """How images are sampled.

  Attributes:
    steps: the number of sampling steps, each one call of the network.
    sampler: one of `maskgen.numerics.diffusion.SAMPLERS`; "dpm" needs fewer steps.
    guidance: the scale: 0 ignores the prompt, 1 is the model as trained, larger values strengthen the prompt
      and reduce variety.
    height, width: of the images in pixels; 0 for those of the model.
  """

  height: int = fields.static(0)
  width: int = fields.static(0)

  def __post_init__(self):
    super().__post_init__()
    config_lib.check_at_least(self, 0, "height", "width")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextToImage:
  """What an objective is to a model that maskgen trained: the functions of a text-to-image model.

  Attributes:
    decoder: the folder of the model.
    sampling: default options of generation.
  """

  serving: ClassVar[str] = "maskgen.serving.TextToImageModel"
  num_classes: ClassVar[int] = 0

  decoder: diffusers.Folder
  sampling: TextToImageSampling = TextToImageSampling()

  def __post_init__(self):
    diffusion.visited(self.text_to_image.model.schedule, self.sampling.sampler, self.sampling.steps)
    self._of_size(self.sampling.height, self.sampling.width)

  @property
  def text_to_image(self) -> FrozenTextToImage:
    """The networks."""
    return self._read[0]

  @property
  def captions(self) -> Captions:
    """How texts are tokenized."""
    return self._read[1]

  @functools.cached_property
  def _read(self) -> tuple[FrozenTextToImage, Captions]:
    return diffusers.frozen(self.decoder)

  def _of_size(self, height: int, width: int) -> FrozenTextToImage:
    """The networks for images of a size in pixels, where 0 means the model's."""
    size = (height or self.decoder.image_size[0], width or self.decoder.image_size[1])
    diffusers.check_image_size(self.text_to_image.model, size)
    return dataclasses.replace(self.text_to_image, image_size=size)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return (*self.decoder.image_size, 3)

  def pretrained_shapes(self) -> dict[str, Tree]:
    return {}

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    return {"params": {"main": self.text_to_image.model.init(rng)}}

  def predict_fns(self) -> dict[str, PredictFn]:
    """Only `generate`; its batch may have `noise` [b, h, w, c], of the latents, in place of `key`."""

    def generate(variables, batch, rng, **options):
      params, chosen = variables["params"]["main"], dataclasses.asdict(self.sampling) | options
      model = self._of_size(chosen.pop("height"), chosen.pop("width"))
      if "negative" in batch and "caption" not in batch:
        empty = jnp.asarray(self.captions.read([""]))
        batch = {**batch, "caption": jnp.broadcast_to(empty, batch["negative"].shape)}
      words, negative = (
        model.caption(params, batch[name]) if name in batch else None for name in ("caption", "negative")
      )
      noise = batch["noise"] if "noise" in batch else model.noise(batch["key"])
      guidance = {"image_guidance": 1.0, "text_guidance": chosen.pop("guidance")}
      return model.draw(params, noise, [words] if words else [], [], negative, **guidance, **chosen)

    return {"generate": generate}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageEncoder:
  """The same of an image encoder.

  Attributes:
    part: the encoder.
  """

  num_classes: ClassVar[int] = 0
  captions: ClassVar[None] = None

  part: EncoderPart

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return self.part.encoder.image_shape

  def pretrained_shapes(self) -> dict[str, Tree]:
    return {}

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    return {"params": {"main": self.part.encoder.init(rng)}}

  def predict_fns(self) -> dict[str, PredictFn]:
    """`features` and `patches`."""
    return self.part.predict_fns()


def _image_encoder(config: Mapping[str, Any]) -> ImageEncoder:
  return ImageEncoder(part=objectives.encoder_part(storage.model_section(config), "its config"))


def _text_to_image(config: Mapping[str, Any]) -> TextToImage:
  decoder = {key: value for key, value in config["decoder"].items() if key != "name"}
  return config_lib.build_dataclass(TextToImage, {"decoder": decoder}, "its config")


# By the `network` that the config.json of a converted model names: from this config to what predicts.
NETWORKS: dict[str, Callable[[Mapping[str, Any]], TextToImage | ImageEncoder]] = {
  "text_to_image": _text_to_image,
  **dict.fromkeys(image_encoder.NETWORKS, _image_encoder),
}
