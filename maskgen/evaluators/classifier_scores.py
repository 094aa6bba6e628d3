"""What generated pictures are good for: training a classifier, and passing for real ones."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
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


def label(made: PictureSet, real: PictureSet) -> tuple[np.ndarray, np.ndarray, int]:
  """The classes of the pictures of both sets, int [n] each, and the number of classes.

  Classes are the sub-folders that pictures are in, or else `PictureSet.labels`. Where one set has sub-folders
  and the other one labels, labels count the sub-folders by name.

  Raises:
    UserError: if a picture has no class, or the classes of the two sets differ.
  """
  found = [_classes(pictures) for pictures in (made, real)]
  if found[0].dtype.kind != found[1].dtype.kind:
    found = [
      np.unique(classes, return_inverse=True)[1] if classes.dtype.kind == "U" else classes
      for classes in found
    ]
  if different := sorted({*found[0].tolist()} ^ {*found[1].tolist()}):
    lacking = (made, real)[different[0] in found[0]]
    raise UserError(
      f"{lacking.name} has no picture of class '{different[0]}', unlike the other set: 'cas' needs the same "
      "classes"
    )
  names, labels = np.unique(np.concatenate(found), return_inverse=True)
  return labels[: len(made)], labels[len(made) :], len(names)


def _classes(pictures: PictureSet) -> np.ndarray:
  """The class of each picture, a name or a number, [n]."""
  loose = [name for name in pictures.names if "/" not in name]
  if not loose:
    return np.array([name.partition("/")[0] for name in pictures.names])
  if pictures.labels is None:
    raise UserError(
      f"'cas' needs the class of each picture, but '{loose[0]}' of {pictures.name} has none: sort pictures "
      "into sub-folders, save the classes of an npz file as arr_1, or leave it out"
    )
  return pictures.labels


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
    UserError: as `label` does, or if there are too few pictures.
  """
  made_labels, real_labels, classes = label(made, real) if "cas" in metrics else (None, None, 0)
  count = min(len(made), len(real) // 2, NUM_IMAGES)
  train = functools.partial(picture_classifier.train, rows=rows, steps=STEPS, seed=0)
  drawn = draw(_read(real, real_labels, batch_size), 2 * count, 0)
  known, held_out = ({name: values[half] for name, values in drawn.items()} for half in _halves(count))
  new = draw(_read(made, made_labels, batch_size), count, 0)
  numbers: dict[str, float] = {}
  if "two_sample" in metrics:
    numbers["two_sample"] = two_sample(new["image"], known["image"], train)
    numbers["two_sample_floor"] = two_sample(held_out["image"], known["image"], train)
  if "cas" in metrics:
    for name, images in (("cas", new), ("cas_real", known)):
      classify = train(images["image"], images["label"], classes)
      numbers[name] = float((classify(held_out["image"]) == held_out["label"]).mean())
  return numbers


def _halves(count: int) -> tuple[slice, slice]:
  return slice(count), slice(count, 2 * count)


def _read(
  pictures: PictureSet, labels: np.ndarray | None, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of "image", and with labels "label" [b]."""
  start = 0
  for images in pictures.read(batch_size):
    part = slice(start, start + len(images))
    start = part.stop
    yield {"image": images} | ({} if labels is None else {"label": labels[part]})


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
