"""MaskAlign: an encoder of visible patches learns from one that sees the whole image (Xue et al. 2023)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from maskgen import config as config_lib
from maskgen import images as images_lib
from maskgen import objectives
from maskgen.config import fields
from maskgen.errors import UserError
from maskgen.models.image_encoder import EncoderPart, States, VitEncoder
from maskgen.models.projection import BlockHeads
from maskgen.models.vit import ViT, block_states
from maskgen.numerics import losses as losses_lib
from maskgen.numerics import masking
from maskgen.numerics.positions import Positions
from maskgen.numerics.text import Captions
from maskgen.objectives import Batch, BatchSpec, Metrics, PredictFn, Tree, frozen_teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """Trains `main`, an encoder, and heads that predict the outputs of a frozen teacher's last blocks.

  The loss is twice the smooth L1 distance to these outputs, each standardised over its channels, at the
  visible patches and the class position (section 3). Nothing is reconstructed, so there is no decoder; the
  encoder's last norm is not trained. Of the predictions, only `loss` uses the heads and the teacher. Exports
  hold both: the teacher's license applies to them.

  Attributes:
    encoder: the network that is kept afterwards. The paper's has pooling="class", fixed_positions=True and
      activation="gelu".
    teacher: the model at `config.pretrained.teacher`, an image encoder with the same grid of patches; as
      `encoder` of `maskgen.objectives.classify`, it may be name="pretrained".
    mask_ratio: the share of patches that are masked, the same in every example: ceil(n * mask_ratio) of n.
    by_attention: whether a patch is visible with a probability in proportion to the attention that the
      teacher's class position pays it in the last block, or else all patches with the same.
    blocks: the number of the teacher's last blocks whose outputs are predicted. A teacher that is not a ViT
      has one, its patch tokens.
  """

  serving: ClassVar[str] = "maskgen.serving.Model"
  captions: ClassVar[Captions | None] = None
  num_classes: ClassVar[int] = 0
  codebook_size: ClassVar[int] = 0

  encoder: ViT
  teacher: Mapping[str, Any] = fields.section(objectives.find_encoder)
  mask_ratio: float = 0.7
  by_attention: bool = True
  blocks: int = 5

  def __post_init__(self):
    config_lib.check_share(self, "mask_ratio")
    config_lib.check_at_least(self, 1, "blocks")
    if self.encoder.pooling == "attention":
      raise UserError("encoder.pooling='attention' has a head that no loss trains: give 'class' or 'mean'")
    encoder = self.encoder
    frozen_teacher.check(self._teacher, encoder.grid, encoder.channels, "the encoder", "patches")
    known, own = self._teacher.encoder.num_states, self.encoder.depth
    if self.blocks > min(known, own):
      raise UserError(
        f"blocks={self.blocks}, the teacher has {known}, the encoder {own}: give no more than both"
      )
    if self.by_attention and not self._teacher.encoder.looks:
      raise UserError("the teacher has no class position, which would choose patches: set by_attention=False")
    if self._num_masked == self.encoder.num_patches:
      raise UserError(f"mask_ratio={self.mask_ratio} masks all {self._num_masked} patches: give less")

  @functools.cached_property
  def _teacher(self) -> EncoderPart:
    return objectives.encoder_part(self.teacher, "config.objective.teacher")

  @property
  def _num_masked(self) -> int:
    return masking.num_dropped(self.encoder.num_patches, self._ratio)

  @property
  def _ratio(self) -> masking.MaskRatio:
    return masking.MaskRatio.constant(self.mask_ratio)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return (*self.encoder.image_size, self.encoder.channels)

  @property
  def image_encoder(self) -> EncoderPart:
    """The encoder, which other objectives can use."""
    network = self.encoder.clone(hidden=self.encoder.hidden or 4 * self.encoder.width)
    return EncoderPart(VitEncoder(network), "params/main/encoder")

  @property
  def heads(self) -> BlockHeads:
    """The heads behind the encoder."""
    return BlockHeads(self.blocks, self._teacher.encoder.width, self.encoder.dtype)

  def batch_spec(self) -> BatchSpec:
    return BatchSpec(image_shape=self.image_shape)

  def pretrained_shapes(self) -> dict[str, Tree]:
    return {"teacher": self._teacher.shapes()}

  def check_pretrained(self, name: str, config: Mapping[str, Any]) -> None:
    frozen_teacher.check_pretrained(self._teacher, config)

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    first, second = jax.random.split(rng)
    states = jnp.zeros((self.encoder.depth, 1, 1, self.encoder.width))
    main = {
      "encoder": self.image_encoder.encoder.init(first),
      "heads": self.heads.init(second, states)["params"],
    }
    frozen = {"teacher": frozen_teacher.freeze(self._teacher, pretrained["teacher"])}
    return {"params": {"main": main}, "frozen": frozen, "extra": {}}

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
    taught = self.teach(frozen, batch)
    errors = self.errors(
      params, batch, taught.outputs, self.choose(batch["key"], taught), rng if train else None
    )
    return {"main": errors.mean()}, {}, model_state

  def teach(self, frozen: Tree, batch: Batch) -> States:
    """What the teacher says of a batch."""
    return self._teacher.encoder.states(frozen["teacher"]["params"], frozen["teacher"]["frozen"], batch)

  def choose(self, keys: jax.Array, taught: States) -> jax.Array:
    """The visible patches, int32 [b, k], ascending, by PRNG keys [b]."""
    if self.by_attention and taught.attention is not None:
      return masking.weighted_mask(keys, taught.attention, self._num_masked)[1]
    return masking.random_mask(keys, self.encoder.num_patches, self._ratio)[1]

  def errors(
    self, params: Mapping[str, Tree], batch: Batch, outputs: jax.Array, kept: jax.Array, rng: Any = None
  ) -> jax.Array:
    """The loss of each example, float32 [b].

    Args:
      params: as `init` returns them.
      batch: with `image`.
      outputs: of the teacher's blocks, [l, b, p + n, d], see `States`.
      kept: int32 [b, k], the visible patches, ascending.
      rng: for dropout and drop path, or None.
    """
    main, encoder = params["main"], self.encoder
    images = images_lib.to_float(batch["image"])
    options: Any = {} if rng is None else {"train": True, "rngs": {"dropout": rng}}
    states = block_states(encoder, main["encoder"], images, kept, **options)[1:]
    leading = outputs.shape[2] - encoder.num_patches
    both = leading and encoder.leading  # class positions are compared if both have one
    states = jnp.concatenate(
      [states[:, :, :both], states[:, :, encoder.leading + encoder.registers :]], axis=2
    )
    found: Any = self.heads.apply({"params": main["heads"]}, states)
    outputs = outputs[-self.blocks :]
    visible = jnp.take_along_axis(outputs[:, :, leading:], kept[None, ..., None], axis=2)
    outputs = jnp.concatenate([outputs[:, :, :both], visible], axis=2).astype(jnp.float32)
    target = nn.standardize(outputs, axis=-1, epsilon=1e-5)
    return 2.0 * losses_lib.mean_per_example(optax.losses.huber_loss(found, target).swapaxes(0, 1))

  def predict_fns(self) -> dict[str, PredictFn]:
    def loss(variables, batch, rng):
      taught = self.teach(variables["frozen"], batch)
      kept = self.choose(jax.random.split(rng, len(batch["image"])), taught)
      return {"loss": self.errors(variables["params"], batch, taught.outputs, kept)}

    return {"loss": loss} | self.image_encoder.predict_fns()
