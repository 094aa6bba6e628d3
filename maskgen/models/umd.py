"""Unified masked diffusion (UMD, Hansen-Estruch et al. 2024): a masked autoencoder that is told how noisy its
input is, and predicts both the image and its noise.

Letters: b batch, h w c image, n patches, k patches that the encoder sees, d width. Images are float32 in
[-1, 1], or as far outside as their noise takes them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from maskgen import sharding
from maskgen.config import check_at_least, fields
from maskgen.errors import UserError
from maskgen.models.patches import patchify, unpatchify
from maskgen.models.remat import REMAT
from maskgen.models.transformer import Transformer, embedding_init, kernel_init
from maskgen.models.vit import ViT
from maskgen.numerics import diffusion, masking
from maskgen.numerics import losses as losses_lib


class Trunk(nn.Module):
  """Two layers with a swish in between, of which the first is twice as wide."""

  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b, d] -> [b, d]
    width = x.shape[-1]
    y = nn.swish(nn.Dense(2 * width, kernel_init=kernel_init, dtype=self.dtype, name="up")(x))
    return nn.Dense(width, kernel_init=kernel_init, dtype=self.dtype, name="down")(y)


class Condition(nn.Module):
  """What the blocks are told: the level of noise and, of a model with classes, the class."""

  width: int
  classes: int
  dtype: str

  @nn.compact
  def __call__(self, level: jax.Array, label: jax.Array) -> jax.Array:  # int32 [b], [b] -> [b, d]
    half = self.width // 2
    angles = level[:, None] * jnp.asarray(1e4 ** (-np.arange(half) / (half - 1)), jnp.float32)[None]
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1).astype(self.dtype)
    found = Trunk(self.dtype, name="time")(waves)
    if self.classes:
      table = sharding.gather(self.param("label_embedding", embedding_init, (self.classes + 1, self.width)))
      found = found + Trunk(self.dtype, name="label")(table.astype(self.dtype)[label])
    return nn.swish(found)


class NoisyViT(ViT):
  """A ViT whose blocks are told how noisy the image is, see `Block`.

  Methods that take no level of noise see images without any, of no class; those are the features.

  Attributes:
    classes: the number of classes, or 0 for a model without.
  """

  image_size: tuple[int, int] = (64, 64)
  patch: int = 4
  pooling: str = "registers"
  registers: int = 4
  classes: int = 0

  def __post_init__(self):
    check_at_least(self, 0, "classes")
    super().__post_init__()
    if self.width % 2 or self.width < 4:
      raise UserError(f"width is {self.width}: give an even number of at least 4, for the level of noise")

  def setup(self):
    super().setup()
    self.condition = Condition(self.width, self.classes, self.dtype)

  def encode_noisy(
    self,
    images: jax.Array,
    kept: jax.Array,
    level: jax.Array,
    label: jax.Array,
    *,
    train: bool = False,
  ) -> tuple[jax.Array, jax.Array]:
    """Like `encode_kept`.

    Args:
      images: [b, h, w, c].
      kept: int32 [b, k], the patches that the network sees, ascending.
      level: int32 [b], 0 for no noise, or the timestep plus 1.
      label: int32 [b], the class, or `classes` for none.
      train: whether to apply dropout.

    Returns:
      The registers and the patches [b, r + k, d], normalised, and what the decoder is told, [b, d].
    """
    condition = self.condition(level, label)
    return self._encode(self.to_pixels(images), train, kept, condition), condition

  def _encode(
    self,
    images: jax.Array,
    train: bool,
    kept: jax.Array | None = None,
    condition: jax.Array | None = None,
    padded: bool = False,
  ) -> jax.Array:
    if condition is None:
      level = jnp.zeros(len(images), jnp.int32)
      condition = self.condition(level, jnp.full_like(level, self.classes))
    return super()._encode(images, train, kept, condition, padded)


class NoisyDecoder(nn.Module):
  """Blocks over one vector of the image and all patches, as wide as the encoder's.

  Attributes:
    grid: the numbers of patches along the height and width of an image.
    outputs: the number of values predicted for a patch.
    depth, heads, hidden, activation: of the blocks, see `ViT`.
    epsilon: of the norms.
    dtype: the type of the computation; parameters and predictions are float32.
    attention, remat, scan: how the blocks are run, see `Transformer`.
  """

  grid: tuple[int, int]
  outputs: int
  depth: int
  heads: int
  hidden: int = 0
  activation: str = "gelu_tanh"
  epsilon: float = 1e-6
  dtype: str = fields.precision("float32")
  attention: str = fields.operational("auto", plain="xla")
  remat: str = fields.operational("none", less_memory=REMAT[1:])
  scan: bool = fields.operational(False)

  @nn.compact
  def __call__(self, latents: jax.Array, kept: jax.Array, condition: jax.Array) -> jax.Array:
    """Predictions float32 [b, n, outputs].

    Args:
      latents: [b, r + k, d], the encoder's output.
      kept: int32 [b, k], which patches it saw, ascending.
      condition: [b, d], what it was told.
    """
    width, registers = latents.shape[-1], latents.shape[1] - kept.shape[1]
    count = self.grid[0] * self.grid[1]
    mask_token = sharding.gather(self.param("mask_token", embedding_init, (1, width))).astype(latents.dtype)
    seen = jax.nn.one_hot(kept, count, dtype=bool).any(axis=1)[..., None]
    x = jnp.where(seen, masking.spread(latents[:, registers:], kept, count), mask_token[None])
    position = sharding.gather(self.param("position", embedding_init, (count, width)))
    x = x + position[None].astype(x.dtype)
    x = jnp.concatenate([latents[:, :registers].mean(axis=1, keepdims=True), x], axis=1)
    blocks = Transformer(
      self.depth,
      self.heads,
      dtype=self.dtype,
      attention=self.attention,
      remat=self.remat,
      scan=self.scan,
      hidden=self.hidden,
      activation=self.activation,
      epsilon=self.epsilon,
      name="decoder",
    )
    x = blocks(sharding.constrain_batch(x), train=False, condition=condition)[:, 1:]
    x = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(x)
    zeros = nn.initializers.zeros
    modulation = nn.Dense(2 * width, kernel_init=zeros, dtype=self.dtype, name="modulation")(condition)
    shift, scale = jnp.split(modulation[:, None], 2, axis=-1)
    x = x * (1.0 + scale) + shift
    head = nn.Dense(self.outputs, kernel_init=embedding_init, dtype=self.dtype, name="head")
    found: jax.Array = head(x).astype(jnp.float32)
    return found


class Masked(NamedTuple):
  """What is masked, bool [b, n], and the visible patches, int32 [b, k], ascending."""

  mask: jax.Array
  kept: jax.Array


class Noised(NamedTuple):
  """How images are noised: timesteps int32 [b], noise float32 [b, h, w, c]; and labels int32 [b], or None."""

  t: jax.Array
  noise: jax.Array
  label: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Umd:
  """Both networks and the noise schedule; methods take their parameters, `encoder` and `decoder`."""

  encoder: NoisyViT
  decoder: NoisyDecoder
  schedule: diffusion.Schedule

  def init(self, key: jax.Array, channels: int) -> dict[str, Any]:
    """Fresh parameters, for images of `channels`."""
    first, second = jax.random.split(key)
    one = jnp.zeros(1, jnp.int32)
    inputs = jnp.zeros((1, *self.encoder.image_size, channels)), one[None], one, one
    (latents, condition), variables = self.encoder.init_with_output(first, *inputs, method="encode_noisy")
    decoder = self.decoder.init(second, latents, one[None], condition)
    return {"encoder": variables["params"], "decoder": decoder["params"]}

  def predict(
    self,
    params: Mapping[str, Any],
    images: jax.Array,
    kept: jax.Array,
    level: jax.Array,
    label: jax.Array | None = None,
    rng: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """The image and its noise, [b, h, w, c] each; see `encode_noisy`, and `rng` is for dropout, if given."""
    options: Any = {} if rng is None else {"train": True, "rngs": {"dropout": rng}}
    inputs = images, kept, level, jnp.full_like(level, self.encoder.classes) if label is None else label
    encoder = {"params": params["encoder"]}
    latents, condition = self.encoder.apply(encoder, *inputs, method="encode_noisy", **options)
    found: Any = self.decoder.apply({"params": params["decoder"]}, latents, kept, condition)
    found = found.reshape(len(images), *self.encoder.grid, 2, -1)
    image, noise = (unpatchify(found[:, :, :, i], self.encoder.patch) for i in range(2))
    return image, noise

  def clean_errors(
    self, params: Mapping[str, Any], images: jax.Array, masked: Masked, rng: jax.Array | None = None
  ) -> jax.Array:
    """The squared errors of images without noise, means over the masked patches, float32 [b]."""
    found, _ = self.predict(params, images, masked.kept, jnp.zeros(len(images), jnp.int32), rng=rng)
    return losses_lib.masked_mean(self._squares(found, images), masked.mask)

  def noisy_errors(
    self,
    params: Mapping[str, Any],
    images: jax.Array,
    masked: Masked,
    noised: Noised,
    rng: jax.Array | None = None,
  ) -> dict[str, jax.Array]:
    """The squared errors of noised images and of their noise, float32 [b] each.

    `image_error` is a mean over the masked patches, or all if none is, `noise_error` over the visible ones.
    """
    noisy = diffusion.add_noise(self.schedule, images, noised.noise, noised.t)
    image, noise = self.predict(params, noisy, masked.kept, noised.t + 1, noised.label, rng)
    all_seen = masked.kept.shape == masked.mask.shape
    wanted = ~masked.mask if all_seen else masked.mask
    return {
      "image_error": losses_lib.masked_mean(self._squares(image, images), wanted),
      "noise_error": losses_lib.masked_mean(self._squares(noise, noised.noise), ~masked.mask),
    }

  def sample(
    self,
    params: Mapping[str, Any],
    noise: jax.Array,
    labels: Sequence[jax.Array],
    scales: Sequence[float | jax.Array],
    *,
    sampler: str,
    steps: int,
  ) -> jax.Array:
    """Samples images by predicting noise; the image that it implies is limited to [-1, 1] at each step.

    Args:
      params: of both networks.
      noise: float32 [b, h, w, c], standard normal.
      labels: int32 [b] each, which guide in turn, see `maskgen.numerics.diffusion.guide_in_turn`.
      scales: one less than these.
      sampler: see `maskgen.numerics.diffusion.sample`.
      steps: likewise.
    """
    needed = diffusion.needed(scales)
    scales, label = [scales[i - 1] for i in needed[1:]], jnp.concatenate([labels[i] for i in needed])
    every = jnp.broadcast_to(jnp.arange(self.encoder.num_patches), (len(label), self.encoder.num_patches))

    def predict(x: jax.Array, t: jax.Array) -> jax.Array:
      copies = jnp.concatenate([x] * len(needed))
      _, found = self.predict(params, copies, every, jnp.full(len(label), t + 1), label)
      guided = diffusion.guide_in_turn(jnp.split(found, len(needed)), scales)
      levels = diffusion.signal_and_noise(self.schedule, t)
      return jnp.clip(diffusion.to_clean(self.schedule, guided, x, *levels), -1.0, 1.0)

    schedule = dataclasses.replace(self.schedule, prediction="clean")
    return diffusion.sample(predict, noise, schedule, sampler=sampler, steps=steps)

  def _squares(self, found: jax.Array, target: jax.Array) -> jax.Array:
    """The mean squared error of each patch, [b, n]."""
    squares = patchify(jnp.square(found - target), self.encoder.patch).mean(axis=-1)
    return squares.reshape(len(squares), -1)
