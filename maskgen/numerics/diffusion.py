"""Gaussian diffusion: noise schedules, prediction types, guidance and samplers, as pure functions.

x_t = alpha_t x_0 + sigma_t e, with alpha_t^2 + sigma_t^2 = 1 and e standard normal (Ho et al. 2020, eq. 4;
Kingma et al. 2021). Timesteps t are 0 .. T - 1, from little to much noise. Letters: b batch.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from maskgen.config import check_at_least, fields
from maskgen.errors import UserError, nearest


def cosine(t: np.ndarray) -> np.ndarray:
  """The f(t) of a cosine schedule for t in [0, 1], float64 (Nichol and Dhariwal 2021, eq. 17).

  f(t) / f(0) is alpha_t^2.
  """
  return np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


# The variance that each timestep adds: (T, first, last) -> float64 [T].
BETAS: dict[str, Callable[[int, float, float], np.ndarray]] = {
  "linear": lambda steps, first, last: np.linspace(first, last, steps),
  "scaled_linear": lambda steps, first, last: np.linspace(first**0.5, last**0.5, steps) ** 2,
  # It ignores first and last.
  "cosine": lambda steps, first, last: np.minimum(
    1 - cosine(np.arange(1, steps + 1) / steps) / cosine(np.arange(steps) / steps), 0.999
  ),
}
# What a network predicts: noise e, v = alpha_t e - sigma_t x_0 (Salimans and Ho 2022, appendix D), or x_0.
PREDICTIONS = ("noise", "v", "clean")
SPACINGS = ("leading", "linspace", "trailing")
# The default spacing of each sampler.
SAMPLERS = {"ddim": "leading", "dpm": "linspace"}


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The noise schedule of a network; the defaults are those of Stable Diffusion 1.

  Attributes:
    steps: T.
    betas: a name in `BETAS`.
    beta_first, beta_last: the variances that the first and the last timestep add.
    prediction: one of `PREDICTIONS`.
    spacing: which of the T timesteps sampling visits, one of `SPACINGS` (Lin et al. 2024, table 2), or "" for
      the sampler's default.
    offset: added to the timesteps that "leading" visits.
    clean_end: whether DDIM ends without noise rather than with that of timestep 0.
  """

  steps: int = 1000
  betas: str = "scaled_linear"
  beta_first: float = 0.00085
  beta_last: float = 0.012
  prediction: str = "noise"
  spacing: str = ""
  offset: int = 1
  clean_end: bool = False

  def __post_init__(self):
    check_at_least(self, 1, "steps")
    check_at_least(self, 0, "beta_first", "beta_last", "offset")
    for kind, name, choices in (
      ("schedule of betas", self.betas, BETAS),
      ("prediction", self.prediction, PREDICTIONS),
      ("spacing", self.spacing or SPACINGS[0], SPACINGS),
    ):
      if name not in choices:
        raise UserError(f"the {kind} '{name}' does not exist{nearest(name, choices)}")

  @property
  def alphas_squared(self) -> np.ndarray:
    """alpha_t^2 of all timesteps, float64 [T]."""
    return np.cumprod(1 - BETAS[self.betas](self.steps, self.beta_first, self.beta_last))


@dataclasses.dataclass(frozen=True)
class DiffusionSampling:
  """How images are sampled.

  Attributes:
    steps: the number of sampling steps, each one call of the network.
    sampler: one of `SAMPLERS`; "dpm" needs fewer steps.
    guidance: the scale: 0 ignores the prompt, 1 is the model as trained, larger values strengthen the prompt
      and reduce variety.
  """

  steps: int = fields.static(25)
  sampler: str = fields.static("dpm")
  guidance: float = fields.static(7.5, at=(0.0, 1.0))

  def __post_init__(self):
    check_at_least(self, 1, "steps")
    check_at_least(self, 0, "guidance")
    if self.sampler not in SAMPLERS:
      raise UserError(f"sampler '{self.sampler}' does not exist{nearest(self.sampler, SAMPLERS)}")


def signal_and_noise(schedule: Schedule, t: jax.Array) -> tuple[jax.Array, jax.Array]:
  """alpha_t and sigma_t, float32, for timesteps t int32 [...]."""
  squared = schedule.alphas_squared
  alphas, sigmas = jnp.asarray(np.sqrt(squared), jnp.float32), jnp.asarray(np.sqrt(1 - squared), jnp.float32)
  return alphas[t], sigmas[t]


def add_noise(schedule: Schedule, clean: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
  """x_t, float32 [b, ...], for data and noise of that shape at timesteps t int32 [b]."""
  alpha, sigma = (_like(value, clean) for value in signal_and_noise(schedule, t))
  return alpha * clean + sigma * noise


def target(schedule: Schedule, clean: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
  """What the network should predict, float32 [b, ...]; arguments as for `add_noise`."""
  if schedule.prediction == "noise":
    return noise
  if schedule.prediction == "clean":
    return clean
  alpha, sigma = (_like(value, clean) for value in signal_and_noise(schedule, t))
  return alpha * noise - sigma * clean


def to_clean(
  schedule: Schedule, predicted: jax.Array, noisy: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> jax.Array:
  """The x_0 that a prediction at x_t implies; alpha and sigma broadcast against x_t."""
  if schedule.prediction == "noise":
    return (noisy - sigma * predicted) / alpha
  if schedule.prediction == "clean":
    return predicted
  return alpha * noisy - sigma * predicted


def guide_in_turn(predictions: Sequence[jax.Array], scales: Sequence[float | jax.Array]) -> jax.Array:
  """Guidance by a sequence of conditions, each more specific than the last: p_0 + sum s_i (p_i - p_(i-1)).

  With two predictions it is classifier-free guidance (Ho and Salimans 2022, eq. 6, with w = s_1 - 1). If all
  scales are 1, it returns the last prediction; a scale of 0 ignores what its condition adds.
  """
  guided = predictions[0]
  for less, more, scale in zip(predictions[:-1], predictions[1:], scales, strict=True):
    guided = guided + scale * (more - less)
  return guided


def needed(scales: Sequence[float | jax.Array]) -> list[int]:
  """Which predictions `guide_in_turn` needs: not those whose weight is 0, as far as scales are numbers.

  The weight of p_i is s_i - s_(i+1), where p_0 has a scale of 1 and none follows the last one. Guidance by
  what is left, with the scales of all but its first prediction, is the same.
  """
  pairs = itertools.pairwise([1.0, *scales, 0.0])
  return [
    i
    for i, (own, following) in enumerate(pairs)
    if isinstance(own, jax.Array) or isinstance(following, jax.Array) or own != following
  ]


def visited(schedule: Schedule, sampler: str, steps: int) -> np.ndarray:
  """The timesteps that a sampler visits, int32 [steps], from much noise to little.

  The grids are those in common use: DPM-Solver's has one more point, the last of which is not visited.

  Raises:
    UserError: for an unknown sampler, or more steps than timesteps.
  """
  if sampler not in SAMPLERS:
    raise UserError(f"sampler '{sampler}' does not exist{nearest(sampler, SAMPLERS)}")
  spacing = schedule.spacing or SAMPLERS[sampler]
  points = steps + (sampler == "dpm" and spacing != "trailing")
  offset = schedule.offset if spacing == "leading" else 0
  if not isinstance(steps, int) or not 1 <= steps <= schedule.steps - offset or points > schedule.steps:
    raise UserError(f"{steps!r} steps of sampling: give a whole number from 1 to {schedule.steps - 1}")
  grid: np.ndarray
  if spacing == "leading":
    grid = np.arange(points)[::-1] * (schedule.steps // points) + offset
  elif spacing == "linspace":
    grid = np.linspace(0, schedule.steps - 1, points).round()[::-1]
  else:
    grid = (schedule.steps - np.arange(points) * schedule.steps / points).round() - 1
  return grid[:steps].astype(np.int32)


def sample(
  predict: Callable[[jax.Array, jax.Array], jax.Array],
  noise: jax.Array,
  schedule: Schedule,
  *,
  sampler: str = "dpm",
  steps: int = 25,
) -> jax.Array:
  """Follows the probability flow from noise to data.

  Both samplers are DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2); "ddim" (Song et al. 2021, eq. 12 with
  eta = 0) is its first-order case: one step goes from x_s to

    x_t = sigma_t / sigma_s x_s + (alpha_t - alpha_s sigma_t / sigma_s) D,

  where D is the predicted x_0. The second order extrapolates D by its last change, divided by twice the ratio
  of the last step's length in log(alpha / sigma) to this one's. The first and the last step are first-order.

  Args:
    predict: (x_t float32 [b, ...], t int32 scalar) -> a prediction of that shape, see `Schedule.prediction`.
    noise: float32 [b, ...], standard normal.
    schedule: of the network.
    sampler: one of `SAMPLERS`; "dpm" needs fewer steps.
    steps: the number of sampling steps, each one call of the network.

  Returns:
    x_0, float32 [b, ...].
  """
  times = visited(schedule, sampler, steps)
  squared = schedule.alphas_squared
  end = squared[0] if sampler == "ddim" and not schedule.clean_end else 1.0
  levels = np.append(squared[times], end)
  alphas, sigmas = np.sqrt(levels), np.sqrt(1 - levels)
  extrapolate = np.zeros(steps)  # how far D is extrapolated
  if sampler == "dpm":
    lengths = np.diff(np.log(alphas[:-1] / sigmas[:-1]))
    extrapolate[1:-1] = lengths[1:] / (2 * lengths[:-1])
  keep = sigmas[1:] / sigmas[:-1]
  move = alphas[1:] - alphas[:-1] * keep
  table = np.stack([alphas[:-1], sigmas[:-1], keep, move, extrapolate], axis=1)

  def one_step(carry: tuple[jax.Array, jax.Array], row: tuple[jax.Array, tuple[jax.Array, ...]]):
    x, before = carry
    t, (alpha, sigma, keep, move, extrapolate) = row
    clean = to_clean(schedule, predict(x, t).astype(jnp.float32), x, alpha, sigma)
    return (keep * x + move * (clean + extrapolate * (clean - before)), clean), None

  rows = jnp.asarray(times), tuple(jnp.asarray(column, jnp.float32) for column in table.T)
  noise = noise.astype(jnp.float32)
  (clean, _), _ = jax.lax.scan(one_step, (noise, jnp.zeros_like(noise)), rows)
  return clean


def _like(values: jax.Array, x: jax.Array) -> jax.Array:
  """Values [b] as [b, 1, ...], to broadcast against x."""
  return values.reshape(-1, *(1,) * (x.ndim - 1))
