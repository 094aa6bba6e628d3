"""Prediction functions of objectives with a tokenizer; `Objective.predict_fns` describes each of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from maskgen import config as config_lib
from maskgen import images as images_lib
from maskgen.errors import UserError
from maskgen.models.vqgan import VQGAN
from maskgen.numerics import masking
from maskgen.numerics import sampling as sampling_lib
from maskgen.objectives import Batch, PredictFn, Tree, check_tokenizer


class MaskedModel(Protocol):
  """An objective that predicts masked tokens, as `sampling_fns` uses it."""

  @property
  def tokenizer(self) -> VQGAN:
    """The tokenizer's network."""

  @property
  def grid(self) -> tuple[int, int]:
    """The token grid (h', w')."""

  @property
  def sampling(self) -> sampling_lib.MaskedSampling:
    """Default options."""

  def logits_fn(
    self, variables: Tree, batch: Batch, guidance: float | jax.Array, guidance_schedule: str
  ) -> sampling_lib.LogitsFn:
    """The logits function for `sampling.decode`, guided by the conditions in `batch`."""

  def reusing_fn(
    self, variables: Tree, batch: Batch, guidance: float | jax.Array, guidance_schedule: str
  ) -> sampling_lib.ReusingFn | None:
    """Likewise, the function that reuses features; None if the model does not support it."""


def tokenizer_shapes(tokenizer: VQGAN, image_shape: tuple[int, int, int]) -> Tree:
  """The shapes of the variables that `config.pretrained.tokenizer` provides."""
  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  variables = jax.eval_shape(tokenizer.init, jax.random.key(0), images)
  return {"params": {"generator": variables["params"]}}


def check_pretrained_tokenizer(config: Mapping[str, Any], tokenizer: VQGAN) -> None:
  """Checks that `config.pretrained.tokenizer` is a model of this tokenizer.

  Raises:
    UserError: if it is another model, or another network.
  """
  section = config.get("objective", {})
  if section.get("name") != "tokenizer":
    raise UserError("it is not a tokenizer: give a model trained with the tokenizer objective")
  found = config_lib.build_dataclass(VQGAN, section.get("tokenizer", {}), "its tokenizer")
  check_tokenizer(found, tokenizer)


def tokenizer_fns(
  tokenizer: VQGAN, image_shape: tuple[int, int, int], params: Callable[[Tree], Tree]
) -> dict[str, PredictFn]:
  """Returns `encode`, `code_vectors`, `decode` and `reconstruct`.

  Args:
    tokenizer: the network.
    image_shape: (h, w, c) of the images.
    params: selects the tokenizer's parameters from the variables of a model.
  """
  grid = tokenizer.token_grid(image_shape)

  def encode(variables, batch, rng):
    pixels = images_lib.to_float(batch["image"])
    return tokenizer.apply({"params": params(variables)}, pixels, method="tokenize")

  def code_vectors(variables, batch, rng):
    codes = tokenizer.apply({"params": params(variables)}, method="codes")
    return codes[encode(variables, batch, rng)]

  def decode(variables, batch, rng):
    return tokenizer.apply({"params": params(variables)}, batch["tokens"], grid, method="detokenize")

  def reconstruct(variables, batch, rng):
    return decode(variables, {"tokens": encode(variables, batch, rng)}, rng)

  return {fn.__name__: fn for fn in (encode, code_vectors, decode, reconstruct)}


def sampling_fns(model: MaskedModel, encode: PredictFn, decode: PredictFn) -> dict[str, PredictFn]:
  """Returns `generate`, `generate_uniform`, `trajectory` and `inpaint`.

  Args:
    model: predicts the tokens.
    encode: as returned by `tokenizer_fns`.
    decode: likewise.
  """
  grid, num_tokens = model.grid, model.grid[0] * model.grid[1]

  def fill(sampler, variables, batch, tokens, unknown, options: dict[str, Any]):
    chosen = dataclasses.asdict(model.sampling) | options
    guidance = {name: chosen.pop(name) for name in ("guidance", "guidance_schedule")}
    logits_fn = model.logits_fn(variables, batch, **guidance)
    reusing_fn = model.reusing_fn(variables, batch, **guidance)
    return sampler(logits_fn, batch["key"], tokens, unknown, grid, reusing_fn, **chosen)

  def fill_all(sampler, variables, batch, options: dict[str, Any]):
    tokens = jnp.zeros((batch["key"].shape[0], num_tokens), jnp.int32)
    return fill(sampler, variables, batch, tokens, jnp.ones(tokens.shape, bool), options)

  def generate(variables, batch, rng, **options):
    tokens = fill_all(sampling_lib.decode, variables, batch, options)
    return decode(variables, {"tokens": tokens}, rng)

  def generate_uniform(variables, batch, rng):
    def draw(key):
      return jax.random.randint(key, (num_tokens,), 0, model.tokenizer.codebook_size)

    return decode(variables, {"tokens": jax.vmap(draw)(batch["key"])}, rng)

  def trajectory(variables, batch, rng, **options):
    tokens, unknown = fill_all(sampling_lib.trajectory, variables, batch, options)
    images = jax.lax.map(lambda tokens: decode(variables, {"tokens": tokens}, rng), tokens)
    unknown = unknown.reshape(*unknown.shape[:2], *grid)
    return images.swapaxes(0, 1), unknown.swapaxes(0, 1)

  def inpaint(variables, batch, rng, **options):
    pixels, hole = images_lib.to_float(batch["image"]), batch["mask"][..., None]
    tokens = encode(variables, {"image": jnp.where(hole, 0.0, pixels)}, rng)
    unknown = masking.token_mask(batch["mask"], model.tokenizer.factor)
    tokens = fill(sampling_lib.decode, variables, batch, tokens, unknown, options)
    return jnp.where(hole, decode(variables, {"tokens": tokens}, rng), pixels)

  return {fn.__name__: fn for fn in (generate, generate_uniform, trajectory, inpaint)}
