"""Classifiers that learn from real images, and then say what generated ones show, by name."""

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn import svm

from maskgen.errors import UserError, nearest
from maskgen.evaluators.batches import stream
from maskgen.evaluators.context import Context
from maskgen.evaluators.feature_spaces import Space

# Of features [n, d], for small data.
CLASSIFIERS: dict[str, Callable[[], Any]] = {"svc": lambda: svm.SVC(kernel="rbf", gamma="scale")}


def check(name: str | None, context: Context) -> None:
  """Checks that a classifier exists, and that there are labels to learn from; None is no classifier.

  Raises:
    UserError: otherwise.
  """
  if name is not None and name not in CLASSIFIERS:
    raise UserError(f"classifier '{name}' does not exist{nearest(name, CLASSIFIERS)}")
  if name is not None and context.class_names is None:
    raise UserError(f"the data has no labels for the classifier '{name}': set classifier=None")


def train(name: str, context: Context, space: Space, num_images: int | None = None) -> Any:
  """Trains a classifier on the features of the first real training images, by default of all."""
  features: list[np.ndarray] = []
  labels: list[np.ndarray] = []
  parts = stream(context, "train", lambda batch: {"x": space(batch["image"]), "label": batch["label"]})
  for part in parts:
    features.append(part["x"])
    labels.append(part["label"])
    if num_images is not None and sum(map(len, labels)) >= num_images:
      break
  return CLASSIFIERS[name]().fit(np.concatenate(features)[:num_images], np.concatenate(labels)[:num_images])
