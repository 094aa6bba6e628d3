"""The tokenizer objective: VQGAN with MaskGIT's losses (Esser et al. 2021; Chang et al. 2022)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from maskgen import config as config_lib
from maskgen import images as images_lib
from maskgen.config import fields
from maskgen.errors import UserError, nearest
from maskgen.models import perceptual
from maskgen.models import remat as remat_lib
from maskgen.models.discriminator import Discriminator
from maskgen.models.vqgan import VQGAN, Quantized
from maskgen.numerics import losses as losses_lib
from maskgen.objectives import Batch, BatchSpec, Metrics, PredictFn, Tree, check_image_size, token_fns

# The decay of the moving average of each code's usage.
USAGE_DECAY = 0.97
# The decay of the moving averages of the discriminator's logits.
ANCHOR_DECAY = 0.999
# A code is dead if its usage is below this fraction of 1 / codebook size.
DEAD_SHARE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """Trains `generator` (encoder, codebook, decoder) and, with an adversarial loss, `discriminator`.

  All losses are means over examples, except `entropy`, `revive` and a rectified `lecam`, which depend on the
  whole (micro-)batch. A loss whose weight is 0 is not computed, and has no metric, except `l1` and `l2`.

  Attributes:
    image_size: (h, w) of the images.
    tokenizer: the network.
    discriminator: the network that distinguishes real images from reconstructions.
    l2_weight, l1_weight: of the mean squared and absolute pixel errors.
    perceptual_loss: between the features of a frozen network: "all_maps", normalised and of all resolutions
      (as LPIPS), or "last_map", the squared error of the last ones at 224 pixels (as MaskGIT).
    perceptual_weight: of that loss.
    perceptual_network: a name in `maskgen.models.perceptual.NETWORKS`; its weights come from
      `config.pretrained.perceptual`.
    codebook_weight, commitment_weight: of the two quantization losses (van den Oord et al. 2017, equation 3).
    entropy_weight, entropy_temperature: of the term that encourages the use of all codes.
    revive_weight: of the squared distance from each dead code to the nearest latent of the batch.
    adversarial_loss: "logistic" (non-saturating) or "hinge" (that of VQGAN).
    adversarial_weight: of the generator's adversarial loss; 0 trains no discriminator.
    adversarial_start: the step from which that loss applies. The discriminator is trained from step 0: with
      Adam, one that started later would begin with updates many times its learning rate.
    r1_weight: of the squared gradient norm at real images.
    lecam_loss: "squared", the distances between the discriminator's logits for real images and the moving
      average for fake ones, and vice versa (LeCAM's equation 4), or "rectified", only as far as the (micro-)
      batch's means are on the right side of these averages (MAGVIT's code).
    lecam_weight: of that loss; every (micro-)batch updates the averages.
    remat: what the backward pass recomputes, "none" or "full" (the residual blocks of the network); results
      do not depend on it.
  """

  serving: ClassVar[str] = "maskgen.serving.Tokenizer"
  training_only: ClassVar[tuple[str, ...]] = ("perceptual",)

  image_size: tuple[int, int]
  tokenizer: VQGAN = VQGAN()
  discriminator: Discriminator = Discriminator()
  l2_weight: float = 1.0
  l1_weight: float = 0.0
  perceptual_loss: str = "all_maps"
  perceptual_weight: float = 0.0
  perceptual_network: str = "mobilenet_v2"
  codebook_weight: float = 1.0
  commitment_weight: float = 0.25
  entropy_weight: float = 0.1
  entropy_temperature: float = 0.01
  revive_weight: float = 0.0
  adversarial_loss: str = "logistic"
  adversarial_weight: float = 0.1
  adversarial_start: int = 0
  r1_weight: float = 10.0
  lecam_loss: str = "squared"
  lecam_weight: float = 0.0
  remat: str = fields.operational("none", less_memory=("full",))

  def __post_init__(self):
    check_image_size(self.image_size)
    weights = [field.name for field in dataclasses.fields(self) if field.name.endswith("_weight")]
    config_lib.check_at_least(self, 0, *weights, "adversarial_start")
    choices: dict[str, Mapping[str, Any]] = {
      "perceptual_loss": perceptual.DISTANCES,
      "adversarial_loss": losses_lib.ADVERSARIAL,
      "lecam_loss": losses_lib.LECAM,
    }
    for name, known in choices.items():
      value = getattr(self, name)
      if value not in known:
        raise UserError(f"{name} '{value}' does not exist{nearest(value, known)}")
    if self.lecam_weight and not self.adversarial_weight:
      raise UserError(
        "lecam_weight needs a discriminator: set adversarial_weight above 0 or lecam_weight to 0"
      )
    remat_lib.check_remat(self.remat, ("none", "full"))  # "dots" does not apply to convolutions
    self.tokenizer.token_grid(self.image_shape)

  @property
  def codebook_size(self) -> int:
    return self.tokenizer.codebook_size

  def tokenizer_params(self, variables: Tree) -> Tree:
    return variables["params"]["generator"]

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return (*self.image_size, self.tokenizer.image_channels)

  @property
  def num_classes(self) -> int:
    return 0

  @property
  def captions(self) -> None:
    return None

  def batch_spec(self) -> BatchSpec:
    return BatchSpec(image_shape=self.image_shape)

  def pretrained_shapes(self) -> dict[str, Tree]:
    if not self.perceptual_weight:
      return {}
    network = perceptual.build_network(self.perceptual_network)
    images = jax.ShapeDtypeStruct((1, *self.image_size, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    return {"perceptual": {"params": {"main": variables["params"]}}}

  def check_pretrained(self, name: str, config: Mapping[str, Any]) -> None:
    found = config.get("network", "a model that maskgen trained")
    if found != self.perceptual_network:
      raise UserError(
        f"the {name} network is {found}, config.objective.perceptual_network is {self.perceptual_network}: "
        "make them equal"
      )

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    generator_rng, discriminator_rng = jax.random.split(rng)
    images = jnp.zeros((1, *self.image_shape))
    params = {"generator": self.tokenizer.init(generator_rng, images)["params"]}
    if self.adversarial_weight:
      params["discriminator"] = self.discriminator.init(discriminator_rng, images)["params"]
    even = jnp.full((self.codebook_size,), 1.0 / self.codebook_size)
    frozen = {name: variables["params"]["main"] for name, variables in pretrained.items()}
    model_state: Tree = {"usage": even}
    if self.lecam_weight:
      model_state["anchors"] = {"real": jnp.float32(0.0), "fake": jnp.float32(0.0)}
    return {"params": params, "frozen": frozen, "extra": model_state}

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
    real = images_lib.to_float(batch["image"])
    latents = self._generator(params, real, self.remat, method="encode")
    quantized: Quantized = self._generator(params, latents, method="quantize")
    # Straight-through: the decoder's gradient reaches the encoder as if there were no quantizer.
    codes = latents + jax.lax.stop_gradient(quantized.codes - latents)
    fake = self._generator(params, codes, self.remat, method="decode")
    terms = self._reconstruction_terms(frozen, real, fake)
    terms |= self._quantization_terms(params, latents, quantized, model_state["usage"])
    weights = {
      "l2": self.l2_weight,
      "l1": self.l1_weight,
      "perceptual": self.perceptual_weight,
      "codebook": self.codebook_weight,
      "commitment": self.commitment_weight,
      "entropy": self.entropy_weight,
      "revive": self.revive_weight,
    }
    weighted = [weights[name] * term for name, term in terms.items()]
    values = {"generator": jnp.stack(weighted).sum()}
    share, metrics = self._usage(quantized.tokens)
    new_state = {"usage": USAGE_DECAY * model_state["usage"] + (1.0 - USAGE_DECAY) * share}
    if self.adversarial_weight:
      anchors = model_state.get("anchors", {})
      adversarial, values["discriminator"], adversarial_terms = self._game(params, real, fake, anchors)
      started = (step >= self.adversarial_start).astype(jnp.float32)
      values["generator"] += self.adversarial_weight * started * adversarial
      terms |= adversarial_terms
    if self.lecam_weight:
      # The decay starts small, so that the initial value does not bias the average.
      decay = jnp.minimum(ANCHOR_DECAY, (1.0 + step) / (10.0 + step))
      new_state["anchors"] = {
        kind: decay * anchor + (1.0 - decay) * terms[f"logit_{kind}"]
        for kind, anchor in model_state["anchors"].items()
      }
    return values, terms | metrics, new_state

  def _generator(self, params: Mapping[str, Tree], *args: Any, method: str) -> Any:
    return self.tokenizer.apply({"params": params["generator"]}, *args, method=method)

  def _reconstruction_terms(self, frozen: Tree, real: jax.Array, fake: jax.Array) -> Metrics:
    terms = {"l2": jnp.square(real - fake).mean(), "l1": jnp.abs(real - fake).mean()}
    if self.perceptual_weight:
      network = perceptual.build_network(self.perceptual_network)
      distance = perceptual.DISTANCES[self.perceptual_loss]
      terms["perceptual"] = distance(network, frozen["perceptual"], real, fake).mean()
    return terms

  def _quantization_terms(
    self, params: Mapping[str, Tree], latents: jax.Array, quantized: Quantized, usage: jax.Array
  ) -> Metrics:
    stop = jax.lax.stop_gradient
    distances = quantized.distances.reshape(-1, self.codebook_size)
    terms = {
      "codebook": jnp.square(stop(latents) - quantized.codes).mean(),
      "commitment": jnp.square(latents - stop(quantized.codes)).mean(),
    }
    if self.entropy_weight:
      terms["entropy"] = losses_lib.code_entropy_loss(distances, self.entropy_temperature)
    if self.revive_weight:
      nearest = stop(latents.reshape(-1, latents.shape[-1])[distances.argmin(axis=0)])  # [K, d]
      offset = self._generator(params, method="codes") - nearest
      dead = usage < DEAD_SHARE / self.codebook_size  # [K]
      terms["revive"] = (jnp.square(offset).sum(axis=-1) * dead).mean()
    return terms

  def _game(
    self, params: Mapping[str, Tree], real: jax.Array, fake: jax.Array, anchors: Mapping[str, jax.Array]
  ) -> tuple[jax.Array, jax.Array, Metrics]:
    """The generator's adversarial loss, the discriminator's loss, and their parts as metrics."""
    generator_loss, discriminator_loss = losses_lib.ADVERSARIAL[self.adversarial_loss]

    def discriminate(images: jax.Array) -> Any:
      return self.discriminator.apply({"params": params["discriminator"]}, images)

    # Both losses share one pass over the fake images: each group's pull-back keeps its own gradient.
    real_logits, fake_logits = discriminate(real), discriminate(fake)
    generator = generator_loss(fake_logits).mean()
    discriminator = discriminator_loss(real_logits, fake_logits).mean()
    metrics = {
      "adversarial": generator,
      "logit_real": real_logits.mean(),
      "logit_fake": fake_logits.mean(),
    }
    if self.r1_weight:
      metrics["r1"] = losses_lib.r1_penalty(discriminate, real).mean()
      discriminator += self.r1_weight * metrics["r1"]
    if self.lecam_weight:
      penalty = losses_lib.LECAM[self.lecam_loss]
      metrics["lecam"] = penalty(real_logits, fake_logits, anchors["real"], anchors["fake"]).mean()
      discriminator += self.lecam_weight * metrics["lecam"]
    return generator, discriminator, metrics

  def _usage(self, tokens: jax.Array) -> tuple[jax.Array, Metrics]:
    """Each code's share of the batch's tokens [K], and metrics of codebook usage."""
    share = jnp.bincount(tokens.reshape(-1), length=self.codebook_size) / tokens.size
    entropy = -(share * jnp.log(jnp.maximum(share, 1e-12))).sum()
    return share, {"codebook_usage": (share > 0).mean(), "perplexity": jnp.exp(entropy)}

  def predict_fns(self) -> dict[str, PredictFn]:
    codes = token_fns.tokenizer_fns(self.tokenizer, self.image_shape, self.tokenizer_params)

    def loss(variables, batch, rng):
      error = codes["reconstruct"](variables, batch, rng) - images_lib.to_float(batch["image"])
      return {
        "l2": losses_lib.mean_per_example(jnp.square(error)),
        "l1": losses_lib.mean_per_example(jnp.abs(error)),
      }

    return {"loss": loss, **codes}
