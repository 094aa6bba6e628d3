"""Masked autoencoders: pixels of masked patches from the visible ones (MAE, He et al. 2022)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from maskgen import config as config_lib
from maskgen import images as images_lib
from maskgen.errors import UserError
from maskgen.models import mae
from maskgen.models.image_encoder import EncoderPart, VitEncoder
from maskgen.models.patches import patchify, unpatchify
from maskgen.models.vit import ViT
from maskgen.numerics import losses as losses_lib
from maskgen.numerics import masking
from maskgen.numerics.positions import Positions
from maskgen.numerics.text import Captions
from maskgen.objectives import Batch, BatchSpec, Metrics, PredictFn, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """Trains `main`: an encoder of the visible patches, and a decoder that predicts the masked ones.

  The loss is the squared error, averaged over the values of the masked patches (section 3).

  Attributes:
    encoder: the network that is kept afterwards. The paper's has pooling="class", fixed_positions=True and
      activation="gelu".
    decoder_width, decoder_depth, decoder_heads: see `PixelDecoder`, which runs as the encoder does.
    mask_ratio: the share of patches that are masked, the same in every example: ceil(n * mask_ratio) of n.
    normalize_targets: whether each patch is standardised over its values before they are compared.
  """

  serving: ClassVar[str] = "maskgen.serving.Model"
  captions: ClassVar[Captions | None] = None
  num_classes: ClassVar[int] = 0
  codebook_size: ClassVar[int] = 0

  encoder: ViT
  decoder_width: int = 512
  decoder_depth: int = 8
  decoder_heads: int = 16
  mask_ratio: float = 0.75
  normalize_targets: bool = True

  def __post_init__(self):
    config_lib.check_at_least(self, 1, "decoder_width", "decoder_depth", "decoder_heads")
    config_lib.check_share(self, "mask_ratio")
    if self.decoder_width % 4 or self.decoder_width % self.decoder_heads:
      raise UserError(
        f"decoder_width is {self.decoder_width}: give a multiple of 4 and of decoder_heads, "
        f"{self.decoder_heads}"
      )
    if self.encoder.pooling == "attention":
      raise UserError("encoder.pooling='attention' has a head that no loss trains: give 'class' or 'mean'")
    masked = masking.num_dropped(self.encoder.num_patches, self._ratio)
    if not 0 < masked < self.encoder.num_patches:
      raise UserError(
        f"mask_ratio={self.mask_ratio} masks {masked} of {self.encoder.num_patches} patches: some must be "
        "masked, and some visible"
      )

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return (*self.encoder.image_size, self.encoder.channels)

  @property
  def image_encoder(self) -> EncoderPart:
    """The encoder, which other objectives can use."""
    network = self.encoder.clone(hidden=self.encoder.hidden or 4 * self.encoder.width)
    return EncoderPart(VitEncoder(network), "params/main/encoder")

  @property
  def decoder(self) -> mae.PixelDecoder:
    """The network behind the encoder."""
    sizes = (self.decoder_width, self.decoder_depth, self.decoder_heads)
    return mae.decoder_of(self.encoder, *sizes)

  @property
  def _ratio(self) -> masking.MaskRatio:
    return masking.MaskRatio.constant(self.mask_ratio)

  def batch_spec(self) -> BatchSpec:
    return BatchSpec(image_shape=self.image_shape)

  def pretrained_shapes(self) -> dict[str, Tree]:
    return {}

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    params = mae.init(self.encoder, self.decoder, rng)
    return {"params": {"main": params}, "frozen": {}, "extra": {}}

  def positions(self) -> dict[str, Positions]:
    table = {"main/encoder/position": self.image_encoder.encoder.positions}
    return {} if self.encoder.fixed_positions else table

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
    mask, kept = self.mask(batch["key"])
    images = self.images(batch)
    loss = self.errors(params, images, mask, kept, rng if train else None)
    return {"main": loss.mean()}, {}, model_state

  def images(self, batch: Batch) -> jax.Array:
    """What the other methods take as images, float32."""
    return images_lib.to_float(batch["image"])

  def mask(self, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is masked, bool [b, n], and the visible patches, int32 [b, k], by PRNG keys [b]."""
    return masking.random_mask(keys, self.encoder.num_patches, self._ratio)

  def errors(
    self, params: Mapping[str, Tree], images: jax.Array, mask: jax.Array, kept: jax.Array, rng: Any = None
  ) -> jax.Array:
    """The loss of each example, float32 [b].

    Args:
      params: as `init` returns them.
      images: float32 [b, h, w, c] in [0, 1].
      mask: bool [b, n], what is masked.
      kept: int32 [b, k], the visible patches, ascending.
      rng: for dropout and drop path of the encoder, or None.
    """
    target, _, _ = self.targets(images)
    squares = jnp.square(self.predict(params, images, kept, rng) - target).mean(axis=-1)
    return losses_lib.masked_mean(squares, mask)

  def targets(self, images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the decoder predicts, float32 [b, n, p * p * c], and its offset and scale, each [b, n, 1]."""
    found = patchify(self.encoder.standardize(images), self.encoder.patch)
    found = found.reshape(len(images), -1, found.shape[-1])
    if not self.normalize_targets:
      return found, jnp.zeros_like(found[..., :1]), jnp.ones_like(found[..., :1])
    offset = found.mean(axis=-1, keepdims=True)
    scale = jnp.sqrt(found.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
    return (found - offset) / scale, offset, scale

  def predict(
    self, params: Mapping[str, Tree], images: jax.Array, kept: jax.Array, rng: Any = None
  ) -> jax.Array:
    """Predictions of all patches, float32 [b, n, p * p * c], from the visible ones."""
    main: Any = params["main"]
    options: Any = {} if rng is None else {"train": True, "rngs": {"dropout": rng}}
    latents = self.encoder.apply({"params": main["encoder"]}, images, kept, method="encode_kept", **options)
    found: Any = self.decoder.apply({"params": main["decoder"]}, latents, kept)
    return found

  def predict_fns(self) -> dict[str, PredictFn]:
    def loss(variables, batch, rng):
      images = self.images(batch)
      return {
        "loss": self.errors(variables["params"], images, *self.mask(jax.random.split(rng, len(images))))
      }

    def mask(variables, batch, rng):
      return self.mask(batch["key"])[0].reshape(-1, *self.encoder.grid)

    def reconstruct(variables, batch, rng):
      images = self.images(batch)
      hidden, kept = self.mask(jax.random.split(rng, len(images)))
      target, offset, scale = self.targets(images)
      # Visible patches as they are; normalised predictions with the mean and scale of the true patch.
      found = jnp.where(hidden[..., None], self.predict(variables["params"], images, kept), target)
      found = (found * scale + offset).reshape(-1, *self.encoder.grid, found.shape[-1])
      return jnp.clip(self.encoder.to_pixels(unpatchify(found, self.encoder.patch)), 0.0, 1.0)

    own: tuple[PredictFn, ...] = (loss, mask, reconstruct)
    return {fn.__name__: fn for fn in own} | self.image_encoder.predict_fns()
