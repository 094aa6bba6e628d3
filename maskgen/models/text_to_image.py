"""A complete text-to-image model: text encoders, U-Net, autoencoder and noise schedule.

Parameters are `{part: tree}` with the parts "text_encoder", "text_encoder_2" if there are two, "unet" and
"vae", as in a published folder; "vae" is empty for a model on pixels. Letters: b batch, l positions, h w
latent image, c its channels.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen.models.autoencoder_kl import AutoencoderKL, Gaussian
from maskgen.models.patches import Patches
from maskgen.models.text_encoder import Encoded, TextEncoder
from maskgen.models.unet import NUM_SIZES, Condition, UNet
from maskgen.numerics import diffusion
from maskgen.numerics import losses as losses_lib

TEXT_PARTS = ("text_encoder", "text_encoder_2")
# `errors` draws timestep, noise and latent from this many first children of an example's key.
ERROR_KEYS = 3


@dataclasses.dataclass(frozen=True)
class TextToImage:
  """The modules, and pure functions of their parameters.

  Attributes:
    text_encoders: one, or for SDXL two, whose hidden states are concatenated.
    unet: predicts what `schedule.prediction` names.
    autoencoder: between images and latents, or between images and squares of pixels.
    schedule: of the noise.
    zero_null: whether the condition without a prompt is zero, as in SDXL, or that of an empty text.
  """

  text_encoders: tuple[TextEncoder, ...]
  unet: UNet
  autoencoder: AutoencoderKL | Patches
  schedule: diffusion.Schedule
  zero_null: bool = False

  @property
  def text_widths(self) -> tuple[int, ...]:
    """The width of each text encoder's embeddings."""
    return tuple(encoder.width for encoder in self.text_encoders)

  def init(self, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters of all parts, `{part: tree}`."""
    keys = iter(jax.random.split(key, len(self.text_encoders) + 2))
    one = jnp.zeros((1,), jnp.int32)
    params = {
      part: encoder.init(next(keys), jnp.zeros((1, 2), jnp.int32), one)["params"]
      for part, encoder in zip(TEXT_PARTS, self.text_encoders, strict=False)
    }
    pooled, sizes = jnp.zeros((1, self.unet.pooled_width)), jnp.zeros((1, NUM_SIZES))
    condition = Condition(jnp.zeros((1, 2, self.unet.context_width)), pooled, sizes)
    noisy = jnp.zeros((1, self.unet.factor, self.unet.factor, self.unet.in_channels))
    params["unet"] = self.unet.init(next(keys), noisy, one, condition)["params"]
    side = self.autoencoder.factor
    images = jnp.zeros((1, side, side, self.autoencoder.image_channels))
    params["vae"] = self.autoencoder.init(next(keys), images).get("params", {})
    return params

  def shapes(self) -> dict[str, Any]:
    """The shapes of all parameters, `{part: tree}`."""
    return jax.eval_shape(self.init, jax.random.key(0))

  def embed(self, params: Any, ids: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Looks up ids int32 [b, l] from each text encoder's tokenizer; float32 [b, l, d] for each."""
    return tuple(
      _run(encoder, params[part], "embed", one)
      for part, encoder, one in zip(TEXT_PARTS, self.text_encoders, ids, strict=False)
    )

  def condition(
    self,
    params: Any,
    embeddings: Sequence[jax.Array],
    end: jax.Array,
    size: tuple[int, int] | jax.Array = (1024, 1024),
  ) -> Condition:
    """The U-Net's condition for a prompt of embeddings.

    Args:
      params: of all parts.
      embeddings: float [b, l, d] for each text encoder, from `embed` or elsewhere.
      end: int32 [b], the position of the first end id.
      size: of the image, (height, width) in pixels; used only by models that take sizes (SDXL), as the size
        of both original and target, without a crop. Or all six numbers of each image, int [b, 6]: height and
        width of the original, top and left of the crop, height and width of the target.
    """
    encoded: list[Encoded] = [
      _run(encoder, params[part], "encode", one, end)
      for part, encoder, one in zip(TEXT_PARTS, self.text_encoders, embeddings, strict=False)
    ]
    if not self.unet.pooled_width:
      return Condition(encoded[0].last)
    if not self.unet.size_width:
      return Condition(encoded[0].last, encoded[0].pooled)
    context = jnp.concatenate([one.penultimate for one in encoded], axis=-1)
    if isinstance(size, tuple):
      size = jnp.tile(jnp.array([[*size, 0, 0, *size]]), (len(context), 1))
    return Condition(context, encoded[-1].pooled, size.astype(jnp.float32))

  def null(self, empty: Condition) -> Condition:
    """What guidance moves away from, given the condition of an empty (or negative) prompt."""
    if not self.zero_null:
      return empty
    pooled = None if empty.pooled is None else jnp.zeros_like(empty.pooled)
    return Condition(jnp.zeros_like(empty.context), pooled, empty.sizes)

  def predict(self, params: Any, noisy: jax.Array, t: jax.Array, condition: Condition) -> jax.Array:
    """The U-Net on noisy latents float [b, h, w, c] at timesteps t int32 [b]; float32 [b, h, w, c]."""
    return _run(self.unet, params["unet"], "__call__", noisy, t, condition)

  def encode(self, params: Any, images: jax.Array) -> Gaussian:
    """Images float32 [b, height, width, 3] in [0, 1] to the distribution of their latents."""
    return _run(self.autoencoder, params["vae"], "encode", images)

  def decode(self, params: Any, latents: jax.Array) -> jax.Array:
    """Latents float32 [b, h, w, c] to images float32 [b, height, width, 3] in [0, 1]."""
    return jnp.clip(_run(self.autoencoder, params["vae"], "decode", latents), 0.0, 1.0)

  def errors(
    self,
    params: Any,
    images: jax.Array,
    conditions: Sequence[Condition],
    keys: jax.Array,
    min_timestep: int = 0,
  ) -> jax.Array:
    """The unweighted diffusion loss at timesteps drawn uniformly.

    Args:
      params: of all parts; no gradients flow through the autoencoder.
      images: float32 [b, height, width, 3] in [0, 1].
      conditions: s of them, which share timestep and noise.
      keys: one per example, of which `ERROR_KEYS` children are used.
      min_timestep: the smallest timestep that is drawn.

    Returns:
      Mean squared errors, float32 [s, b].
    """
    latents = self.encode(params, images)

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
      step, noise, latent = (jax.random.fold_in(key, i) for i in range(ERROR_KEYS))
      t = jax.random.randint(step, (), min_timestep, self.schedule.steps)
      shape = latents.mean.shape[1:]
      return t, jax.random.normal(noise, shape), jax.random.normal(latent, shape)

    t, noise, latent_noise = jax.vmap(draw)(keys)
    clean = jax.lax.stop_gradient(latents.mean + latents.std * latent_noise)
    noisy, target = (fn(self.schedule, clean, noise, t) for fn in (diffusion.add_noise, diffusion.target))

    def error(condition: Condition) -> jax.Array:
      predicted = self.predict(params, noisy, t, condition)
      return losses_lib.mean_per_example(jnp.square(predicted - target))

    if len(conditions) == 1:
      return error(conditions[0])[None]
    return jax.lax.map(error, jax.tree.map(lambda *leaves: jnp.stack(leaves), *conditions))

  def generate(
    self,
    params: Any,
    noise: jax.Array,
    condition: Condition,
    null: Condition,
    *,
    guidance: float | jax.Array = 7.5,
    sampler: str = "dpm",
    steps: int = 25,
  ) -> jax.Array:
    """Samples images.

    Args:
      params: of all parts.
      noise: float32 [b, h, w, c], standard normal.
      condition: what to generate.
      null: what guidance moves away from, see `null`.
      guidance: see `maskgen.numerics.diffusion.DiffusionSampling`.
      sampler: see `maskgen.numerics.diffusion.sample`.
      steps: likewise.

    Returns:
      float32 [b, height, width, 3] in [0, 1].
    """
    return self.sample(params, noise, [null, condition], [guidance], sampler=sampler, steps=steps)

  def sample(
    self,
    params: Any,
    noise: jax.Array,
    conditions: Sequence[Condition],
    scales: Sequence[float | jax.Array],
    *,
    sampler: str,
    steps: int,
  ) -> jax.Array:
    """Like `generate`, guided in turn by several conditions, of which only those that matter are evaluated.

    Args:
      params: as for `generate`.
      noise: likewise.
      conditions: c of them, see `maskgen.numerics.diffusion.guide_in_turn`.
      scales: c - 1 of them; with numbers such as 0 and 1 fewer conditions matter, see
        `maskgen.numerics.diffusion.needed`.
      sampler: as for `generate`.
      steps: likewise.
    """
    needed = diffusion.needed(scales)
    scales = [scales[i - 1] for i in needed[1:]]
    together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(conditions[i] for i in needed))

    def predict(x: jax.Array, t: jax.Array) -> jax.Array:
      copies = jnp.concatenate([x] * len(needed))
      found = self.predict(params, copies, jnp.tile(t, len(copies)), together)
      return diffusion.guide_in_turn(jnp.split(found, len(needed)), scales)

    return self.decode(params, diffusion.sample(predict, noise, self.schedule, sampler=sampler, steps=steps))


def _run(module: nn.Module, params: Any, method: str, *args: Any) -> Any:
  return module.apply({"params": params}, *args, method=method)
