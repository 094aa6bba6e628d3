"""What generated pictures are good for: training a classifier, and passing for real ones."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import NamedSharding

from maskgen import images as images_lib
from maskgen.config import check_at_least, fields
from maskgen.errors import UserError
from maskgen.evaluators import picture_classifier, set_metrics
from maskgen.evaluators.batches import draw, first_batch, gather, generate, key_shapes, stream
from maskgen.evaluators.context import Batch, Call, Context, Report
from maskgen.evaluators.picture_classifier import Classify
from maskgen.evaluators.picture_sets import PictureSet

METRICS = ("two_sample", "cas")
# Real pictures that are used at most, and steps of each training.
NUM_IMAGES, STEPS = 10_000, 500

# Trains a classifier on images uint8 [n, h, w, c] and labels [n] of a number of classes.
Train = Callable[[np.ndarray, np.ndarray, int], Classify]


def two_sample(first: np.ndarray, second: np.ndarray, train: Train) -> float:
  """The accuracy of a classifier that tells two sets apart (Lopez-Paz and Oquab 2017); 0.5 if it cannot.

  It is trained on one half of each set and tested on the other half.

  Args:
    first: images uint8 [n, h, w, c], in random order.
    second: likewise.
    train: see `Train`.

  Raises:
    UserError: if n is less than 4.
  """
  set_metrics.check_count("'two_sample'", len(first), 4, "pictures in each set")
  half = len(first) // 2
  classify = train(np.concatenate([first[:half], second[:half]]), np.repeat([0, 1], half), 2)
  hits = np.concatenate([classify(first[half:]) == 0, classify(second[half:]) == 1])
  return float(hits.mean())


def classes_of(metrics: Collection[str], made: PictureSet, real: PictureSet) -> tuple[str, ...]:
  """The names of the classes, if a metric needs them: the sub-folders that pictures are in.

  Raises:
    UserError: if "cas" is among the metrics and a picture is in no sub-folder, or the sub-folders of the two
      sets differ.
  """
  if "cas" not in metrics:
    return ()
  found = []
  for pictures in (made, real):
    if loose := [name for name in pictures.names if "/" not in name]:
      raise UserError(
        f"'cas' needs a sub-folder for each class, but '{loose[0]}' of {pictures.name} is in none: sort the "
        "pictures, or leave it out"
      )
    found.append({_class(name) for name in pictures.names})
  if different := sorted(found[0] ^ found[1]):
    lacking = (made, real)[different[0] in found[0]]
    raise UserError(
      f"{lacking.name} has no sub-folder '{different[0]}', unlike the other set: 'cas' needs the same classes"
    )
  return tuple(sorted(found[0]))


def compare(
  metrics: Collection[str], made: PictureSet, real: PictureSet, rows: NamedSharding, batch_size: int
) -> dict[str, float]:
  """The metrics of `Evaluator` for pictures on disk, among `METRICS`, with their bounds.

  Of the real pictures, a random half takes the place of the training split, the rest that of the evaluation
  split; the other set is reduced to as many, or the halves to the size of the other set.

  Args:
    metrics: names in `METRICS`.
    made: generated pictures.
    real: real ones.
    rows: how a batch is placed on the devices.
    batch_size: pictures to read at once.

  Raises:
    UserError: as `classes_of` does, or if there are too few pictures.
  """
  classes = classes_of(metrics, made, real)
  count = min(len(made), len(real) // 2, NUM_IMAGES)
  train = functools.partial(picture_classifier.train, rows=rows, steps=STEPS, seed=0)
  drawn = draw(_read(real, classes, batch_size), 2 * count, 0)
  known, held_out = ({name: values[half] for name, values in drawn.items()} for half in _halves(count))
  new = draw(_read(made, classes, batch_size), count, 0)
  numbers: dict[str, float] = {}
  if "two_sample" in metrics:
    numbers["two_sample"] = two_sample(new["image"], known["image"], train)
    numbers["two_sample_floor"] = two_sample(held_out["image"], known["image"], train)
  if "cas" in metrics:
    for name, images in (("cas", new), ("cas_real", known)):
      classify = train(images["image"], images["label"], len(classes))
      numbers[name] = float((classify(held_out["image"]) == held_out["label"]).mean())
  return numbers


def _halves(count: int) -> tuple[slice, slice]:
  return slice(count), slice(count, 2 * count)


def _class(name: str) -> str:
  return name.partition("/")[0]


def _read(pictures: PictureSet, classes: Sequence[str], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
  """Batches of "image", and with classes "label" int32 [b]."""
  start = 0
  for images in pictures.read(batch_size):
    names = pictures.names[start : start + len(images)]
    start += len(images)
    labels = {"label": np.array([classes.index(_class(name)) for name in names], np.int32)} if classes else {}
    yield {"image": images} | labels


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Trains `models.resnet.Classifier` on generated pictures; what real ones give is the bound.

  Metrics:
    `two_sample`: the accuracy, on pictures that it has not seen, of a classifier that tells generated
      pictures from real training ones; 0.5 is perfect.
    `two_sample_floor`: the same for real pictures and other real ones.
    If the objective takes labels:
    `cas`: the classification accuracy score (Ravuri and Vinyals 2019), the accuracy on the evaluation split
      of a classifier that is trained on as many generated pictures as there are real training ones.
    `cas_real`: the same of a classifier that is trained on the real ones.

  Each training takes as many steps, whatever the number of pictures. The classifiers of real pictures are
  trained at the first evaluation.

  Attributes:
    num_images: the largest number of real training pictures to use, drawn at random, and of generated ones.
    steps: the number of steps of each training, of 64 pictures.
    seed: of everything; image i depends only on this and i, at every training step.
    sampling: options of `generate`; see `Context.check_sampling`.
  """

  requires: ClassVar[tuple[str, ...]] = ("generate",)

  context: Context
  num_images: int = NUM_IMAGES
  steps: int = STEPS
  seed: int = 0
  sampling: Mapping[str, Any] = fields.section(default_factory=dict)

  def __post_init__(self):
    check_at_least(self, 8, "num_images")
    check_at_least(self, 1, "steps")
    self.context.check_sampling(self.sampling)

  def trace(self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    inputs = {"key": key_shapes(batch)}
    if self.context.num_classes:
      inputs["label"] = batch["label"]
    call("generate", inputs, **self.sampling)

  def memory(
    self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct], num_images: Mapping[str, int]
  ) -> int:
    drawn = min(self.num_images, num_images["train"])
    # Real and generated pictures, and copies of them in the order and the sets of a training.
    return math.prod(batch["image"].shape[1:]) * (4 * drawn + num_images["eval"])

  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Evaluates; `rng` is a typed key."""
    real = self._real["image"]
    classes = self.context.num_classes
    draws = generate(
      self.context.predict["generate"],
      variables,
      rng,
      like=self._like,
      seed=self.seed,
      num_images=len(real),
      num_classes=classes,
      **self.sampling,
    )
    made = np.concatenate([images_lib.to_uint8(gather(images)[:count]) for images, count in draws])
    numbers = {
      "two_sample": two_sample(made[: len(real) // 2], real[: len(real) // 2], self._train),
      "two_sample_floor": self._floor,
    }
    if classes:
      numbers["cas"] = self._accuracy(self._train(made, np.arange(len(made)) % classes, classes))
      numbers["cas_real"] = self._real_accuracy
    return Report(numbers)

  def _train(self, images: np.ndarray, labels: np.ndarray, classes: int) -> Classify:
    rows = self._like["valid"].sharding
    assert isinstance(rows, NamedSharding)
    return picture_classifier.train(images, labels, classes, rows=rows, steps=self.steps, seed=self.seed)

  def _accuracy(self, classify: Classify) -> float:
    parts = stream(self.context, "eval", _labelled)
    return float(np.concatenate([classify(part["image"]) == part["label"] for part in parts]).mean())

  # The properties below do not depend on the variables: computed at the first evaluation, then kept.

  @functools.cached_property
  def _like(self) -> Batch:
    return {"valid": first_batch(self.context)["valid"]}  # without a reference to the images

  @functools.cached_property
  def _real(self) -> Mapping[str, np.ndarray]:
    return draw(stream(self.context, "train", _labelled), self.num_images, self.seed)

  @functools.cached_property
  def _floor(self) -> float:
    known, held_out = (self._real["image"][half] for half in _halves(len(self._real["image"]) // 2))
    return two_sample(held_out, known, self._train)

  @functools.cached_property
  def _real_accuracy(self) -> float:
    return self._accuracy(self._train(self._real["image"], self._real["label"], self.context.num_classes))


def _labelled(batch: Batch) -> dict[str, jax.Array]:
  return {name: batch[name] for name in ("image", "label") if name in batch}
