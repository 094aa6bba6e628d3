"""Pictures for people, of whatever the objective can do."""

import dataclasses
from typing import Any, ClassVar

import jax

from maskgen.errors import UserError, nearest
from maskgen.evaluators import pictures
from maskgen.evaluators.context import Context, Report


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Makes the pictures for which the objective has a prediction function.

  Pictures: `generated`, with classes a row for each; `reconstructions`: evaluation images over their
  reconstructions; `inpainted`: for each mask a row of images, a row with the hole in magenta, and the filled
  images.

  Attributes:
    num_generated: images in the picture `generated`.
    num_examples: evaluation images in the other pictures, at most one batch.
    masks: what is inpainted: names from `pictures.MASKS`.
    seed: of generation and inpainting, so that pictures of different steps are comparable.
  """

  requires: ClassVar[tuple[str, ...]] = ()

  context: Context
  num_generated: int = 64
  num_examples: int = 16
  masks: tuple[str, ...] = ("center", "right", "lower")
  seed: int = 0

  def __post_init__(self):
    if not {"generate", "reconstruct", "inpaint"} & self.context.predict.keys():
      raise UserError("the objective can make no pictures: remove this evaluation")
    if min(self.num_generated, self.num_examples, len(self.masks)) < 1:
      raise UserError("num_generated, num_examples and the number of masks must be at least 1")
    for name in self.masks:
      if name not in pictures.MASKS:
        raise UserError(f"mask '{name}' does not exist{nearest(name, pictures.MASKS)}")

  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Makes the pictures; `rng` is a typed key."""
    context, made = self.context, {}
    if "generate" in context.predict:
      made["generated"] = pictures.generated(context, variables, rng, self.num_generated, self.seed)
    if "reconstruct" in context.predict:
      made["reconstructions"] = pictures.reconstructions(context, variables, rng, self.num_examples)
    if "inpaint" in context.predict:
      made["inpainted"] = pictures.inpainted(
        context, variables, rng, self.num_examples, self.seed, self.masks
      )
    return Report(pictures=made)
