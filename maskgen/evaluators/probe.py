"""Linear, nearest-neighbour and few-shot probes of a frozen encoder's features, with three baselines."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from maskgen import images as images_lib
from maskgen.errors import UserError
from maskgen.evaluators.batches import collect, one_blas_thread
from maskgen.evaluators.context import Call, Context, Report
from maskgen.evaluators.feature_spaces import area_average

_NEIGHBOURS = 5
# Copies of a representation in float32 that standardisation and the classifiers hold at once.
_COPIES = 5
# Matrices [d, d] in float64 that ridge regression holds at once.
_MATRICES = 3
_MIN_WIDTH = 16


def ridge(features: np.ndarray, targets: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
  """Least squares with an L2 penalty on the weights but not on the bias, in closed form.

  Args:
    features: [n, d].
    targets: [n, k].
    penalty: the coefficient of the squared weights, > 0.

  Returns:
    (weights float64 [d, k], bias float64 [k]), for `features @ weights + bias`.
  """
  x, y = features.astype(np.float64), targets.astype(np.float64)
  x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
  x -= x_mean
  y -= y_mean
  if len(x) < x.shape[1]:  # the same weights, from the smaller of the two systems
    weights = x.T @ np.linalg.solve(x @ x.T + penalty * np.eye(len(x)), y)
  else:
    weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
  return weights, y_mean - x_mean @ weights


def pooled_pixels(images: jax.Array, width: int) -> jax.Array:
  """The pixels of images [b, h, w, c], averaged over areas if they are more than `width`: float32 [b, d]."""
  _, rows, columns, channels = images.shape
  side = math.isqrt(width // channels)
  small = images_lib.to_float(images)
  if rows * columns * channels > width:
    small = area_average(small, min(side, rows), min(side, columns))
  return small.reshape(len(images), -1)


def hashed_onehot(tokens: jax.Array, codes: int, width: int) -> jax.Array:
  """One-hot codes of each position, float32 [b, n * codes], or at most `width` random signed sums of them.

  Inner products stay the same in expectation (Weinberger et al. 2009). The sums are fixed, so that all
  batches and both splits have the same.

  Args:
    tokens: int32 [b, n].
    codes: the size of the codebook.
    width: the largest number of features.
  """
  b, n = tokens.shape
  if n * codes <= width:
    return jax.nn.one_hot(tokens, codes).reshape(b, -1)
  place, sign = jax.random.split(jax.random.key(0))
  bucket = jax.random.randint(place, (n * codes,), 0, width)
  signs = jax.random.rademacher(sign, (n * codes,), jnp.float32)
  at = jnp.arange(n)[None] * codes + tokens
  rows = jnp.arange(b)[:, None]
  return jnp.zeros((b, width)).at[rows, bucket[at]].add(signs[at])


def balanced_draw(labels: np.ndarray, shots: int, classes: int, seed: int) -> np.ndarray:
  """Draws `shots` examples of each class without replacement: indices int [classes * shots]."""
  generator = np.random.default_rng((seed, shots))
  members = [np.flatnonzero(labels == label) for label in range(classes)]
  return np.concatenate([generator.choice(each, shots, replace=False) for each in members])


@dataclasses.dataclass(frozen=True)
class Split:
  """One representation of the data: features [n, d] and labels [n] of both splits."""

  train: np.ndarray
  train_labels: np.ndarray
  test: np.ndarray
  test_labels: np.ndarray

  def standardized(self) -> "Split":
    """Centres and scales each feature with the training split's statistics."""
    scaler = StandardScaler().fit(self.train)
    return dataclasses.replace(self, train=scaler.transform(self.train), test=scaler.transform(self.test))

  def accuracy(self, predicted: np.ndarray) -> float:
    return float(np.mean(predicted == self.test_labels))

  def logistic(self) -> float:
    """Accuracy of logistic regression (L2, C = 1) on all training labels."""
    model = LogisticRegression(max_iter=1000).fit(self.train, self.train_labels)
    return self.accuracy(model.predict(self.test))

  def neighbours(self) -> float:
    """Accuracy of a classifier of the 5 nearest neighbours by cosine."""
    model = KNeighborsClassifier(_NEIGHBOURS, metric="cosine").fit(self.train, self.train_labels)
    return self.accuracy(model.predict(self.test))

  def ridge(self, classes: int, subset: np.ndarray | slice = slice(None)) -> float:
    """Accuracy of ridge regression to one-hot labels, trained on `subset`.

    Standardized features have a squared norm near d, so a penalty of d suits any width.
    """
    features, labels = self.train[subset], self.train_labels[subset]
    weights, bias = ridge(features, np.eye(classes)[labels], penalty=features.shape[1])
    return self.accuracy(np.argmax(self.test @ weights + bias, axis=1))


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Fits simple classifiers to frozen features of the training split and tests them on the evaluation split.

  All representations are first standardized with the statistics of the training split. All features must fit
  in memory; wider baselines are reduced batch by batch, see `baseline_width`.

  Metrics (fractions in [0, 1]): `top1` (logistic regression); `top1_ridge`; `top1_knn` (5 neighbours,
  cosine); `top1_<k>shot` and `top1_<k>shot_std` (ridge regression on k labels per class, mean and standard
  deviation over balanced draws); and logistic regression on baselines: `top1_random_encoder` (an untrained
  encoder, mean over seeds), `top1_pixels` and, if the objective has a codebook, `top1_token_onehot`. The
  baselines are measured at the first evaluation and then kept, which assumes a frozen tokenizer.

  Attributes:
    num_images: the number of training images to fit; None for all.
    shots: labels per class of the few-shot metrics; skipped if a class has fewer examples.
    draws: the number of draws that each few-shot metric averages.
    random_encoders: the number of untrained encoders that the baseline averages.
    baselines: whether to measure the baselines.
    baseline_width: the largest number of features of the baselines on pixels and codes. Images with more
      pixels are averaged over areas, and more one-hot codes are summed at random, see `hashed_onehot`.
    seed: of the draws and the untrained encoders.
  """

  requires: ClassVar[tuple[str, ...]] = ("features",)

  context: Context
  num_images: int | None = None
  shots: tuple[int, ...] = (1, 5, 10)
  draws: int = 5
  random_encoders: int = 3
  baselines: bool = True
  baseline_width: int = 4096
  seed: int = 0
  _baselines: dict[str, float] = dataclasses.field(default_factory=dict, init=False, repr=False)

  def __post_init__(self):
    if self.context.class_names is None:
      remedy = self.context.lacks.get("label", "remove this evaluation")
      raise UserError(f"the data has no labels to probe: {remedy}")
    images = 1 if self.num_images is None else self.num_images
    if min(images, self.draws, self.random_encoders, *self.shots, 1) < 1:
      raise UserError("num_images, shots, draws and random_encoders must be at least 1")
    if self.baseline_width < _MIN_WIDTH:
      raise UserError(f"baseline_width is {self.baseline_width}: give at least {_MIN_WIDTH}")

  def trace(self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    call("features", batch)
    if self.baselines and self._has_codes:
      call("encode", batch)

  def memory(
    self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct], num_images: Mapping[str, int]
  ) -> int:
    train, test = num_images["train"], num_images["eval"]
    train = train if self.num_images is None else min(train, self.num_images)
    widths = [call("features", batch).shape[-1]]
    if self.baselines:
      widths.append(min(math.prod(batch["image"].shape[1:]), self.baseline_width))
      if self._has_codes:
        tokens = call("encode", batch).shape[-1]
        widths.append(min(tokens * self.context.codebook_size, self.baseline_width))
    return 4 * _COPIES * (train + test) * max(widths) + 8 * _MATRICES * max(widths) ** 2

  @property
  def _has_codes(self) -> bool:
    return "encode" in self.context.predict and self.context.codebook_size > 0

  @one_blas_thread
  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Evaluates; `rng` is a typed key."""
    split, classes = self._features(variables, rng), len(self.context.class_names or ())
    numbers = {
      "top1": split.logistic(),
      "top1_ridge": split.ridge(classes),
      "top1_knn": split.neighbours(),
    }
    smallest = np.bincount(split.train_labels, minlength=classes).min()
    for shots in self.shots:
      if shots > smallest:
        continue
      scores = [
        split.ridge(classes, balanced_draw(split.train_labels, shots, classes, self.seed + draw))
        for draw in range(self.draws)
      ]
      numbers[f"top1_{shots}shot"] = float(np.mean(scores))
      numbers[f"top1_{shots}shot_std"] = float(np.std(scores))
    if self.baselines and not self._baselines:
      self._baselines.update(self._measure_baselines(variables, rng))
    return Report(numbers | self._baselines)

  def _split(self, represent) -> Split:
    """Collects `represent(batch)` [b, d] over both splits and standardizes it."""

    def labelled(batch):
      return {"x": represent(batch), "label": batch["label"]}

    train = collect(self.context, "train", labelled, self.num_images)
    test = collect(self.context, "eval", labelled)
    return Split(train["x"], train["label"], test["x"], test["label"]).standardized()

  def _features(self, variables, rng) -> Split:
    return self._split(lambda batch: self.context.predict["features"](variables, batch, rng))

  def _measure_baselines(self, variables, rng) -> dict[str, float]:
    context = self.context
    fresh = (context.fresh_variables(self.seed + i, variables["frozen"]) for i in range(self.random_encoders))
    width = self.baseline_width
    pixels = self._split(lambda batch: pooled_pixels(batch["image"], width))
    numbers = {
      "top1_random_encoder": float(np.mean([self._features(v, rng).logistic() for v in fresh])),
      "top1_pixels": pixels.logistic(),
    }
    if self._has_codes:

      def onehot(batch):
        tokens = context.predict["encode"](variables, batch, rng)
        return _hashed_onehot(tokens, context.codebook_size, width)

      numbers["top1_token_onehot"] = self._split(onehot).logistic()
    return numbers


_hashed_onehot = jax.jit(hashed_onehot, static_argnums=(1, 2))
