"""Classifiers, by name, that are trained on real images and evaluate generated ones."""

from collections.abc import Callable
from typing import Any

from sklearn import svm

from maskgen.errors import UserError, nearest
from maskgen.evaluators.batches import collect
from maskgen.evaluators.context import Context
from maskgen.evaluators.feature_spaces import Features

# Classifiers of features [n, d], for small data.
CLASSIFIERS: dict[str, Callable[[], Any]] = {"svc": lambda: svm.SVC(kernel="rbf", gamma="scale")}


def check(name: str | None, context: Context) -> None:
  """Checks that a classifier exists and that the data has labels; None means no classifier.

  Raises:
    UserError: if not.
  """
  if name is not None and name not in CLASSIFIERS:
    raise UserError(f"classifier '{name}' does not exist{nearest(name, CLASSIFIERS)}")
  if name is not None and context.class_names is None:
    remedy = context.lacks.get("label", "set classifier=None")
    raise UserError(f"the data has no labels for the classifier '{name}': {remedy}")


def train(name: str, context: Context, space: Features, num_images: int | None = None) -> Any:
  """Trains a classifier on the features of the first `num_images` training images, by default all."""

  def labelled(batch):
    return {"x": space(batch["image"]), "label": batch["label"]}

  known = collect(context, "train", labelled, num_images)
  return CLASSIFIERS[name]().fit(known["x"], known["label"])
