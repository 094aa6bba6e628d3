"""Selfie: which of the masked patches of an image belongs where (Trinh et al. 2019)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from maskgen.errors import UserError
from maskgen.models import mae
from maskgen.models.patches import unpatchify
from maskgen.models.transformer import embedding_init
from maskgen.numerics import losses as losses_lib
from maskgen.numerics import masking
from maskgen.objectives import Batch, Metrics, PredictFn, Tree, masked_pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(masked_pixels.Objective):
  """Trains `main`: an encoder of the visible patches, and what compares each masked position with patches.

  A masked position has a query, and each masked patch a key, which does not know its position. The loss is
  the cross-entropy of the softmax of their scaled products over the masked patches of the same image: the
  right one is the target, all others are distractors (section 2). Keys are made from the embeddings of
  patches that the encoder uses, by a small network.

  The authors' code is not public. Their queries are the sum of the encoder's output at its class position and
  an embedding of the masked position, which is `pooled`. The product of a key with the first term is the same
  for all positions, so that what is visible does not decide which arrangement of the patches is best: by
  default, a decoder as MAE's computes the queries. Their patches are embedded by the first blocks of a
  ResNet, which alone are kept; here a ViT embeds them, and its blocks, which pool by attention, are kept as
  well. How products are scaled is not said; here it is as in attention.

  Attributes:
    decoder_width, decoder_depth, decoder_heads: of the decoder; the keys' network has the same width.
    mask_ratio: the share of patches that are masked, at least 2 of them.
    pooled: whether queries are the paper's, which needs pooling="class"; there is then no decoder.
  """

  mask_ratio: float = 0.25
  normalize_targets: bool = dataclasses.field(init=False, default=False)
  pooled: bool = False

  def __post_init__(self):
    super().__post_init__()
    if masking.num_dropped(self.encoder.num_patches, self._ratio) < 2:
      raise UserError(f"mask_ratio={self.mask_ratio} masks one patch: there is nothing to choose, give more")
    if self.pooled and (pooling := self.encoder.pooling) != "class":
      raise UserError(f"encoder.pooling is '{pooling}': pooled queries need a class position, give 'class'")

  @property
  def decoder(self) -> mae.PixelDecoder:
    return super().decoder.clone(outputs=self.encoder.width)

  @property
  def keys(self) -> mae.VisibleHead:
    """The network from embeddings of patches to their keys."""
    encoder = self.encoder
    return mae.VisibleHead(self.decoder_width, encoder.width, encoder.epsilon, encoder.dtype)

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    parts, (first, second, third) = super().init(rng, pretrained), jax.random.split(rng, 3)
    main, (rows, columns), width = parts["params"]["main"], self.encoder.grid, self.encoder.width
    main["keys"] = self.keys.init(first, jnp.zeros((1, 1, width)))["params"]
    if self.pooled:
      del main["decoder"]
      main["rows"] = embedding_init(second, (rows, width))
      main["columns"] = embedding_init(third, (columns, width))
    return parts

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
    masked = self.mask(batch["key"])
    found = self.scores(params, self.images(batch), *masked, rng if train else None)
    metrics = {name: value.mean() for name, value in found.items()}
    return {"main": metrics.pop("loss")}, metrics, model_state

  def scores(
    self, params: Mapping[str, Tree], images: jax.Array, mask: jax.Array, kept: jax.Array, rng: Any = None
  ) -> dict[str, jax.Array]:
    """`loss` and `accuracy`, the share of masked positions with the right choice, for each example [b].

    Args:
      params: as `init` returns them.
      images: float32 [b, h, w, c] in [0, 1].
      mask: bool [b, n], what is masked.
      kept: int32 [b, k], the visible patches, ascending.
      rng: for dropout and drop path of the encoder, or None.
    """
    logits, _ = self.compare(params, images, mask, kept, rng)
    right = jnp.broadcast_to(jnp.arange(logits.shape[-1])[None], logits.shape[:2])
    correct = (logits.argmax(axis=-1) == right).astype(jnp.float32)
    return {"loss": losses_lib.cross_entropy(logits, right).mean(axis=-1), "accuracy": correct.mean(axis=-1)}

  def compare(
    self, params: Mapping[str, Tree], images: jax.Array, mask: jax.Array, kept: jax.Array, rng: Any = None
  ) -> tuple[jax.Array, jax.Array]:
    """How well patches fit; the arguments are those of `scores`.

    Returns:
      float32 [b, m, m], for each masked position the logits of masked patches; and int32 [b, m], which these
      are, ascending.
    """
    main: Any = params["main"]
    options: Any = {} if rng is None else {"train": True, "rngs": {"dropout": rng}}
    variables, count = {"params": main["encoder"]}, self.encoder.num_patches
    latents: Any = self.encoder.apply(variables, images, kept, method="encode_kept", **options)
    masked = jnp.sort(jnp.where(mask, jnp.arange(count)[None], count))[:, : count - kept.shape[1]]
    if self.pooled:
      positions = (main["rows"][:, None] + main["columns"][None]).reshape(count, -1)
      queries = latents[:, :1].astype(jnp.float32) + positions[masked]
    else:
      predicted: Any = self.decoder.apply({"params": main["decoder"]}, latents, kept)
      queries = jnp.take_along_axis(predicted, masked[..., None], axis=1)
    patches: Any = self.encoder.apply(variables, images, method="embed_patches")
    patches = jnp.take_along_axis(patches, masked[..., None], axis=1)
    keys: Any = self.keys.apply({"params": main["keys"]}, patches)
    return jnp.einsum("bqd,bkd->bqk", queries, keys) / self.encoder.width**0.5, masked

  def predict_fns(self) -> dict[str, PredictFn]:
    def loss(variables, batch, rng):
      images = self.images(batch)
      return self.scores(variables["params"], images, *self.mask(jax.random.split(rng, len(images))))

    def reconstruct(variables, batch, rng):
      images = self.images(batch)
      mask, kept = self.mask(jax.random.split(rng, len(images)))
      logits, masked = self.compare(variables["params"], images, mask, kept)
      chosen = jnp.take_along_axis(masked, logits.argmax(axis=-1), axis=1)
      # Each position takes its own patch, or, if it is masked, that with the largest logit.
      number = jnp.maximum(jnp.cumsum(mask, axis=1), 1) - 1
      order = jnp.where(mask, jnp.take_along_axis(chosen, number, axis=1), jnp.arange(mask.shape[1])[None])
      found = jnp.take_along_axis(self.targets(images)[0], order[..., None], axis=1)
      found = found.reshape(-1, *self.encoder.grid, found.shape[-1])
      return jnp.clip(self.encoder.to_pixels(unpatchify(found, self.encoder.patch)), 0.0, 1.0)

    return super().predict_fns() | {"loss": loss, "reconstruct": reconstruct}
