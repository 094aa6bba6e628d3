"""Linear classifiers of features on the host: ridge regression; logistic regression with a chosen penalty."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from maskgen.errors import UserError

_CONFIDENCE = 0.95


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


def balanced_draw(labels: np.ndarray, shots: int, classes: int, seed: int) -> np.ndarray:
  """Draws `shots` examples of each class without replacement: indices int [classes * shots]."""
  generator = np.random.default_rng((seed, shots))
  members = [np.flatnonzero(labels == label) for label in range(classes)]
  return np.concatenate([generator.choice(each, shots, replace=False) for each in members])


def interval(scores: np.ndarray) -> float:
  """Half the width of Student's 95% confidence interval of the mean of at least two scores."""
  return float(stats.sem(scores) * stats.t.ppf((1 + _CONFIDENCE) / 2, len(scores) - 1))


@dataclasses.dataclass(frozen=True)
class Sweep:
  """How a publication chooses C, the inverse of the penalty, of logistic regression (L-BFGS, L2).

  Attributes:
    low, high, steps: C is one of `steps` values with equal ratios, from 10^low to 10^high.
    strides: first every `strides[0]`-th value is tried, then the neighbours of the best one so far at a
      distance of each further stride.
    tolerance: of L-BFGS, `tol` of scikit-learn's `LogisticRegression`.
  """

  low: float
  high: float
  steps: int
  strides: tuple[int, ...]
  tolerance: float

  def choose(self, score: Callable[[float], float]) -> float:
    """Returns the C with the best score of those tried; of equal ones, the smallest."""
    values = np.logspace(self.low, self.high, self.steps).tolist()
    scores: dict[int, float] = {}
    tried: Sequence[int] = range(0, self.steps, self.strides[0])
    for stride in (*self.strides[1:], None):
      scores |= {i: score(values[i]) for i in tried if i not in scores}
      best = max(sorted(scores), key=lambda i: scores[i])
      if stride is not None:
        tried = [i for i in (best - stride, best + stride) if 0 <= i < self.steps]
    return values[best]

  def fit(
    self, features: np.ndarray, labels: np.ndarray, held_out: float, seed: int
  ) -> tuple[LogisticRegression, float]:
    """Chooses C by the accuracy on a part of these data, then fits to all of them.

    Args:
      features: [n, d], as they come; computations are in float64.
      labels: int [n].
      held_out: the share of the part.
      seed: of its random draw.

    Returns:
      The classifier, and C.

    Raises:
      UserError: if there are too few data.
    """
    x = features.astype(np.float64)
    order = np.random.default_rng(seed).permutation(len(x))
    count = int(held_out * len(x))
    part, rest = order[:count], order[count:]
    if not count or len(np.unique(labels[rest])) < 2:
      raise UserError(
        f"{len(x)} training images are too few to hold out a part: raise num_images or held_out"
      )
    fitted, known, part_of_x = x[rest], labels[rest], x[part]

    def score(c: float) -> float:
      predicted = self._fit(fitted, known, c).predict(part_of_x)
      return float(np.mean(predicted == labels[part]))

    chosen = self.choose(score)
    return self._fit(x, labels, chosen), chosen

  def _fit(self, x: np.ndarray, labels: np.ndarray, c: float) -> LogisticRegression:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", ConvergenceWarning)  # both papers stop after 1,000 iterations
      return LogisticRegression(C=c, max_iter=1000, tol=self.tolerance).fit(x, labels)


# Radford et al. 2021, appendix A.3, a search that halves its range four times; Oquab et al. 2023, whose code
# tries all values.
SWEEPS = {
  "clip": Sweep(-6.0, 6.0, 97, strides=(16, 8, 4, 2, 1), tolerance=1e-4),
  "dinov2": Sweep(-6.0, 5.0, 45, strides=(1,), tolerance=1e-12),
}
