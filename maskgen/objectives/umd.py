"""Masked autoencoding and diffusion in one network (UMD, Hansen-Estruch et al. 2024)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from maskgen import config as config_lib
from maskgen import images as images_lib
from maskgen.errors import UserError
from maskgen.models.image_encoder import EncoderPart, VitEncoder
from maskgen.models.patches import patchify, unpatchify
from maskgen.models.umd import Masked, Noised, NoisyDecoder, NoisyViT, Umd
from maskgen.numerics import diffusion, masking
from maskgen.numerics.positions import Positions
from maskgen.numerics.text import Captions
from maskgen.objectives import Batch, BatchSpec, Metrics, PredictFn, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """Trains `main`, an encoder of visible patches, and a decoder that predicts the image and its noise.

  A part of the examples is clean: their loss is the squared error of the image, averaged over masked patches.
  The others are noised: theirs is the mean of the squared errors of the image, averaged over masked patches,
  and of the noise, averaged over visible ones (section 3). Pixels are in [-1, 1].

  Clean examples are those at fixed places of a micro-batch, such as every second one, so that few examples
  change their device.

  Attributes:
    encoder: the network that is kept afterwards; its number of classes is set from `classes`. Its mean
      and std are 0.5 in every channel.
    decoder_depth: the number of the decoder's blocks, which are as wide as the encoder's.
    clean_share: the share of clean examples, rounded down to a whole number of those of a micro-batch.
    clean_mask_ratio: the share of patches that are masked in clean examples: ceil(n * clean_mask_ratio) of n.
    mask_ratio: the same in noised ones; with 0, both of their errors are averages over all patches.
    classes: the number of classes of noised examples; 0 for none. Clean examples are always without.
    label_dropout: the share of noised examples that are trained without their class, which guidance needs.
    schedule: of the noise; timesteps are drawn uniformly.
    sampling: default options of generation.
  """

  serving: ClassVar[str] = "maskgen.serving.GenerativeModel"
  captions: ClassVar[Captions | None] = None
  codebook_size: ClassVar[int] = 0

  encoder: NoisyViT
  decoder_depth: int = 4
  clean_share: float = 0.5
  clean_mask_ratio: float = 0.75
  mask_ratio: float = 0.375
  classes: int = 0
  label_dropout: float = 0.1
  schedule: diffusion.Schedule = diffusion.Schedule(betas="cosine", spacing="trailing", clean_end=True)
  sampling: diffusion.DiffusionSampling = diffusion.DiffusionSampling(steps=125, sampler="ddim", guidance=2.0)

  def __post_init__(self):
    config_lib.check_at_least(self, 1, "decoder_depth")
    config_lib.check_at_least(self, 0, "classes")
    config_lib.check_share(self, "clean_share", "clean_mask_ratio", "mask_ratio", "label_dropout")
    if (pooling := self.encoder.pooling) != "registers":
      raise UserError(f"encoder.pooling is '{pooling}': the decoder reads registers, give 'registers'")
    if {*self.encoder.mean, *self.encoder.std} != {0.5}:
      raise UserError("encoder.mean and encoder.std are not all 0.5: UMD's pixels are in [-1, 1], leave them")
    if self.schedule.prediction != "noise":
      raise UserError(f"schedule.prediction is '{self.schedule.prediction}': UMD predicts 'noise'")
    count = self.encoder.num_patches
    for name, least in (("clean_mask_ratio", 1), ("mask_ratio", 0)):
      masked = masking.num_dropped(count, masking.MaskRatio.constant(share := getattr(self, name)))
      if not least <= masked < count:
        raise UserError(
          f"{name}={share} masks {masked} of {count} patches: from {least} to {count - 1} can be"
        )
    diffusion.visited(self.schedule, self.sampling.sampler, self.sampling.steps)

  @property
  def num_classes(self) -> int:
    return self.classes

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return (*self.encoder.image_size, self.encoder.channels)

  @property
  def model(self) -> Umd:
    """The networks; the decoder runs as the encoder does."""
    hidden = self.encoder.hidden or 4 * self.encoder.width
    names = ("grid", "heads", "activation", "epsilon", "dtype", "attention", "remat", "scan")
    same = {name: getattr(self.encoder, name) for name in names}
    outputs = 2 * self.encoder.channels * self.encoder.patch**2
    decoder = NoisyDecoder(outputs=outputs, depth=self.decoder_depth, hidden=hidden, **same)
    return Umd(self.encoder.clone(classes=self.classes, hidden=hidden), decoder, self.schedule)

  @property
  def image_encoder(self) -> EncoderPart:
    """The encoder of images without noise, which other objectives can use."""
    return EncoderPart(VitEncoder(self.model.encoder), "params/main/encoder")

  def batch_spec(self) -> BatchSpec:
    return BatchSpec(image_shape=self.image_shape, num_classes=self.classes)

  def pretrained_shapes(self) -> dict[str, Tree]:
    return {}

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    return {"params": {"main": self.model.init(rng, self.encoder.channels)}, "frozen": {}, "extra": {}}

  def positions(self) -> dict[str, Positions]:
    parts = ("decoder",) if self.encoder.fixed_positions else ("encoder", "decoder")
    return {f"main/{part}/position": Positions(self.encoder.grid) for part in parts}

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
    noisy, clean = self.share_out(batch)
    rngs = jax.random.split(rng) if train else (None, None)
    found = self.model.noisy_errors(params["main"], *self.draw_noisy(noisy, train), rngs[0])
    total = (found["image_error"] + found["noise_error"]).sum() / 2.0
    if len(clean["key"]):
      found["clean_error"] = self.model.clean_errors(params["main"], *self.draw_clean(clean), rngs[1])
      total += found["clean_error"].sum()
    metrics = {name: value.mean() for name, value in found.items()}
    return {"main": total / len(batch["key"])}, metrics, model_state

  def share_out(self, batch: Batch) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The examples of a batch that are noised, and those that stay clean.

    Raises:
      UserError: if none would stay clean, but `clean_share` is not 0.
    """
    size = len(batch["key"])
    clean = math.floor(size * self.clean_share + 1e-6)  # of 100, a share of 0.29 is 29
    if self.clean_share and not clean:
      raise UserError(f"clean_share={self.clean_share} of {size} examples is none: enlarge micro-batches")
    groups = math.gcd(size, clean)
    cut = (size - clean) // groups

    def take(rows: slice) -> dict[str, jax.Array]:
      return {
        name: x.reshape(groups, -1, *x.shape[1:])[:, rows].reshape(-1, *x.shape[1:])
        for name, x in batch.items()
      }

    return take(slice(cut)), take(slice(cut, None))

  def draw_clean(self, batch: Batch) -> tuple[jax.Array, Masked]:
    """Images float32 [b, h, w, c] in [-1, 1], and what of them is masked, by their keys."""
    return _read(batch), self._mask(batch["key"], self.clean_mask_ratio)

  def draw_noisy(self, batch: Batch, train: bool) -> tuple[jax.Array, Masked, Noised]:
    """Like `draw_clean`, and how they are noised; if `train`, some lose their class."""

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
      mask, time, noise, drop = jax.random.split(key, 4)
      t = jax.random.randint(time, (), 0, self.schedule.steps)
      dropped = jax.random.bernoulli(drop, self.label_dropout)
      return mask, t, jax.random.normal(noise, self.image_shape), dropped

    keys, t, noise, dropped = jax.vmap(draw)(batch["key"])
    label = batch["label"] if self.classes else None
    if train and label is not None:
      label = jnp.where(dropped, self.classes, label)
    return _read(batch), self._mask(keys, self.mask_ratio), Noised(t, noise, label)

  def _mask(self, keys: jax.Array, share: float) -> Masked:
    return Masked(*masking.random_mask(keys, self.encoder.num_patches, masking.MaskRatio.constant(share)))

  def predict_fns(self) -> dict[str, PredictFn]:
    model, side = self.model, self.encoder.patch

    def loss(variables, batch, rng):
      batch, params = _with_keys(batch, rng), variables["params"]["main"]
      found = model.noisy_errors(params, *self.draw_noisy(batch, train=False))
      total = (found["image_error"] + found["noise_error"]) / 2.0
      if self.clean_share:
        found["clean_error"] = model.clean_errors(params, *self.draw_clean(batch))
        total = (1.0 - self.clean_share) * total + self.clean_share * found["clean_error"]
      return {"loss": total} | found

    def reconstruct(variables, batch, rng):
      images, masked = self.draw_clean(_with_keys(batch, rng))
      level = jnp.zeros(len(images), jnp.int32)
      found, _ = model.predict(variables["params"]["main"], images, masked.kept, level)
      hidden = masked.mask.reshape(-1, *self.encoder.grid, 1)
      found = unpatchify(jnp.where(hidden, patchify(found, side), patchify(images, side)), side)
      return jnp.clip(found / 2.0 + 0.5, 0.0, 1.0)

    def generate(variables, batch, rng, **options):
      options = dataclasses.asdict(self.sampling) | options
      guidance = options.pop("guidance")
      noise = jax.vmap(lambda key: jax.random.normal(key, self.image_shape))(batch["key"])
      labels = [jnp.full(len(noise), self.classes), *([batch["label"]] if "label" in batch else [])]
      scales = [guidance] * (len(labels) - 1)
      found = model.sample(variables["params"]["main"], noise, labels, scales, **options)
      return jnp.clip(found / 2.0 + 0.5, 0.0, 1.0)

    own: tuple[PredictFn, ...] = (loss, generate, *((reconstruct,) if self.clean_share else ()))
    return {fn.__name__: fn for fn in own} | self.image_encoder.predict_fns()


def _read(batch: Batch) -> jax.Array:
  """Images float32 in [-1, 1]."""
  return 2.0 * images_lib.to_float(batch["image"]) - 1.0


def _with_keys(batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
  return {**batch, "key": jax.random.split(rng, len(batch["image"]))}
