"""Command-line flags of `maskgen.tools.vilex`, and its model."""

import argparse
import logging
from typing import TYPE_CHECKING, Any

from maskgen import cli
from maskgen.errors import UserError

if TYPE_CHECKING:
  from maskgen.serving import ImageWords

# Options of `generate`, by default as in the config.
_OPTIONS = ("steps", "sampler", "image_guidance", "text_guidance", "negative_prompt")
log = logging.getLogger("maskgen")


def parser(what: str, example: str) -> cli.Parser:
  """Returns a parser with `--model`."""
  made = cli.Parser(what, f"python -m maskgen.tools.vilex {example}")
  made.add_model("workdir of a run, or an export")
  return made


def add_num_tokens(made: cli.Parser) -> None:
  """Adds `--num_tokens`."""
  made.add_argument(
    "--num_tokens", type=int, help="number of tokens of images without :k; default all that fit"
  )


def add_sampling(made: cli.Parser) -> None:
  """Adds the options of sampling that all prompts have."""
  options = made.add_argument_group("sampling, by default as in the config")
  options.add_argument("--steps", type=int, help="number of sampling steps")
  options.add_argument("--sampler", help="dpm or ddim")
  options.add_argument("--image_guidance", type=float, help="strength of the images; 1 is as trained")


def add_words(made: cli.Parser) -> None:
  """Adds the options of prompts with words."""
  options = made.add_argument_group("words")
  options.add_argument(
    "--text_guidance", type=float, help="strength of the words; larger values reduce similarity to the images"
  )
  options.add_argument("--negative_prompt", help="text that the pictures should not match")


def options(args: argparse.Namespace) -> dict[str, Any]:
  """The options of `generate` that are given."""
  return {name: value for name in _OPTIONS if (value := getattr(args, name, None)) is not None}


def load_model(path: str) -> "ImageWords":
  """Loads a model.

  Raises:
    UserError: if it is none of the vilex objective.
  """
  import maskgen
  from maskgen.serving import ImageWords

  log.info("loading %s", path)
  model = maskgen.load(path)
  if not isinstance(model, ImageWords):
    raise UserError(f"--model={path} is of objective '{model.kind}': give one of objective 'vilex'")
  return model
