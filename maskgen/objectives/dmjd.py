"""DMJD: masked autoencoders of two disjoint views with gradients as targets (Ma et al. 2023)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from maskgen import config as config_lib
from maskgen.errors import UserError
from maskgen.models import mae
from maskgen.numerics import hog, masking
from maskgen.numerics import losses as losses_lib
from maskgen.objectives import PredictFn, Tree, masked_pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(masked_pixels.Objective):
  """Trains `main`: an encoder, a decoder, and a head that predicts the patches that the encoder sees.

  Each image is masked twice. The second view hides as much as possible of what the first one shows, so that
  little is never predicted. Targets are histograms of oriented gradients of raw pixels. The loss is the
  squared error at masked patches, and `visible_weight` times the smooth L1 distance at visible ones, which is
  quadratic below 2; both are means over the views (section 3).

  Attributes:
    mask_ratio: the share of patches that are masked in each view; of squares of patches, if `block` is not 1.
    normalize_targets: whether each histogram is standardised over its bins.
    block: patches are masked in squares of this side.
    cells: the number of histograms along each side of a patch.
    bins: of a histogram.
    visible_weight: see above.
    shuffle_visible: whether predictions of visible patches are compared with the targets of others, in random
      order, as in the authors' code.
    decoder_hidden: width inside the decoder's MLPs, by default 4 `decoder_width`.
  """

  mask_ratio: float = 0.6
  block: int = 2
  cells: int = 2
  bins: int = 9
  visible_weight: float = 1.0
  shuffle_visible: bool = False
  decoder_hidden: int = 0

  def __post_init__(self):
    config_lib.check_at_least(self, 1, "block", "cells", "bins")
    config_lib.check_at_least(self, 0, "visible_weight", "decoder_hidden")
    (rows, columns), patch = self.encoder.grid, self.encoder.patch
    if patch % self.cells:
      raise UserError(f"cells is {self.cells}: a patch has {patch} pixels along each side, give a divisor")
    if rows % self.block or columns % self.block:
      raise UserError(f"block is {self.block}: there are {rows} x {columns} patches, give a divisor of both")
    units = self.encoder.num_patches // self.block**2
    masked = masking.num_dropped(units, self._ratio)
    if not 0 < masked < units:
      raise UserError(
        f"mask_ratio={self.mask_ratio} masks {masked} of {units} blocks: some must be masked, some visible"
      )
    super().__post_init__()

  @property
  def decoder(self) -> mae.PixelDecoder:
    outputs = self.cells**2 * self.bins * self.encoder.channels
    return super().decoder.clone(outputs=outputs, hidden=self.decoder_hidden)

  @property
  def head(self) -> mae.VisibleHead:
    """The network that predicts visible patches."""
    return mae.VisibleHead(self.decoder_width, self.decoder.outputs, self.encoder.epsilon, self.encoder.dtype)

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    parts = super().init(rng, pretrained)
    latents = jnp.zeros((1, 1, self.encoder.width))
    head = self.head.init(jax.random.fold_in(rng, 0), latents)["params"]
    return parts | {"params": {"main": parts["params"]["main"] | {"head": head}}}

  def mask(self, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is masked in each view, bool [b, 2, n], and the visible patches, int32 [b, 2, k], in any order."""
    return masking.disjoint_masks(keys, self.encoder.grid, self._ratio, self.block)

  def targets(self, images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Histograms [b, n, t], in the order cell row, cell column, bin, channel; offset 0 and scale 1."""
    rows, columns = self.encoder.grid
    # Rounding errors would decide the bins of gradients that are 0 in one direction.
    found = hog.histograms(jnp.round(255.0 * images), self.encoder.patch // self.cells, self.bins)
    if self.normalize_targets:
      found = nn.standardize(found, axis=-1, epsilon=1e-5)
    found = found.reshape(len(images), rows, self.cells, columns, self.cells, -1, self.bins)
    found = found.transpose(0, 1, 3, 2, 4, 6, 5).reshape(len(images), rows * columns, -1)
    return found, jnp.zeros_like(found[..., :1]), jnp.ones_like(found[..., :1])

  def errors(
    self, params: Mapping[str, Tree], images: jax.Array, mask: jax.Array, kept: jax.Array, rng: Any = None
  ) -> jax.Array:
    """The loss of each example, float32 [b].

    Args:
      params: as `init` returns them.
      images: float32 [b, h, w, c] in [0, 1].
      mask: bool [b, 2, n], what is masked.
      kept: int32 [b, 2, k], the visible patches, in any order.
      rng: for dropout and drop path of the encoder, or None.
    """
    main: Any = params["main"]
    options: Any = {} if rng is None else {"train": True, "rngs": {"dropout": rng}}
    views, target = (jnp.repeat(x, 2, axis=0) for x in (images, self.targets(images)[0]))
    mask, kept = (x.reshape(len(views), -1) for x in (mask, kept))
    latents = self.encoder.apply(
      {"params": main["encoder"]}, views, jnp.sort(kept), method="encode_kept", **options
    )
    found = self.compare(params, latents, target, mask, kept)
    return found.reshape(len(images), 2).mean(axis=1)

  def compare(
    self, params: Mapping[str, Tree], latents: Any, target: jax.Array, mask: jax.Array, kept: jax.Array
  ) -> jax.Array:
    """The loss of each view, float32 [b].

    Args:
      params: as `init` returns them.
      latents: [b, l + k, d], the encoder's output: l positions in front, such as a class position, then the
        visible patches, ascending.
      target: [b, n, t], of all patches.
      mask: bool [b, n].
      kept: int32 [b, k], the visible patches, in any order.
    """
    main: Any = params["main"]
    ordered = jnp.sort(kept)
    decoded: Any = self.decoder.apply({"params": main["decoder"]}, latents, ordered)
    masked = losses_lib.masked_mean(jnp.square(decoded - target).mean(axis=-1), mask)
    visible: Any = self.head.apply({"params": main["head"]}, latents[:, -kept.shape[1] :])
    if self.shuffle_visible:
      visible = jnp.take_along_axis(visible, jnp.argsort(jnp.argsort(kept))[..., None], axis=1)
    seen = jnp.take_along_axis(target, ordered[..., None], axis=1)
    distance = optax.losses.huber_loss(visible, seen, delta=2.0) / 2.0
    return masked + self.visible_weight * losses_lib.mean_per_example(distance)

  def predict_fns(self) -> dict[str, PredictFn]:
    def mask(variables, batch, rng):  # of the first view
      return self.mask(batch["key"])[0][:, 0].reshape(-1, *self.encoder.grid)

    found = super().predict_fns() | {"mask": mask}
    del found["reconstruct"]  # gradients are no pixels
    return found
