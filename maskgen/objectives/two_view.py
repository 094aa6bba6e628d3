"""Masked autoencoders of two views: CropMAE (Eymaël et al. 2024), SiamMAE (Gupta et al. 2023), CroCo
(Weinzaepfel et al. 2022).

One network encodes a whole view and a few patches of another one. The decoder predicts the rest of the latter
and attends to the former. CropMAE's views are a picture and a crop of it, SiamMAE's two frames of a film.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from maskgen import config as config_lib
from maskgen import images as images_lib
from maskgen.errors import UserError
from maskgen.models import mae
from maskgen.models.transformer import check_attention
from maskgen.objectives import Batch, BatchSpec, PredictFn, masked_pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(masked_pixels.Objective):
  """Trains `main`, an encoder and a decoder, on `image`, the whole view, and `image2`, the masked one.

  The methods take both as images float32 [b, 2, h, w, c]. In predictions, a batch without `image2` is decoded
  beside itself; `reconstruct` is always of `image`.

  Attributes:
    decoder_hidden, decoder_order, decoder_post_norm, decoder_dropout: see `CrossDecoder`. The defaults are
      CropMAE's. CroCo's blocks have ("self", "cross", "mlp") and decoder_post_norm=False.
  """

  decoder_width: int = 256
  decoder_depth: int = 4
  decoder_heads: int = 8
  decoder_hidden: int = 2048
  decoder_order: tuple[str, ...] = mae.PARTS
  decoder_post_norm: bool = True
  decoder_dropout: float = 0.1

  def __post_init__(self):
    super().__post_init__()
    config_lib.check_at_least(self, 1, "decoder_hidden")
    config_lib.check_share(self, "decoder_dropout")
    check_attention(self.encoder.attention, self.encoder.dtype, self.decoder_dropout)
    if sorted(self.decoder_order) != sorted(mae.PARTS):
      raise UserError(f"decoder_order is {self.decoder_order}: give {', '.join(mae.PARTS)} in any order")

  @property
  def decoder(self) -> mae.CrossDecoder:
    return mae.CrossDecoder(
      **mae.fields_from(self.encoder),
      width=self.decoder_width,
      depth=self.decoder_depth,
      heads=self.decoder_heads,
      hidden=self.decoder_hidden,
      order=self.decoder_order,
      post_norm=self.decoder_post_norm,
      dropout=self.decoder_dropout,
    )

  def batch_spec(self) -> BatchSpec:
    return dataclasses.replace(super().batch_spec(), views=2)

  def images(self, batch: Batch) -> jax.Array:
    views = (batch["image"], batch.get("image2", batch["image"]))
    return jnp.stack([images_lib.to_float(view) for view in views], axis=1)

  def targets(self, images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return super().targets(images[:, 1])

  def predict(self, params: Any, images: jax.Array, kept: jax.Array, rng: Any = None) -> jax.Array:
    main, count = params["main"], self.encoder.num_patches
    every = jnp.broadcast_to(jnp.arange(count)[None], (len(images), count))

    def options(number: int) -> Any:
      return {} if rng is None else {"train": True, "rngs": {"dropout": jax.random.fold_in(rng, number)}}

    def encode(view: int, kept: jax.Array) -> Any:
      variables = {"params": main["encoder"]}
      return self.encoder.apply(variables, images[:, view], kept, method="encode_kept", **options(view))

    whole, masked = encode(0, every), encode(1, kept)
    found: Any = self.decoder.apply({"params": main["decoder"]}, masked, kept, whole, **options(2))
    return found

  def predict_fns(self) -> dict[str, PredictFn]:
    found = super().predict_fns()

    def reconstruct(variables, batch, rng):
      return found["reconstruct"](variables, {"image": batch["image"]}, rng)

    return found | {"reconstruct": reconstruct}
