"""The text-to-image model that a ViLex objective is built on, from a section that describes it."""

from collections.abc import Mapping
from typing import Any

from maskgen import objectives
from maskgen.errors import UserError
from maskgen.importers import diffusers
from maskgen.models.vilex import FrozenTextToImage
from maskgen.numerics.text import Captions
from maskgen.objectives import diffusion


def read(section: Mapping[str, Any]) -> tuple[FrozenTextToImage, Captions]:
  """A text-to-image model, and how captions are tokenized for it."""
  if section.get("name") == "diffusers":
    return diffusers.read_frozen(section)
  found = objectives.build(section)
  if not isinstance(found, diffusion.Objective):
    raise UserError("it does not generate images from texts: give a model of the diffusion objective")
  tokenizer = found.captions.opened
  ids = (tokenizer.start_id, tokenizer.end_id, (tokenizer.padding_id,))
  return FrozenTextToImage(found.model, found.image_size, found.captions.length, *ids), found.captions
