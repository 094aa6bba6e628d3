"""The frozen autoencoder whose latents an objective sees, from a section that describes a model with one."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from maskgen import objectives
from maskgen.errors import UserError
from maskgen.importers import diffusers
from maskgen.models.autoencoder_kl import AutoencoderKL
from maskgen.models.latents import Autoencoder
from maskgen.models.vqgan import VQGAN
from maskgen.objectives import Tree, token_fns, tokenizer


def read(section: Mapping[str, Any]) -> Autoencoder:
  """The autoencoder of a model.

  Args:
    section: the `config.objective` of a tokenizer; or the section `decoder` that `maskgen.tools.convert
      --format=diffusers` writes for a text-to-image model, of which only the autoencoder is used.

  Raises:
    UserError: for another model.
  """
  if _is_published(section):
    found = diffusers.read_frozen(section)[0].model.autoencoder
    if isinstance(found, AutoencoderKL):
      return found
  else:
    objective = objectives.build(section, "config.objective.autoencoder")
    if isinstance(objective, tokenizer.Objective):
      return objective.tokenizer
  raise UserError("autoencoder is no tokenizer, and no converted text-to-image model: give one")


def shapes(section: Mapping[str, Any], network: Autoencoder) -> Tree:
  """The shapes of the variables that `config.pretrained.autoencoder` provides."""
  side = network.factor
  images = jax.ShapeDtypeStruct((1, side, side, network.image_channels), jnp.float32)
  params: Any = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
  return {"params": {"main": {"vae": params}} if _is_published(section) else {"generator": params}}


def select(section: Mapping[str, Any], variables: Tree) -> Tree:
  """The autoencoder's parameters among these variables."""
  params = variables["params"]
  return params["main"]["vae"] if _is_published(section) else params["generator"]


def check_pretrained(section: Mapping[str, Any], network: Autoencoder, config: Mapping[str, Any]) -> None:
  """Checks the config of the model at `config.pretrained.autoencoder`.

  Raises:
    UserError: if its autoencoder is another one.
  """
  if isinstance(network, VQGAN):
    token_fns.check_pretrained_tokenizer(config, network)
  elif "decoder" not in config:
    raise UserError("it is not from maskgen.tools.convert --format=diffusers: give a model that is")
  else:
    objectives.check_same(read(config["decoder"]), network, "its autoencoder", "config.objective.autoencoder")


def _is_published(section: Mapping[str, Any]) -> bool:
  return section.get("name") == "diffusers"
