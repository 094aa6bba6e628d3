"""The distance of generated images from real ones, and their coverage of the classes."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from maskgen import images as images_lib
from maskgen.config import fields
from maskgen.errors import UserError
from maskgen.evaluators import classifiers, frechet, pictures
from maskgen.evaluators.batches import (
  collect,
  first_batch,
  gather,
  generate,
  key_shapes,
  one_blas_thread,
  stream,
)
from maskgen.evaluators.context import Batch, Call, Context, Report
from maskgen.evaluators.feature_spaces import Space, name_of, open_space


def class_balance(classes: np.ndarray, num_classes: int) -> dict[str, float]:
  """Describes the histogram of predicted classes, int [n].

  Returns:
    "class_share_min": the share of the rarest class, at most 1 / num_classes; "class_entropy" in nats, at
    most log(num_classes).
  """
  shares = np.bincount(classes, minlength=num_classes) / len(classes)
  seen = shares[shares > 0]
  return {
    "class_share_min": float(shares.min()),
    "class_entropy": float(-np.sum(seen * np.log(seen)) + 0.0),
  }


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Generates images and compares them with the real images of the training split.

  Metrics, where S is the name of the feature space:
    `frechet_S`: the Frechet distance of the generated images. It falls with the number of images, so compare
      equal numbers only.
    `frechet_S_floor`: the distance of the evaluation split, for reference.
    `frechet_S_uniform_codes`: the distance of the same number of images decoded from uniformly drawn codes,
      if the objective has the prediction function `generate_uniform`.
    With a classifier: its accuracy on the evaluation split, `<classifier>_top1`, and `class_share_min` and
      `class_entropy` (nats) of its predictions for the generated images.
    If the objective takes labels, all classes are generated equally often, and `<classifier>_agreement` is
      the share of images for which the classifier predicts the label.
  Pictures: `generated`, the first samples; `generated_by_class`, a row for each class.

  Attributes:
    num_images: the number of images to generate.
    features: see `feature_spaces.open_space`.
    classifier: a name in `classifiers.CLASSIFIERS`, for small labelled data, or None.
    num_pictures: the number of samples in the picture.
    seed: image i depends only on this and i, at every training step.
    captions: whether images are generated from the captions of the evaluation split, in order.
    sampling: options of `generate`; see `Context.check_sampling`.
  """

  requires: ClassVar[tuple[str, ...]] = ("generate",)

  context: Context
  num_images: int = 1000
  features: str = "pixels"
  classifier: str | None = None
  num_pictures: int = 64
  seed: int = 0
  captions: bool = False
  sampling: Mapping[str, Any] = fields.section(
    took=("steps", "schedule", "temperature", "guidance", "guidance_schedule"), default_factory=dict
  )

  def __post_init__(self):
    _ = self._space  # this checks `features`
    classifiers.check(self.classifier, self.context)
    self.context.check_sampling(self.sampling)
    if self.captions and self.context.captions is None:
      raise UserError("captions is True, but the objective takes no captions: leave it out")
    unconditional = not self.captions and not self.context.num_classes
    if unconditional and self.sampling.get("guidance", 1) != 1:
      raise UserError("guidance needs captions: set captions=True or leave guidance out")
    if self.num_images < 2 or self.num_pictures < 1:
      raise UserError(
        f"num_images is {self.num_images} and num_pictures is {self.num_pictures}: give at least 2 and 1"
      )

  def trace(self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    inputs = {"key": key_shapes(batch)}
    if "generate_uniform" in self.context.predict:
      call("generate_uniform", inputs)
    wanted = ("label",) * bool(self.context.num_classes) + ("caption",) * self.captions
    call("generate", inputs | {name: batch[name] for name in wanted}, **self.sampling)

  def memory(
    self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct], num_images: Mapping[str, int]
  ) -> int:
    if self.classifier is None:
      return 0
    # Pixels in float64, in batches and put together.
    return 16 * math.prod(batch["image"].shape[1:]) * max(num_images.values())

  @one_blas_thread
  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Evaluates; `rng` is a typed key."""
    report, predict = self.measure(variables, rng, **self.sampling), self.context.predict
    numbers = dict(report.numbers)

    def uniform_features():
      for images, count in self._draws(predict["generate_uniform"], variables, rng):
        yield gather(self._space(images))[:count]

    if "generate_uniform" in predict:
      uniform = frechet.fit(uniform_features())
      numbers[f"frechet_{name_of(self.features)}_uniform_codes"] = frechet.distance(uniform, self._real)
    if self.classifier is not None:
      numbers[f"{self.classifier}_top1"] = self._real_classes[1]
    return Report(numbers, report.pictures)

  @one_blas_thread
  def measure(self, variables: Any, rng: jax.Array, **options: Any) -> Report:
    """The part of `run` that depends on sampling, with these options of `generate`."""
    name, num_classes = f"frechet_{name_of(self.features)}", self.context.num_classes
    shown: list[np.ndarray] = []
    classes: list[np.ndarray] = []

    def generated_features():
      conditions = {"num_classes": num_classes, "captions": self._eval_captions}
      draws = self._draws(self.context.predict["generate"], variables, rng, **conditions, **options)
      for images, count in draws:
        num_shown = sum(map(len, shown))
        if num_shown < self.num_pictures:
          shown.append(gather(images)[: min(count, self.num_pictures - num_shown)])
        if self.classifier is not None:
          classes.append(self._real_classes[0].predict(_flat(gather(images)[:count])))
        yield gather(self._space(images))[:count]

    numbers = {
      name: frechet.distance(frechet.fit(generated_features()), self._real),
      f"{name}_floor": self._floor,
    }
    if self.classifier is not None:
      seen = np.concatenate(classes)
      numbers |= class_balance(seen, len(self.context.class_names or ()))
      if num_classes:
        asked = np.arange(len(seen)) % num_classes
        numbers[f"{self.classifier}_agreement"] = float(np.mean(seen == asked))
    made = {"generated": images_lib.grid(np.concatenate(shown))}
    if num_classes:
      made["generated_by_class"] = pictures.generated(
        self.context, variables, rng, self.num_pictures, self.seed, **options
      )
    return Report(numbers, made)

  def _draws(self, fn, variables, rng, **options):
    return generate(
      fn,
      variables,
      rng,
      like=self._like,
      seed=self.seed,
      num_images=self.num_images,
      **options,
    )

  # The properties below do not depend on the variables: computed at the first evaluation, then kept.

  @functools.cached_property
  def _space(self) -> Space:
    return open_space(self.features, self.context)

  @functools.cached_property
  def _like(self) -> Batch:
    return {"valid": first_batch(self.context)["valid"]}  # without a reference to the images

  @functools.cached_property
  def _eval_captions(self) -> np.ndarray | None:
    """The captions for generation, int32 [m, length]."""
    if not self.captions:
      return None
    return collect(self.context, "eval", lambda batch: {"caption": batch["caption"]}, limit=self.num_images)[
      "caption"
    ]

  def _fit_split(self, split: str) -> frechet.Gaussian:
    parts = stream(self.context, split, lambda batch: {"features": self._space(batch["image"])})
    return frechet.fit(part["features"] for part in parts)

  @functools.cached_property
  def _real(self) -> frechet.Gaussian:
    return self._fit_split("train")

  @functools.cached_property
  def _floor(self) -> float:
    return frechet.distance(self._fit_split("eval"), self._real)

  @functools.cached_property
  def _real_classes(self) -> tuple[Any, float]:
    """The trained classifier and its accuracy on the evaluation split."""
    assert self.classifier is not None
    model = classifiers.train(self.classifier, self.context, lambda images: _flat(gather(images)))
    test = collect(self.context, "eval", lambda batch: {key: batch[key] for key in ("image", "label")})
    return model, float(model.score(_flat(test["image"]), test["label"]))


def _flat(images: np.ndarray) -> np.ndarray:
  return images_lib.to_uint8(images).reshape(len(images), -1) / 255.0
