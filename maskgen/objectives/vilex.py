"""The ViLex objective: images as words for a frozen text-to-image model (Wang et al. 2024, section 3).

Letters: b batch, s images in a prompt, n tokens of an image, m words, l positions, d width of the embeddings.
"""

import dataclasses
import functools
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from maskgen import config as config_lib
from maskgen import images as images_lib
from maskgen import objectives, sharding, storage
from maskgen.batch import ArraySpec
from maskgen.config import fields
from maskgen.errors import UserError
from maskgen.importers import diffusers
from maskgen.models.attention_pool import AttentionPool
from maskgen.models.image_encoder import IMAGE_CHANNELS, EncoderPart
from maskgen.models.text_to_image import ERROR_KEYS
from maskgen.models.unet import NUM_SIZES
from maskgen.models.vilex import FrozenTextToImage, ImageWordsSampling
from maskgen.numerics import diffusion, prompts
from maskgen.numerics.positions import Positions
from maskgen.numerics.prompts import Segment, TailDrop, Words
from maskgen.numerics.text import Captions
from maskgen.objectives import Batch, BatchSpec, Metrics, PredictFn, Tree, check_same, frozen_decoder

# Folded into an example's key to draw its number of tokens and its words.
_TAIL_DROP, _WORDS = ERROR_KEYS, ERROR_KEYS + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """Trains `main`, an image encoder and a pooling, with the loss of a frozen text-to-image model.

  The tokens of an image take the place of word embeddings: gradients flow through the U-Net and the text
  encoder, whose parameters have neither gradients nor optimizer state. The encoder is usually trained with a
  lower learning rate, set by a rule ("^encoder/", factor) in the optimizer's `multipliers`.

  Attributes:
    decoder: the `config.objective` of `config.pretrained.decoder`, a model of the diffusion objective; or the
      section `decoder` that `maskgen.tools.convert --format=diffusers` writes for a published model.
    encoder: name="vit" and the fields of `ViT`; or name="pretrained" for `config.pretrained.encoder`, a model
      of any objective with an image encoder, such as MAGE.
    pretrained_encoder: whether the encoder is initialized from `config.pretrained.encoder` instead of from
      scratch. An encoder with frozen parts, such as MAGE's tokenizer, is always pretrained.
    train_encoder: whether the encoder is trained, too. A frozen one is pretrained, and has neither gradients
      nor optimizer state.
    tokens: n, at most the number of tokens that fit in a prompt of the decoder.
    pool_width, pool_depth, pool_heads, pool_self_attention: see `AttentionPool`.
    tail_drop: the distribution of the number of tokens that examples are trained with.
    words: how examples are trained with words next to the image.
    alignment_steps: for this number of steps, a second loss aligns the text encoder's output at the end of a
      prompt of tokens with that at the end of the image's caption; its weight decays from 1 to 0. For an
      encoder from scratch. Not in the paper.
    min_timestep: the smallest timestep drawn in training. At lower noise, the image itself shows what a
      prompt could say about it. Not in the paper.
    crop_sizes: whether a decoder that takes sizes (SDXL) is told in training how each picture was resized and
      cropped, the `sizes` of the op `sized_crop`. Otherwise, and in generation, it is told of whole pictures.
    dtype, attention: of the pooling, see `AttentionPool`.
    sampling: default options of generation.
  """

  serving: ClassVar[str] = "maskgen.serving.ImageWords"
  codebook_size: ClassVar[int] = 0
  num_classes: ClassVar[int] = 0

  decoder: Mapping[str, Any] = fields.section(partial(objectives.find, diffusers=diffusers.Folder))
  encoder: Mapping[str, Any] = fields.section(objectives.find_encoder)
  pretrained_encoder: bool = False
  train_encoder: bool = True
  tokens: int = 75
  pool_width: int = 1024
  pool_depth: int = 5
  pool_heads: int = 16
  pool_self_attention: bool = True
  tail_drop: TailDrop = TailDrop()
  words: Words = Words()
  alignment_steps: int = fields.renamed(0, was="warm_start_steps")
  min_timestep: int = fields.renamed(0, was="first_step")
  crop_sizes: bool = False
  dtype: str = fields.precision("float32")
  attention: str = fields.operational("auto", plain="xla")
  sampling: ImageWordsSampling = ImageWordsSampling()

  def __post_init__(self):
    config_lib.check_at_least(self, 0, "alignment_steps", "min_timestep")
    limit = self.text_to_image.max_prompt_tokens
    if not 1 <= self.tokens <= limit:
      raise UserError(f"tokens is {self.tokens}: a prompt of this decoder holds 1 to {limit}")
    source, *_ = self._source, self.pool, self._subjects, self._templates  # these check their fields
    if self.pretrained_encoder and source.encoder.parts:
      raise UserError(
        "pretrained_encoder: an encoder with frozen parts is always pretrained, leave the key out"
      )
    if not (self.train_encoder or self.pretrained_encoder or source.encoder.parts):
      raise UserError("train_encoder=False freezes an encoder from scratch: set pretrained_encoder=True")
    if self.crop_sizes and not self.text_to_image.model.unet.takes_sizes:
      raise UserError("crop_sizes is set, but this decoder takes no sizes: only SDXL does, leave the key out")
    schedule = self.text_to_image.model.schedule
    if self.min_timestep >= schedule.steps:
      raise UserError(
        f"min_timestep is {self.min_timestep}: the decoder's timesteps are 0 to {schedule.steps - 1}"
      )
    diffusion.visited(schedule, self.sampling.sampler, self.sampling.steps)

  @property
  def captions(self) -> Captions | None:
    return self.texts if self.words.read_captions or self.alignment_steps else None

  def batch_spec(self) -> BatchSpec:
    others = {"sizes": ArraySpec((NUM_SIZES,), "int32", 1 << 16)} if self.crop_sizes else {}
    return BatchSpec(image_shape=self.image_shape, captions=self.captions, others=others)

  @property
  def texts(self) -> Captions:
    """How texts are tokenized for the decoder."""
    return self._decoder[1]

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return (*self.text_to_image.image_size, IMAGE_CHANNELS)

  @property
  def text_to_image(self) -> FrozenTextToImage:
    """The frozen model."""
    return self._decoder[0]

  @functools.cached_property
  def _decoder(self) -> tuple[FrozenTextToImage, Captions]:
    return frozen_decoder.read(self.decoder)

  @property
  def image_encoder(self) -> EncoderPart:
    """The image encoder."""
    return EncoderPart(
      self._source.encoder, "params/main/encoder" if self.train_encoder else "frozen/encoder"
    )

  @functools.cached_property
  def _source(self) -> EncoderPart:
    """The encoder as a part of `config.pretrained.encoder`."""
    return objectives.encoder_part(self.encoder, "config.objective.encoder")

  @property
  def pool(self) -> AttentionPool:
    """The network that pools patches to tokens."""
    return AttentionPool(
      queries=self.tokens,
      widths=self.text_to_image.model.text_widths,
      width=self.pool_width,
      depth=self.pool_depth,
      heads=self.pool_heads,
      self_attention=self.pool_self_attention,
      dtype=self.dtype,
      attention=self.attention,
    )

  def pretrained_shapes(self) -> dict[str, Tree]:
    shapes: dict[str, Tree] = {"decoder": {"params": {"main": self.text_to_image.shapes()}}}
    if self.pretrained_encoder or self._source.encoder.parts:
      shapes["encoder"] = self._source.shapes()
    return shapes

  def check_pretrained(self, name: str, config: Mapping[str, Any]) -> None:
    section: Mapping[str, Any] = config.get("objective", {})
    if name == "decoder" and "decoder" in config:  # a converted model, which generates images of any size
      family = self.decoder.get("family", "")
      found = diffusers.read_frozen({**config["decoder"], "family": family})[0]
      check_same(dataclasses.replace(found, image_size=self.text_to_image.image_size), self.text_to_image)
    elif name == "decoder":
      check_same(frozen_decoder.read(section)[0], self.text_to_image)
    else:
      check_same(objectives.encoder_part(storage.model_section(config), "its objective"), self._source)

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    encoder_rng, pool_rng = jax.random.split(rng)
    frozen = {"decoder": pretrained["decoder"]["params"]["main"]}
    network = self._source.encoder
    if "encoder" in pretrained:
      encoder, parts = self._source.split(pretrained["encoder"])
      frozen |= parts
    else:
      encoder = network.init(encoder_rng)
    patches = jax.eval_shape(network.encode, encoder, frozen, {"image": jnp.zeros((1, *self.image_shape))})
    pool = self.pool.init(pool_rng, jnp.zeros(patches.shape, patches.dtype))["params"]
    # Tokens start at the scale of word embeddings: the frozen text encoder was never trained on larger ones.
    pool = {**pool, "scale": self.text_to_image.scale(frozen["decoder"])}
    main = {"pool": pool}
    (main if self.train_encoder else frozen)["encoder"] = encoder
    return {"params": {"main": main}, "frozen": frozen, "extra": {}}

  def positions(self) -> dict[str, Positions]:
    return {"main/encoder/position": self._source.encoder.positions} if self.train_encoder else {}

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
    images = images_lib.to_float(batch["image"])
    inputs, words = images, None
    if self.words.share:
      words = self._words(frozen, batch)
      inputs = images_lib.shift_hues(images, words.hue_shift)
    vectors = self._vectors(params["main"], frozen, inputs)
    image = Segment(vectors, self.tail_drop.draw(_keys(batch, _TAIL_DROP), self.tokens))
    segments = [image]
    if words is not None:
      num_words = words.before.number + words.behind.number
      fitting = prompts.num_fitting(image.number, num_words, self.text_to_image.length)
      segments = [words.before, image._replace(number=fitting), words.behind]
    sizes = batch["sizes"] if self.crop_sizes else None
    condition, _ = self.text_to_image.condition(frozen["decoder"], segments, sizes)
    errors = self.text_to_image.model.errors
    loss = errors(frozen["decoder"], images, [condition], batch["key"], self.min_timestep)[0].mean()
    metrics = self._health(frozen, vectors) | {"kept_tokens": image.number.mean()}
    if self.alignment_steps:
      caption = self.text_to_image.caption(frozen["decoder"], batch["caption"])
      distance = self.text_to_image.misalignment(frozen["decoder"], image, caption)
      if words is not None:  # a caption does not describe its image with shifted hues
        distance = jnp.where(words.hue_shift > 0, 0.0, distance)
      metrics["misalignment"] = distance.mean()
      loss += jnp.maximum(1.0 - step / self.alignment_steps, 0.0) * metrics["misalignment"]
    return {"main": loss}, metrics, model_state

  def _words(self, frozen: Tree, batch: Batch) -> prompts.WordsAround:
    """The words around the images of a batch."""
    embed, templates = partial(self.text_to_image.caption, frozen["decoder"]), None
    if self.words.templates:
      templates = prompts.Templates(*(embed(jnp.asarray(ids)) for ids in self._templates))
    count = len(batch["key"])
    ids = batch["caption"] if self.words.read_captions else jnp.repeat(self.texts.read([""]), count, 0)
    subjects = jnp.isin(ids[:, 1:-1], self._subjects)
    return self.words.draw(_keys(batch, _WORDS), embed(ids), subjects, templates)

  @functools.cached_property
  def _templates(self) -> list[np.ndarray]:
    """The words before the image and behind it in each template, int32 [t, length]."""
    halves = [template.split(prompts.PLACE) for template in self.words.templates]
    _ = [self.texts.read([" ".join(both)]) for both in halves]  # both together must fit
    return [self.texts.read(texts) for texts in zip(*halves, strict=True)]

  @functools.cached_property
  def _subjects(self) -> np.ndarray:
    return np.array([self.texts.word(subject) for subject in self.words.subject], np.int32)

  def _vectors(self, params: Tree, frozen: Tree, images: jax.Array) -> jax.Array:
    """The tokens of images float32 [b, h, w, c] in [0, 1]; float32 [b, n, d]."""
    patches = self.image_encoder.encode({"params": {"main": params}, "frozen": frozen}, {"image": images})
    vectors: Any = self.pool.apply({"params": params["pool"]}, patches)
    return sharding.constrain_batch(vectors)

  def _health(self, frozen: Tree, vectors: jax.Array) -> Metrics:
    """The tokens' scale relative to words, and the part of it that varies between images: 0 on collapse."""
    scaled = jax.lax.stop_gradient(vectors / self.text_to_image.scale(frozen["decoder"])[None, None])
    length = jnp.sqrt(jnp.square(scaled).mean())
    return {"token_scale": length, "token_spread": jnp.sqrt(scaled.var(axis=0).mean()) / length}

  def predict_fns(self) -> dict[str, PredictFn]:
    decoder = self.text_to_image

    def encode(variables, batch, rng):
      images = images_lib.to_float(batch["image"])
      return self._vectors(variables["params"]["main"], variables["frozen"], images)

    def loss(variables, batch, rng):
      frozen, images = variables["frozen"]["decoder"], images_lib.to_float(batch["image"])
      vectors, b = encode(variables, batch, rng), len(images)
      numbers = {"loss": self.tokens, "loss_1_token": 1, "loss_no_prompt": 0}
      segments = {name: Segment(vectors, jnp.full((b,), number)) for name, number in numbers.items()}
      if "caption" in batch:
        segments["loss_caption"] = decoder.caption(frozen, batch["caption"])
      sizes = batch.get("sizes") if self.crop_sizes else None
      conditions = [decoder.condition(frozen, [segment], sizes)[0] for segment in segments.values()]
      errors = decoder.model.errors(frozen, images, conditions, jax.random.split(rng, b))
      return dict(zip(segments, errors, strict=True))

    def generate(variables, batch, rng, **options):
      frozen, chosen = variables["frozen"]["decoder"], dataclasses.asdict(self.sampling) | options
      words, images = [], []
      negative = decoder.caption(frozen, batch["negative"]) if "negative" in batch else None
      if "words" in batch:
        pieces, number = batch["words"], batch["num_words"]
        words = [decoder.words(frozen, pieces[:, i], number[:, i]) for i in range(pieces.shape[1])]
      if "vectors" in batch:
        vectors, number = batch["vectors"], batch["number"]
        images = [Segment(vectors[:, i], number[:, i]) for i in range(vectors.shape[1])]
      return decoder.draw(frozen, decoder.noise(batch["key"]), words, images, negative, **chosen)

    def reconstruct(variables, batch, rng, **options):
      vectors = encode(variables, batch, rng)
      number = batch.get("number", jnp.full((len(vectors), 1), self.tokens))
      key = batch["key"] if "key" in batch else jax.random.split(rng, len(vectors))
      return generate(variables, {"vectors": vectors[:, None], "number": number, "key": key}, rng, **options)

    own: tuple[PredictFn, ...] = (loss, encode, reconstruct, generate)
    return {fn.__name__: fn for fn in own} | self.image_encoder.predict_fns()


def _keys(batch: Batch, number: int) -> jax.Array:
  """A key for each example, for one purpose."""
  return jax.vmap(lambda key: jax.random.fold_in(key, number))(batch["key"])
