"""What the probe computes beyond its defaults, against scikit-learn, NumPy loops and formulas."""

import math

import jax
import numpy as np
import pytest
import test_evaluators
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit

from maskgen.errors import UserError
from maskgen.evaluators import confusion, linear, neighbours
from maskgen.evaluators.batches import one_blas_thread
from maskgen.images import to_float

digits = test_evaluators.digits
run, scale = test_evaluators.run, test_evaluators.scale


def blobs(seed, n, width=6, classes=4, spread=2.0):
  """Overlapping classes; each feature has another scale, so that the penalty matters."""
  centres = np.random.default_rng(9).normal(size=(classes, width))
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, classes, n)
  noise = rng.normal(size=(n, width))
  return ((centres[labels] + spread * noise) * np.logspace(-1, 0.5, width)).astype(np.float32), labels


# Logistic regression


@pytest.mark.parametrize("peak", [0, 5, 47, 70, 96])
def test_the_search_of_clip_finds_a_peak_in_fifteen_steps(peak):
  tried = []

  def score(c):
    tried.append(round(8 * (math.log10(c) + 6), 6))
    return -abs(tried[-1] - peak)

  chosen = linear.SWEEPS["clip"].choose(score)
  assert chosen == pytest.approx(10 ** (peak / 8 - 6))
  assert tried[:7] == [0, 16, 32, 48, 64, 80, 96] and len(tried) == len(set(tried)) <= 15


def test_dinov2_tries_all_and_of_equal_ones_takes_the_smallest():
  tried = []
  assert linear.SWEEPS["dinov2"].choose(lambda c: tried.append(c) or 0.0) == pytest.approx(1e-6)
  np.testing.assert_allclose(tried, 10 ** np.linspace(-6, 5, 45))


@one_blas_thread
def test_the_choice_and_the_classifier_are_those_of_scikit_learn():
  features, labels = blobs(0, 120)
  sweep = linear.Sweep(-3.0, 1.0, 5, strides=(1,), tolerance=1e-6)
  model, c = sweep.fit(features, labels, held_out=0.25, seed=3)
  part = np.full(120, -1)  # -1 is always in the training part
  part[np.random.default_rng(3).permutation(120)[:30]] = 0
  reference = GridSearchCV(
    LogisticRegression(max_iter=1000, tol=1e-6), {"C": np.logspace(-3, 1, 5)}, cv=PredefinedSplit(part)
  ).fit(features.astype(np.float64), labels)
  assert c == reference.best_params_["C"] and len(set(reference.cv_results_["mean_test_score"])) > 2
  np.testing.assert_allclose(model.coef_, reference.best_estimator_.coef_, rtol=1e-6)
  # The gradient of C * sum of the losses + |W|^2 / 2 is zero.
  error = model.predict_proba(features.astype(np.float64)) - np.eye(4)[labels]
  np.testing.assert_allclose(c * error.T @ features.astype(np.float64), -model.coef_, atol=1e-3)
  with pytest.raises(UserError, match="9 training images are too few to hold out a part"):
    sweep.fit(features[:9], labels[:9], held_out=0.1, seed=0)


def test_nothing_is_chosen_on_the_evaluation_split(digits):
  """With other labels and other images there, the choice stays; only the accuracies change."""
  (images, labels), (test_images, test_labels) = digits
  train = (images[:200], labels[:200])
  predict = {"features": lambda v, b, r: to_float(b["image"]).reshape(len(b["image"]), -1)}
  options = dict(sweeps=("clip",), baselines=False, shots=())

  def evaluate(test):
    return run("probe", test_evaluators.make_context(predict, train, test), scale(1.0), **options).numbers

  numbers = evaluate((test_images, test_labels))
  assert numbers["top1_clip"] > 0.6
  for other in ((test_images, (test_labels + 1) % 10), (255 - test_images[:50], test_labels[:50])):
    changed = evaluate(other)
    assert changed["log10_C_clip"] == numbers["log10_C_clip"] and changed["top1_clip"] < 0.3


# Neighbours


def cosines(a, b):
  a, b = (x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
  return a @ b.T


@pytest.mark.parametrize("cells", [2**27, 7 * 60])  # the similarities in one block, and in several
def test_neighbours_equal_loops(monkeypatch, cells):
  monkeypatch.setattr(neighbours, "_CELLS", cells)
  (train, labels), (test, test_labels) = blobs(0, 60), blobs(1, 30)
  similar = cosines(test, train)
  for k, predicted in neighbours.knn(train, labels, test, (1, 5, 60), classes=5):
    for i, row in enumerate(similar):
      votes = [0.0] * 5
      for j in np.argsort(-row)[:k]:
        votes[labels[j]] += math.exp(row[j] / 0.07)
      assert predicted[i] == np.argmax(votes), (k, i)
  unit = train / np.linalg.norm(train, axis=1, keepdims=True)
  known = labels != 2  # no training image of class 2
  means = np.stack([unit[labels == label].mean(axis=0) for label in (0, 1, 3)])
  expected = np.array([0, 1, 3])[cosines(test, means).argmax(axis=1)]
  np.testing.assert_array_equal(neighbours.nearest_mean(train[known], labels[known], test), expected)
  others = cosines(test, test)
  np.fill_diagonal(others, -2.0)
  order = np.argsort(-others, axis=1)
  for k, found in neighbours.recall(test, test_labels, (1, 3, 29)).items():
    hits = [any(test_labels[j] == test_labels[i] for j in order[i, :k]) for i in range(30)]
    assert found == pytest.approx(np.mean(hits)), k


def test_votes_are_weighted_and_not_only_counted():
  train = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], np.float32)
  test = np.array([[1.0, 0.9]], np.float32)
  predicted = dict(neighbours.knn(train, np.array([0, 1, 1]), test, (1, 3), classes=2))
  assert predicted[1] == 0 and predicted[3] == 0  # exp(0.074 / 0.07) > 2
  test = np.array([[1.0, 0.95]], np.float32)
  assert dict(neighbours.knn(train, np.array([0, 1, 1]), test, (3,), classes=2))[3] == 1


# Classes


def test_classes_and_confusions():
  labels, predicted = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 2, 1])
  counts = confusion.count(labels, predicted, 3)
  np.testing.assert_array_equal(counts, [[3, 1, 0], [0, 1, 1], [0, 0, 0]])
  first, _, empty = confusion.per_class(counts, ("cat", "dog", "cow"))
  # Wilson's formula for 3 of 4.
  z, p, n = 1.959964, 0.75, 4
  middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
  half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
  assert (first["low"], first["high"]) == pytest.approx((middle - half, middle + half), abs=1e-4)
  assert (first["class"], first["images"], first["top1"]) == ("cat", 4, 0.75)
  assert (first["taken_for"], first["as_often"]) == ("dog", 1)
  assert (empty["images"], empty["top1"], empty["taken_for"]) == (0, "", "")
  assert confusion.table(counts, ("a", "a", "b"))[0] == {
    "true class": "a (0)",
    "a (0)": 3,
    "a (1)": 1,
    "b (2)": 0,
  }


@pytest.mark.parametrize("name, count", [("7", 10), ("a rather long name", 3), ("dog", 100), ("dog", 1000)])
def test_the_picture_of_confusions(name, count):
  counts = np.diag(np.full(count, 9))
  counts[0, 1] = 1
  picture = confusion.draw(counts, [name] * count)
  assert picture.dtype == np.uint8 and picture.shape[2] == 3 and 500 < len(picture) < 1100
  once_of_ten = [round(255 + math.sqrt(0.1) * (part - 255)) for part in confusion._WRONG]
  for colour in (once_of_ten, confusion._RIGHT):
    assert (picture == colour).all(axis=-1).any()


# The evaluator


def test_options_add_metrics_of_features_and_baselines(digits):
  (images, labels), (test_images, test_labels) = digits
  context = test_evaluators.make_context(
    {"features": lambda v, b, r: to_float(b["image"]).reshape(len(b["image"]), -1) * v["params"]},
    (images[:120], labels[:120]),
    (test_images[:40], test_labels[:40]),
    fresh=lambda seed, frozen: scale(2.0),
  )
  options = dict(sweeps=("clip",), neighbours=(10, 5000), nearest_mean=True, recall_at=(1, 40))
  options |= dict(intervals=True, draws=2, shots=(1,), random_encoders=2, per_class=("top1", "top1_knn5000"))
  report = run("probe", context, scale(1.0), **options)
  optional = {"top1_clip", "log10_C_clip", "top1_knn10", "top1_nearest_mean", "recall_at_1"}
  measured = {"top1", "top1_ridge", "top1_knn", "top1_1shot", "top1_1shot_std", "top1_1shot_ci95"}
  baselines = {f"{key}_{name}" for key in {"top1", *optional} for name in ("pixels", "random_encoder")}
  assert set(report.numbers) == measured | optional | baselines
  for key in optional:
    assert report.numbers[key] == report.numbers[f"{key}_pixels"]
    if not key.startswith("log10_C"):
      assert 0.3 < report.numbers[key] < 1.0
  # 12.706 is Student's quantile for two scores, whose standard deviation (ddof 0) is half their difference.
  assert report.numbers["top1_1shot_ci95"] == pytest.approx(
    12.7062 * report.numbers["top1_1shot_std"], rel=1e-4
  )
  assert set(report.tables) == {"classes_top1", "confusion_top1"} and set(report.pictures) == {
    "confusion_top1"
  }
  rows = report.tables["classes_top1"]
  right = sum(row["images"] * row["top1"] for row in rows if row["images"])
  assert right / 40 == pytest.approx(report.numbers["top1"], abs=1e-4)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(sweeps=("clp",)), "sweep 'clp' does not exist; did you mean 'clip'"),
    (dict(intervals=True, draws=1), "draws is 1: intervals need at least 2"),
    (dict(neighbours=(10, 0)), r"neighbours is \(10, 0\): it must be a number of at least 1"),
    (dict(held_out=1.0), r"held_out is 1\.0"),
    (dict(baselines=("pixel",)), "baseline 'pixel' does not exist; did you mean 'pixels'"),
    (dict(per_class=("top1_clip",)), "per_class names 'top1_clip', which is not measured"),
  ],
)
def test_wrong_options(digits, options, message):
  context = test_evaluators.make_context({"features": jax.nn.relu}, *digits)
  with pytest.raises(UserError, match=message):
    run("probe", context, **options)
