"""The frozen image encoder that teaches an objective, from a section that describes it."""

from collections.abc import Mapping
from typing import Any

from maskgen import objectives, storage
from maskgen.errors import UserError, counted
from maskgen.models.image_encoder import EncoderPart
from maskgen.objectives import Tree


def check(teacher: EncoderPart, grid: tuple[int, int], channels: int, whose: str, parts: str) -> None:
  """Checks that a model can teach.

  Args:
    teacher: the model.
    grid: of what it teaches, which must be its own.
    channels: of the images that it is shown; for a network that sees pixels, 1 stands for equal channels.
    whose: the name of that in error messages, such as "the tokenizer".
    parts: what it consists of, such as "tokens".

  Raises:
    UserError: if it has another grid, reads other channels, or has no patch tokens.
  """
  found = teacher.encoder.positions.grid
  if found != grid:
    raise UserError(
      f"the teacher has {found[0]} x {found[1]} patches and {whose} {grid[0]} x {grid[1]} {parts}: give a "
      "teacher of the same grid"
    )
  known = teacher.encoder.image_shape[-1]
  if channels != known and not (channels == 1 and teacher.encoder.pixels):
    raise UserError(
      f"the teacher reads {counted(known, 'channel')} and {whose} {channels}: give a teacher of the same "
      "channels"
    )
  if teacher.pooled and not teacher.encoder.pools_patches:
    raise UserError("the teacher has no patch tokens: give the model that this classifier was made from")


def check_pretrained(teacher: EncoderPart, config: Mapping[str, Any]) -> None:
  """Checks the config of the model at `config.pretrained.teacher`.

  Raises:
    UserError: if its encoder is another one.
  """
  found = objectives.encoder_part(storage.model_section(config), "its objective")
  objectives.check_same(found, teacher, where="config.objective.teacher")


def freeze(teacher: EncoderPart, variables: Tree) -> dict[str, Tree]:
  """The part `teacher` of the frozen variables, from those of the pretrained model."""
  params, frozen = teacher.split(variables)
  return {"params": params, "frozen": frozen}
