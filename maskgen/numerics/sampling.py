"""Iterative parallel decoding (MaskGIT, Chang et al. 2022, section 3.2), for any model of tokens.

Letters: b batch, n tokens, K codebook size, q tokens of a partial evaluation.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from maskgen import config as config_lib
from maskgen.config import fields
from maskgen.errors import UserError, nearest

# The share of the initially unknown tokens that is still masked when the share t of the steps is done:
# 1 at t = 0, 0 at t = 1.
SCHEDULES: dict[str, Callable[[float], float]] = {
  "cosine": lambda t: math.cos(math.pi / 2 * t),
  "linear": lambda t: 1 - t,
  "square": lambda t: 1 - t**2,
  "cubic": lambda t: 1 - t**3,
  "arccos": lambda t: math.acos(t) / (math.pi / 2),
}
ORDERS = ("confidence", "halton", "random")

# (tokens int32 [b, n], unknown bool [b, n], t float32 scalar) -> logits [b, n, K].
LogitsFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# The same, and a function (tokens, unknown, where int32 [b, q], t) -> logits [b, q, K] at positions `where`.
ReusingFn = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Callable[..., jax.Array]]]

# How much of the guidance is in force when the share t of the steps is done. The first tokens decide on the
# composition, where strong guidance costs the most variety.
GUIDANCE_SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
  "constant": jnp.ones_like,
  "linear": lambda t: t,
  "cosine": lambda t: (1 - jnp.cos(jnp.pi * t)) / 2,
}


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are filled in: the arguments of `decode`, and of `guide`.

  Attributes:
    steps: number of steps.
    schedule: a name in `SCHEDULES`.
    temperature: scale of the Gumbel noise on the confidence, annealed to 0 at the last step; 0 unmasks the
      most confident tokens first. Quality and variety depend on it strongly. Other orders do without.
    order: which tokens are unmasked first: "confidence", those of whose samples the model is most certain;
      "halton", those of a fixed sequence that spreads evenly over the image, see `halton`; "random".
    softmax_temperature: divides the logits that tokens are drawn from; below 1 likely codes get likelier.
    reuse: every so many steps the model is evaluated in full; the steps between evaluate the tokens at stake
      alone and reuse the features of the others. 1 evaluates all in full; it must divide `steps`.
    guidance: s, how much the condition counts, for models that have one: 0 not at all, 1 as trained, above 1
      the condition shows more and variety less.
    guidance_schedule: a name in `GUIDANCE_SCHEDULES`.
  """

  steps: int = fields.static(20)
  schedule: str = fields.static("cosine")
  temperature: float = 6.0
  order: str = fields.static("confidence")
  softmax_temperature: float = 1.0
  reuse: int = fields.static(1)
  guidance: float = 1.0
  guidance_schedule: str = fields.static("constant")

  def __post_init__(self):
    remaining_table(self.schedule, self.steps, 0)
    config_lib.check_at_least(self, 0, "temperature", "softmax_temperature", "guidance")
    if not self.softmax_temperature:
      raise UserError("softmax_temperature is 0: it must be greater, and 0.1 is nearly greedy")
    for name, known in (("order", ORDERS), ("guidance_schedule", GUIDANCE_SCHEDULES)):
      if getattr(self, name) not in known:
        raise UserError(f"{name} '{getattr(self, name)}' does not exist{nearest(getattr(self, name), known)}")
    if not isinstance(self.reuse, int) or self.reuse < 1 or self.steps % self.reuse:
      raise UserError(f"reuse is {self.reuse!r}: it must divide the number of steps, {self.steps}")


def guide(
  conditional: jax.Array,
  unconditional: jax.Array,
  t: jax.Array,
  *,
  guidance: float | jax.Array,
  guidance_schedule: str,
) -> jax.Array:
  """Classifier-free guidance (Ho and Salimans 2022): logits that tell the condition from none at all.

  The scale grows from 1 to s as the schedule f says, s_t = 1 + (s - 1) f(t), and the logits are
  u + s_t (c - u).

  Args:
    conditional: c, logits of any shape.
    unconditional: u, logits of the same shape.
    t: float32 scalar, the share of the steps that are done.
    guidance: s, see `Sampling`.
    guidance_schedule: see `Sampling`.
  """
  excess = (guidance - 1.0) * GUIDANCE_SCHEDULES[guidance_schedule](t)
  return conditional + excess * (conditional - unconditional)


def remaining_table(schedule: str, steps: int, num_tokens: int) -> np.ndarray:
  """Tabulates how many of u = 0 .. n initially unknown tokens are masked after each step.

  These are floor(u * schedule(t)) for t = (step + 1) / steps, but each step before the last unmasks at least
  one token and leaves one. Tabulating in float64 makes the counts independent of the device's rounding.

  Returns:
    int32 [steps, n + 1]; the last row is 0.

  Raises:
    UserError: for an unknown schedule, or steps that are not a whole number of at least 1.
  """
  if schedule not in SCHEDULES:
    raise UserError(f"schedule '{schedule}' does not exist{nearest(schedule, SCHEDULES)}")
  if not isinstance(steps, int) or steps < 1:
    raise UserError(f"sampling needs a whole number of steps, at least 1 (got {steps!r})")
  shares = [SCHEDULES[schedule]((step + 1) / steps) for step in range(steps)]
  masked = np.arange(num_tokens + 1)
  # The billionth: (1 - 10 / 12) * 12 is 2, not 1.999....
  table = np.floor(np.outer(shares, masked) + 1e-9).astype(np.int32)
  for row in table[:-1]:
    row[:] = masked = np.minimum(np.clip(row, 1, np.maximum(masked - 1, 1)), masked)
  table[-1] = 0
  return table


def halton(grid: tuple[int, int]) -> np.ndarray:
  """The order in which the 2-D Halton sequence of bases 2 and 3 first meets the cells of a grid.

  Besnier et al. 2025, section 4: tokens that are unmasked together are far apart, so they tell each other
  little, and after any number of steps the known ones cover the image evenly.

  Args:
    grid: (h', w').

  Returns:
    int64 [h' * w'], each cell's number row by row, once.
  """
  from scipy.stats import qmc  # a second to import, for this order alone

  count = grid[0] * grid[1]
  sequence = qmc.Halton(2, scramble=False).fast_forward(1)  # point 0 is the corner, point 1 is central
  cells = np.zeros(0, np.int64)
  while len(np.unique(cells)) < count:
    # The billionth: 3 * (1 / 3) is 1, also where 1 / 3 is a rounded sum of digits.
    rows, columns = np.floor(sequence.random(count) * grid + 1e-9).astype(np.int64).T
    cells = np.append(cells, rows * grid[1] + columns)
  _, first = np.unique(cells, return_index=True)
  return cells[np.sort(first)]


def decode(
  logits_fn: LogitsFn,
  keys: jax.Array,
  tokens: jax.Array,
  unknown: jax.Array,
  grid: tuple[int, int],
  reusing_fn: ReusingFn | None = None,
  *,
  steps: int,
  schedule: str,
  temperature: float | jax.Array,
  order: str = "confidence",
  softmax_temperature: float | jax.Array = 1.0,
  reuse: int = 1,
) -> jax.Array:
  """Fills in unknown tokens, by default the most confident first.

  Each step samples every unknown token, adds Gumbel noise annealed by (1 - t) to the log-probability of
  the sample, and masks the least confident ones again, as many as the schedule says for that example's
  number of initially unknown tokens. Other orders do without noise and confidence.

  With `reuse` the tokens that a full evaluation and the partial ones after it unmask are chosen by the full
  one (ReCAP, Liu et al. 2025, section 4); partial evaluations sample them anew, each given those before.

  Args:
    logits_fn: (tokens int32 [b, n], unknown bool [b, n], t float32 scalar) -> logits [b, n, K]; it must hide
      the unknown tokens. t is the share of the steps that are done, 0 at the first.
    keys: PRNG keys [b]; example i depends on key i alone.
    tokens: int32 [b, n]; what stands at unknown positions does not matter.
    unknown: bool [b, n]; any number per example, also none.
    grid: (h', w'), how the n tokens lie, row by row.
    reusing_fn: as `logits_fn`, for `reuse` of more than 1; it returns the logits and a function (tokens,
      unknown, where int32 [b, q], t) -> logits [b, q, K] at the positions `where`, no two of them the same,
      which may take all else from the full evaluation.
    steps: see `Sampling`.
    schedule: see `Sampling`.
    temperature: see `Sampling`.
    order: see `Sampling`.
    softmax_temperature: see `Sampling`.
    reuse: see `Sampling`.

  Returns:
    int32 [b, n]; known tokens are unchanged.

  Raises:
    UserError: if an option is wrong, or features are to be reused and there is no `reusing_fn`.
  """
  return trajectory(
    logits_fn,
    keys,
    tokens,
    unknown,
    grid,
    reusing_fn,
    steps=steps,
    schedule=schedule,
    temperature=temperature,
    order=order,
    softmax_temperature=softmax_temperature,
    reuse=reuse,
  )[0][-1]


def trajectory(
  logits_fn: LogitsFn,
  keys: jax.Array,
  tokens: jax.Array,
  unknown: jax.Array,
  grid: tuple[int, int],
  reusing_fn: ReusingFn | None = None,
  *,
  steps: int,
  schedule: str,
  temperature: float | jax.Array,
  order: str = "confidence",
  softmax_temperature: float | jax.Array = 1.0,
  reuse: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """All that `decode`, with the same arguments, goes through.

  Returns:
    Tokens int32 [steps, b, n] after each step, unknown ones as they were drawn last; and which are unknown,
    bool [steps, b, n].
  """
  counts = remaining_table(schedule, steps, tokens.shape[-1])
  most = most_unmasked(counts, reuse)
  if reuse > 1 and reusing_fn is None:
    raise UserError(f"reuse is {reuse}, and this model cannot reuse features: set it to 1")
  initially_unknown = unknown.sum(axis=-1)  # [b]
  table = jnp.asarray(counts)
  priority = _priority(order, grid, keys, steps)

  def remaining(step: jax.Array) -> jax.Array:  # [b, 1]
    return table[step][initially_unknown][:, None]

  def draw(logits: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes [b, m] and log-probabilities [b, m, K] of logits [b, m, K], and keys [b] for more."""
    step_keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, step)))(keys)  # [b, 2]
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32) / softmax_temperature)
    sampled = jax.vmap(jax.random.categorical)(step_keys[:, 0], log_p).astype(jnp.int32)
    return sampled, log_p, step_keys[:, 1]

  def full(tokens: jax.Array, unknown: jax.Array, logits: jax.Array, step: jax.Array):
    """Tokens, unknown, positions from the last to be unmasked to the first, and the rank of each position."""
    sampled, log_p, noise_keys = draw(logits, step)
    tokens = jnp.where(unknown, sampled, tokens)
    score = priority
    if score is None:
      gumbel = jax.vmap(lambda key: jax.random.gumbel(key, tokens.shape[1:]))(noise_keys)
      score = jnp.take_along_axis(log_p, sampled[..., None], axis=-1)[..., 0]
      score += temperature * (1.0 - (step + 1) / steps) * gumbel
    positions = jnp.argsort(jnp.where(unknown, score, jnp.inf), axis=-1)
    rank = jnp.argsort(positions, axis=-1)
    return tokens, rank < remaining(step), positions, rank

  def one_step(carry: tuple[jax.Array, jax.Array], step: jax.Array):
    after = full(*carry, logits_fn(*carry, step / steps), step)[:2]
    return after, after

  def steps_with_reuse(carry: tuple[jax.Array, jax.Array], first: jax.Array):
    assert reusing_fn is not None
    logits, again = reusing_fn(*carry, first / steps)
    *after, positions, rank = full(*carry, logits, first)
    # All that is unmasked before the next full step, and to fill up what is known, or unmasked later.
    start = jnp.minimum(remaining(first + reuse - 1), tokens.shape[-1] - most)
    where = jnp.take_along_axis(positions, start + jnp.arange(most)[None], axis=-1)
    place = jnp.clip(rank - start, 0, most - 1)  # of each token in `where`, if it is there

    def partial_step(carry: tuple[jax.Array, jax.Array], step: jax.Array):
      before, unknown = carry
      sampled, _, _ = draw(again(before, unknown, where, step / steps), step)
      still = rank < remaining(step)
      chosen = jnp.take_along_axis(sampled, place, axis=-1)
      after = jnp.where(unknown & ~still, chosen, before), still
      return after, after

    last, rest = jax.lax.scan(partial_step, tuple(after), first + jnp.arange(1, reuse))
    return last, jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), tuple(after), rest)

  if reuse == 1:
    return jax.lax.scan(one_step, (tokens, unknown), jnp.arange(steps))[1]
  groups = jax.lax.scan(steps_with_reuse, (tokens, unknown), jnp.arange(0, steps, reuse))[1]
  return jax.tree.map(lambda array: array.reshape(steps, *tokens.shape), groups)


def most_unmasked(remaining: np.ndarray, reuse: int) -> int:
  """The most tokens that `reuse` steps from a full one on can unmask, of a table int32 [steps, n + 1].

  Raises:
    UserError: if `reuse` does not divide the number of steps.
  """
  if reuse < 1 or len(remaining) % reuse:
    raise UserError(f"reuse is {reuse}: it must divide the number of steps, {len(remaining)}")
  before = np.concatenate([np.arange(remaining.shape[1])[None], remaining])[::reuse]
  return int(-np.diff(before, axis=0).min())


def _priority(order: str, grid: tuple[int, int], keys: jax.Array, steps: int) -> jax.Array | None:
  """For each token [b, n] the greater number the sooner it is unmasked, or None: by confidence."""
  if order == "confidence":
    return None
  count = grid[0] * grid[1]
  if order == "halton":
    return jnp.tile(-jnp.argsort(jnp.asarray(halton(grid)))[None], (len(keys), 1)).astype(jnp.float32)
  if order == "random":
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, steps), (count,)))(keys)
  raise UserError(f"order '{order}' does not exist{nearest(order, ORDERS)}")
