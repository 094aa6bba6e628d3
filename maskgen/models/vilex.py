"""A frozen text-to-image model whose prompts hold images as well as words (ViLex, Wang et al. 2024).

The vectors of images and the embeddings of words together form the text encoder's input; with several text
encoders, their embeddings are concatenated, d in total. Letters: b batch, l positions, n vectors, h w image.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskgen.config import check_at_least, fields
from maskgen.models.text_to_image import TextToImage
from maskgen.models.unet import Condition
from maskgen.numerics import diffusion, prompts
from maskgen.numerics.prompts import Frame, Segment


@dataclasses.dataclass(frozen=True)
class ImageWordsSampling:
  """How images are sampled.

  Attributes:
    steps: the number of sampling steps, each one call of the network.
    sampler: one of `maskgen.numerics.diffusion.SAMPLERS`.
    image_guidance: the weight of the prompt's images: 0 ignores them, 1 is the model as trained.
    text_guidance: the weight of its words, likewise; text-free guidance (section 3.3).
  """

  steps: int = fields.static(25)
  sampler: str = fields.static("dpm")
  image_guidance: float = fields.static(2.0, at=(0.0, 1.0))
  text_guidance: float = fields.static(2.0, at=(0.0, 1.0))

  def __post_init__(self):
    diffusion.DiffusionSampling(self.steps, self.sampler)  # checks them
    check_at_least(self, 0, "image_guidance", "text_guidance")


@dataclasses.dataclass(frozen=True)
class FrozenTextToImage:
  """Pure functions of the frozen parameters.

  Attributes:
    model: the networks.
    image_size: (h, w).
    length: l.
    start_id, end_id: of the tokenizers.
    padding_ids: of each text encoder's tokenizer.
    param_dtype: of all parameters except the autoencoder's, which are float32: some autoencoders overflow in
      16 bits.
  """

  model: TextToImage
  image_size: tuple[int, int]
  length: int
  start_id: int
  end_id: int
  padding_ids: tuple[int, ...]
  param_dtype: str = fields.precision("float32")

  def shapes(self) -> dict[str, Any]:
    """The shapes of the frozen parameters, `{part: tree}`."""
    return {
      part: shapes if part == "vae" else jax.tree.map(self._stored, shapes)
      for part, shapes in self.model.shapes().items()
    }

  def _stored(self, leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, self.param_dtype)

  @property
  def max_prompt_tokens(self) -> int:
    """The number of vectors and words that fit in a prompt."""
    return self.length - 2

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """The shape of one image's latent."""
    height, width = (side // self.model.autoencoder.factor for side in self.image_size)
    return height, width, self.model.unet.in_channels

  def scale(self, params: Any) -> jax.Array:
    """The root mean square of each text encoder's vocabulary, repeated over its width; float32 [d]."""
    return jnp.concatenate(
      [
        jnp.full(table.shape[-1], jnp.sqrt(jnp.square(table).mean()), jnp.float32)
        for table in self._tables(params)
      ]
    )

  def vocabulary(self, params: Any) -> jax.Array:
    """The embeddings of all ids, float32 [ids, d], each text encoder's divided by their root mean square."""
    return jnp.concatenate(self._tables(params), axis=-1)[0] / self.scale(params)[None]

  def _tables(self, params: Any) -> tuple[jax.Array, ...]:
    """Each text encoder's vocabulary, float32 [1, ids, d]."""
    ids = [jnp.arange(encoder.vocabulary_size)[None] for encoder in self.model.text_encoders]
    return self.model.embed(params, ids)

  def words(self, params: Any, ids: jax.Array, number: jax.Array) -> Segment:
    """The first words, int32 [b], of ids int32 [b, n]."""
    return Segment(self._embed(params, [ids] * len(self.padding_ids)), number)

  def caption(self, params: Any, ids: jax.Array) -> Segment:
    """The words of captions int32 [b, n] that begin with the start id and have an end id."""
    return self.words(params, ids[:, 1:-1], (ids == self.end_id).argmax(axis=1).astype(jnp.int32) - 1)

  def condition(
    self, params: Any, segments: Sequence[Segment], sizes: jax.Array | None = None
  ) -> tuple[Condition, jax.Array]:
    """The U-Net's condition for a prompt of these segments, and the position of its end, int32 [b].

    `sizes` are those of `TextToImage.condition`, int [b, 6], by default of whole images.
    """
    special = [jnp.array([[self.start_id, self.end_id, padding]]) for padding in self.padding_ids]
    prompt = prompts.assemble(segments, Frame(*self._embed(params, special)[0]), self.length)
    ends = np.cumsum(self.model.text_widths)[:-1]
    parts = jnp.split(prompt.embeddings, ends, axis=-1)
    size = self.image_size if sizes is None else sizes
    return self.model.condition(params, parts, prompt.end, size), prompt.end

  def nothing(self, params: Any, batch: int) -> Condition:
    """The condition that guidance moves away from: that of an empty prompt."""
    none = jnp.zeros((batch,), jnp.int32)
    empty, _ = self.condition(params, [self.words(params, none[:, None], none)])
    return self.model.null(empty)

  def misalignment(self, params: Any, tokens: Segment, caption: Segment) -> jax.Array:
    """The mean squared distance of the text encoder's outputs at two prompts' ends; float32 [b]."""

    def at_end(segment: Segment) -> jax.Array:
      condition, end = self.condition(params, [segment])
      return jnp.take_along_axis(condition.context, end[:, None, None], axis=1)[:, 0]

    return jnp.square(at_end(tokens) - jax.lax.stop_gradient(at_end(caption))).mean(axis=-1)

  def noise(self, keys: jax.Array) -> jax.Array:
    """Standard normal latents [b, h, w, c], one for each key."""
    return jax.vmap(lambda key: jax.random.normal(key, self.latent_shape))(keys)

  def draw(
    self,
    params: Any,
    noise: jax.Array,
    words: Sequence[Segment],
    images: Sequence[Segment],
    negative: Segment | None = None,
    *,
    image_guidance: float | jax.Array,
    text_guidance: float | jax.Array,
    sampler: str,
    steps: int,
  ) -> jax.Array:
    """Samples images float32 [b, h, w, c] in [0, 1].

    Guidance moves from the empty prompt to the prompt's images, and from there to its images and words. With
    an image_guidance of 1 this is text-free guidance (Wang et al. 2024, section 3.3).

    Args:
      params: frozen.
      noise: float32 [b, h, w, c], from `noise` or elsewhere.
      words: of the prompt: those before, between and after its images; or none.
      images: of the prompt.
      negative: what guidance moves away from, instead of the empty prompt.
      image_guidance: see `ImageWordsSampling`, as for the others.
      text_guidance: likewise.
      sampler: likewise.
      steps: likewise.
    """
    nothing = self.nothing(params, len(noise)) if negative is None else self.condition(params, [negative])[0]
    conditions, scales = [nothing], []
    if images:
      conditions.append(self.condition(params, images)[0])
      scales.append(image_guidance)
    if words:
      pairs = zip(words[1:], images, strict=True)
      both = [words[0], *(segment for text, image in pairs for segment in (image, text))]
      conditions.append(self.condition(params, both)[0])
      scales.append(text_guidance)
    return self.model.sample(params, noise, conditions, scales, sampler=sampler, steps=steps)

  def _embed(self, params: Any, ids: Sequence[jax.Array]) -> jax.Array:
    """Ids int32 [b, n] from each tokenizer to float32 [b, n, d]."""
    return jnp.concatenate(self.model.embed(params, ids), axis=-1)
