"""Probes of a frozen encoder's features: linear, neighbours, few labels, retrieval; with baselines."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from maskgen import config as config_lib
from maskgen.errors import UserError, nearest
from maskgen.evaluators import confusion, linear, neighbours
from maskgen.evaluators.batches import collect, one_blas_thread
from maskgen.evaluators.context import Batch, Call, Context, Report
from maskgen.evaluators.plain_features import (
  CLUSTERS,
  QUADRANTS,
  hashed,
  hashed_onehot,
  patch_clusters,
  patch_features,
  pooled_pixels,
  token_histogram,
)

_NEIGHBOURS = 5
# Copies of a representation in float32 that standardisation and the classifiers hold at once; sweeps hold
# more, in float64.
_COPIES, _SWEEP_COPIES = 5, 7
# Matrices [d, d] in float64 that ridge regression holds at once.
_MATRICES = 3
_MIN_WIDTH = 16
Represent = Callable[[Batch], jax.Array]  # features [b, d] of a batch
Shapes = Mapping[str, jax.ShapeDtypeStruct]  # of a batch
_ALWAYS = ("top1", "top1_ridge", "top1_knn")
_USUAL = ("random_encoder", "pixels", "token_onehot")
_SAMPLE = 1024  # training images in which `patch_clusters` looks for clusters


@dataclasses.dataclass(frozen=True)
class Split:
  """One representation of the data: features [n, d] and labels [n] of both splits.

  Predictions are int [n] for the test split.
  """

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

  def logistic(self) -> np.ndarray:
    """Predictions of logistic regression (L2, C = 1) on all training labels."""
    return LogisticRegression(max_iter=1000).fit(self.train, self.train_labels).predict(self.test)

  def neighbours(self) -> np.ndarray:
    """Predictions of a classifier of the 5 nearest neighbours by cosine."""
    model = KNeighborsClassifier(_NEIGHBOURS, metric="cosine").fit(self.train, self.train_labels)
    return model.predict(self.test)

  def ridge(self, classes: int, subset: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Predictions of ridge regression to one-hot labels, trained on `subset`.

    Standardized features have a squared norm near d, so a penalty of d suits any width.
    """
    features, labels = self.train[subset], self.train_labels[subset]
    weights, bias = linear.ridge(features, np.eye(classes)[labels], penalty=features.shape[1])
    return np.argmax(self.test @ weights + bias, axis=1)


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Fits simple classifiers to frozen features of the training split and tests them on the evaluation split.

  No choice is made on the evaluation split. All features must fit in memory; wider baselines are reduced
  batch by batch, see `baseline_width`.

  Metrics (fractions in [0, 1]) on representations that are standardized with the statistics of the training
  split: `top1` (logistic regression with C = 1); `top1_ridge`; `top1_knn` (5 neighbours, cosine);
  `top1_<k>shot` and `top1_<k>shot_std` (ridge regression on k labels per class, mean and standard deviation
  over balanced draws). On the features as they come, where options ask for them: `top1_clip`, `top1_dinov2`,
  `top1_knn<k>`, `top1_nearest_mean`, `recall_at_<k>`.

  Baselines have the same metrics as `top1` and the optional ones, with a suffix: `top1_random_encoder` (an
  untrained encoder, mean over seeds), `top1_pixels`, `top1_patch_clusters` (how near patches are to k-means
  clusters of them, see `patch_features`) and, if the objective has a codebook, `top1_token_histogram`,
  `top1_token_onehot` and `top1_code_vectors`. They are measured at the first evaluation and then kept, which
  assumes a frozen tokenizer.

  Attributes:
    num_images: the number of training images to fit; None for all.
    shots: labels per class of the few-shot metrics; skipped if a class has fewer examples.
    draws: the number of draws that each few-shot metric averages.
    intervals: whether to add `top1_<k>shot_ci95`, half the width of the 95% confidence interval (Student's)
      of the mean over draws.
    sweeps: logistic regression whose C is chosen as in the papers of "clip" or "dinov2", see `linear.SWEEPS`,
      on a part of the training split, and which is then fitted to all of it; `log10_C_<name>` is the choice.
    held_out: the share of that part.
    neighbours: each k of kNN with DINO's weights, see `neighbours.knn`; skipped if there are fewer images.
    nearest_mean: whether to classify by the nearest class mean, see `neighbours.nearest_mean`.
    recall_at: each k of `recall_at_<k>`, the share of evaluation images with one of their class among the k
      nearest others; skipped if there are fewer images.
    per_class: the classifiers, such as "top1" or "top1_clip", with a table `classes_<name>`, a table
      `confusion_<name>` and a picture of the latter.
    random_encoders: the number of untrained encoders that the baseline averages.
    baselines: the names of `BASELINES` to measure, those on codes only if the objective has a codebook; or
      True for an untrained encoder, pixels and one-hot codes, False for none.
    baseline_width: the largest number of features of the baselines on pixels and codes. Images with more
      pixels are averaged over areas, and more features of codes are summed at random, see `hashed`.
    seed: of the draws, the held-out part and the untrained encoders.
  """

  requires: ClassVar[tuple[str, ...]] = ("features",)

  context: Context
  num_images: int | None = None
  shots: tuple[int, ...] = (1, 5, 10)
  draws: int = 5
  intervals: bool = False
  sweeps: tuple[str, ...] = ()
  held_out: float = 0.1
  neighbours: tuple[int, ...] = ()
  nearest_mean: bool = False
  recall_at: tuple[int, ...] = ()
  per_class: tuple[str, ...] = ()
  random_encoders: int = 3
  baselines: bool | tuple[str, ...] = True
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
    if self.intervals and self.draws < 2:
      raise UserError("draws is 1: intervals need at least 2")
    if self.baseline_width < _MIN_WIDTH:
      raise UserError(f"baseline_width is {self.baseline_width}: give at least {_MIN_WIDTH}")
    config_lib.check_share(self, "held_out")
    config_lib.check_at_least(self, 1, "neighbours", "recall_at")
    for name in self.sweeps:
      if name not in linear.SWEEPS:
        raise UserError(f"sweep '{name}' does not exist{nearest(name, linear.SWEEPS)}")
    for name in self._named_baselines:
      if name not in BASELINES:
        raise UserError(f"baseline '{name}' does not exist{nearest(name, BASELINES)}")
    known = [*_ALWAYS, *(f"top1_{name}" for name in self.sweeps), *(f"top1_knn{k}" for k in self.neighbours)]
    known += ["top1_nearest_mean"] * self.nearest_mean
    for name in self.per_class:
      if name not in known:
        raise UserError(f"per_class names '{name}', which is not measured{nearest(name, known)}")

  def trace(self, call: Call, batch: Shapes) -> None:
    needed = itertools.chain(self.requires, *(BASELINES[name].needs for name in self._measured))
    for name in dict.fromkeys(needed):
      call(name, batch)

  def memory(self, call: Call, batch: Shapes, num_images: Mapping[str, int]) -> int:
    train, test = num_images["train"], num_images["eval"]
    train = train if self.num_images is None else min(train, self.num_images)
    widths = [call("features", batch).shape[-1]]
    known = (BASELINES[name].width(self.context, call, batch) for name in self._measured)
    widths += [min(width, self.baseline_width) for width in known]
    copies = _SWEEP_COPIES if self.sweeps else _COPIES
    return 4 * copies * (train + test) * max(widths) + 8 * _MATRICES * max(widths) ** 2

  @property
  def _named_baselines(self) -> tuple[str, ...]:
    return (_USUAL if self.baselines else ()) if isinstance(self.baselines, bool) else self.baselines

  @property
  def _measured(self) -> list[str]:
    """The baselines that the objective has."""
    has_codes = self.context.codebook_size > 0
    return [
      name
      for name in self._named_baselines
      if all(fn in self.context.predict and (fn == "features" or has_codes) for fn in BASELINES[name].needs)
    ]

  @one_blas_thread
  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Evaluates; `rng` is a typed key."""
    encoder = _encoder(self.context, variables, rng)
    split, names = self._split(encoder), self.context.class_names or ()
    standardized = split.standardized()
    predicted = {
      "top1": standardized.logistic(),
      "top1_ridge": standardized.ridge(len(names)),
      "top1_knn": standardized.neighbours(),
    }
    optional, numbers = self._optional(split)
    predicted |= optional
    numbers |= {name: split.accuracy(values) for name, values in predicted.items()}
    numbers |= self._few_shot(standardized, len(names))
    if self._measured and not self._baselines:
      self._baselines.update(self._measure_baselines(variables, rng))
    pictures: dict[str, np.ndarray] = {}
    tables: dict[str, list[dict[str, Any]]] = {}
    for name in self.per_class:
      if name in predicted:
        counts = confusion.count(split.test_labels, predicted[name], len(names))
        tables |= {f"classes_{name}": confusion.per_class(counts, names)}
        tables |= {f"confusion_{name}": confusion.table(counts, names)}
        pictures |= {f"confusion_{name}": confusion.draw(counts, names)}
    return Report(numbers | self._baselines, pictures, tables)

  def _few_shot(self, split: Split, classes: int) -> dict[str, float]:
    smallest, numbers = np.bincount(split.train_labels, minlength=classes).min(), {}
    for shots in self.shots:
      if shots > smallest:
        continue
      draws = (
        linear.balanced_draw(split.train_labels, shots, classes, self.seed + draw)
        for draw in range(self.draws)
      )
      scores = [split.accuracy(split.ridge(classes, draw)) for draw in draws]
      numbers[f"top1_{shots}shot"] = float(np.mean(scores))
      numbers[f"top1_{shots}shot_std"] = float(np.std(scores))
      if self.intervals:
        numbers[f"top1_{shots}shot_ci95"] = linear.interval(np.asarray(scores))
    return numbers

  def _optional(self, split: Split) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The predictions of the optional classifiers, and the other optional metrics."""
    predicted, numbers = {}, {}
    train, labels, test = split.train, split.train_labels, split.test
    for name in self.sweeps:
      model, c = linear.SWEEPS[name].fit(train, labels, self.held_out, self.seed)
      predicted[f"top1_{name}"] = model.predict(test.astype(np.float64))
      numbers[f"log10_C_{name}"] = math.log10(c)
    if voting := [k for k in self.neighbours if k <= len(train)]:
      classes = len(self.context.class_names or ())
      found = neighbours.knn(train, labels, test, voting, classes)
      predicted |= {f"top1_knn{k}": values for k, values in found}
    if self.nearest_mean:
      predicted["top1_nearest_mean"] = neighbours.nearest_mean(train, labels, test)
    if at := [k for k in self.recall_at if k < len(test)]:
      recalls = neighbours.recall(test, split.test_labels, at)
      numbers |= {f"recall_at_{k}": value for k, value in recalls.items()}
    return predicted, numbers

  def _split(self, represent: Represent) -> Split:
    """Collects a representation of both splits."""

    def labelled(batch):
      return {"x": represent(batch), "label": batch["label"]}

    train = collect(self.context, "train", labelled, self.num_images)
    test = collect(self.context, "eval", labelled)
    return Split(train["x"], train["label"], test["x"], test["label"])

  def _measure_baselines(self, variables: Any, rng: jax.Array) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name in self._measured:
      found = BASELINES[name].represent(self, variables, rng)
      scores = [self._baseline(self._split(represent)) for represent in found]
      numbers |= {f"{key}_{name}": float(np.mean([one[key] for one in scores])) for key in scores[0]}
    return numbers

  def _baseline(self, split: Split) -> dict[str, float]:
    predicted, numbers = self._optional(split)
    predicted = {"top1": split.standardized().logistic(), **predicted}
    return {key: split.accuracy(values) for key, values in predicted.items()} | numbers


@dataclasses.dataclass(frozen=True)
class Baseline:
  """A representation that an encoder is compared with.

  Attributes:
    needs: the prediction functions that it calls.
    width: (context, call, batch of shapes) -> the number of features before it is reduced.
    represent: (evaluator, variables, rng) -> the representations over which it is averaged.
  """

  needs: tuple[str, ...]
  width: Callable[[Context, Call, Shapes], int]
  represent: Callable[[Evaluator, Any, jax.Array], Iterable[Represent]]


def _encoder(context: Context, variables: Any, rng: jax.Array, fn: str = "features") -> Represent:
  """What a prediction function returns."""
  return lambda batch: context.predict[fn](variables, batch, rng)


def _untrained(probe: Evaluator, variables: Any, rng: jax.Array) -> Iterator[Represent]:
  for i in range(probe.random_encoders):
    yield _encoder(probe.context, probe.context.fresh_variables(probe.seed + i, variables["frozen"]), rng)


def _pixels(probe: Evaluator, variables: Any, rng: jax.Array) -> list[Represent]:
  return [lambda batch: pooled_pixels(batch["image"], probe.baseline_width)]


def _patches(probe: Evaluator, variables: Any, rng: jax.Array) -> list[Represent]:
  width, limit = probe.baseline_width, min(probe.num_images or _SAMPLE, _SAMPLE)
  sample = collect(probe.context, "train", lambda batch: {"image": batch["image"]}, limit)["image"]
  clusters = jax.device_get(patch_clusters(sample, width))
  return [lambda batch: _patch_features(clusters, batch["image"], width)]


def _codes(
  fn: str, features: Callable[[jax.Array, int, int], jax.Array]
) -> Callable[[Evaluator, Any, jax.Array], list[Represent]]:
  """`represent` by `features` of what a prediction function returns, the number of codes and the width."""

  def represent(probe: Evaluator, variables: Any, rng: jax.Array) -> list[Represent]:
    call, codes = _encoder(probe.context, variables, rng, fn), probe.context.codebook_size
    return [lambda batch: features(call(batch), codes, probe.baseline_width)]

  return represent


_hashed_onehot = jax.jit(hashed_onehot, static_argnums=(1, 2))
_patch_features = jax.jit(patch_features, static_argnums=2)
BASELINES = {
  "random_encoder": Baseline(
    ("features",), lambda context, call, batch: int(call("features", batch).shape[-1]), _untrained
  ),
  "pixels": Baseline((), lambda context, call, batch: math.prod(batch["image"].shape[1:]), _pixels),
  "patch_clusters": Baseline((), lambda context, call, batch: QUADRANTS * CLUSTERS, _patches),
  "token_histogram": Baseline(
    ("encode",), lambda context, call, batch: context.codebook_size, _codes("encode", token_histogram)
  ),
  "token_onehot": Baseline(
    ("encode",),
    lambda context, call, batch: int(call("encode", batch).shape[-1]) * context.codebook_size,
    _codes("encode", _hashed_onehot),
  ),
  "code_vectors": Baseline(
    ("code_vectors",),
    lambda context, call, batch: math.prod(call("code_vectors", batch).shape[1:]),
    _codes("code_vectors", lambda found, _, width: hashed(found.reshape(len(found), -1), width)),
  ),
}
