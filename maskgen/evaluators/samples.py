"""Pictures from all prediction functions of the objective that make images."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from maskgen.errors import UserError, nearest
from maskgen.evaluators import pictures
from maskgen.evaluators.batches import key_shapes
from maskgen.evaluators.context import Call, Context, Report


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Draws each picture for which the objective has a prediction function.

  Pictures: `generated`, with classes a row for each; `reconstructions`, evaluation images above their
  reconstructions; `inpainted`, for each mask a row of images, a row with the hole in magenta, and a row of
  filled images.

  Attributes:
    num_generated: the number of images in the picture `generated`.
    num_examples: the number of evaluation images in the other pictures, at most one batch.
    masks: the parts of images to inpaint, names in `pictures.MASKS`.
    seed: of generation and inpainting, the same at every step so that pictures are comparable.
    sampling: options of `generate` and `inpaint`; see `Context.check_sampling`.
  """

  requires: ClassVar[tuple[str, ...]] = ()

  context: Context
  num_generated: int = 64
  num_examples: int = 16
  masks: tuple[str, ...] = ("center", "right", "lower")
  seed: int = 0
  sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not {"generate", "reconstruct", "inpaint"} & self.context.predict.keys():
      raise UserError("the objective has no prediction function that makes images: remove this evaluation")
    if min(self.num_generated, self.num_examples, len(self.masks)) < 1:
      raise UserError("num_generated, num_examples and the number of masks must be at least 1")
    for name in self.masks:
      if name not in pictures.MASKS:
        raise UserError(f"mask '{name}' does not exist{nearest(name, pictures.MASKS)}")

    self.context.check_sampling(self.sampling)

  def trace(self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    predict, image = self.context.predict, batch["image"]
    inputs = {"key": key_shapes(batch)}
    if self.context.num_classes:
      inputs["label"] = batch["label"]
    if "generate" in predict:
      call("generate", inputs, **self.sampling)
    if "reconstruct" in predict:
      call("reconstruct", batch)
    if "inpaint" in predict:
      mask = jax.ShapeDtypeStruct(image.shape[:3], bool)
      call("inpaint", inputs | {"image": image, "mask": mask}, **self.sampling)

  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Draws the pictures; `rng` is a typed key."""
    context, options, made = self.context, self.sampling, {}
    if "generate" in context.predict:
      made["generated"] = pictures.generated(
        context, variables, rng, self.num_generated, self.seed, **options
      )
    if "reconstruct" in context.predict:
      made["reconstructions"] = pictures.reconstructions(context, variables, rng, self.num_examples)
    if "inpaint" in context.predict:
      made["inpainted"] = pictures.inpainted(
        context, variables, rng, self.num_examples, self.seed, self.masks, **options
      )
    return Report(pictures=made)
