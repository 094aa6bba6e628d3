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

# The fraction of the initially unknown tokens that is still masked after the fraction t of the steps:
# 1 at t = 0, 0 at t = 1.
SCHEDULES: dict[str, Callable[[float], float]] = {
  "cosine": lambda t: math.cos(math.pi / 2 * t),
  "linear": lambda t: 1 - t,
  "square": lambda t: 1 - t**2,
  "cubic": lambda t: 1 - t**3,
  "arccos": lambda t: math.acos(t) / (math.pi / 2),
}
ORDERS = ("confidence", "halton", "halton_rolled", "random")

# (tokens int32 [b, n], unknown bool [b, n], t float32 scalar) -> logits [b, n, K].
LogitsFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# The same, and a function (tokens, unknown, where int32 [b, q], t) -> logits [b, q, K] at positions `where`.
ReusingFn = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Callable[..., jax.Array]]]

# The fraction of the guidance that applies after the fraction t of the steps. The first tokens decide the
# composition, where strong guidance reduces variety the most.
GUIDANCE_SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
  "constant": jnp.ones_like,
  "linear": lambda t: t,
  "cosine": lambda t: (1 - jnp.cos(jnp.pi * t)) / 2,
}


@dataclasses.dataclass(frozen=True)
class MaskedSampling:
  """How tokens are filled in: the arguments of `decode`, and of `guide`.

  Attributes:
    steps: number of steps.
    schedule: a name in `SCHEDULES`.
    temperature: scale of the Gumbel noise on the confidence, annealed to 0 at the last step; 0 unmasks the
      most confident tokens first. Quality and variety depend on it strongly. Other orders ignore it.
    order: which tokens are unmasked first: "confidence", those with the most probable samples; "halton", a
      fixed sequence that covers the image evenly, see `halton`; "halton_rolled", the same sequence from a
      random place on, another for each image; or "random".
    softmax_temperature: divides the logits that tokens are sampled from; values below 1 favour likely codes.
    softmax_ramp: multiplies the logits, too, by a factor that grows linearly from 1 at the first step to this
      at the last; 1 is no ramp.
    top_k: samples only from the k most probable codes of each token; 0 means all codes, 1 is greedy.
    top_p: samples only from the fewest codes whose probabilities sum to at least this; 1 means all codes.
    reuse: a full evaluation every `reuse` steps; the steps in between evaluate only the tokens to be unmasked
      and reuse the features of the others. 1 makes every evaluation a full one; it must divide `steps`.
    guidance: the scale s, for models with a condition: 0 ignores the condition, 1 is the model as trained,
      larger values strengthen the condition and reduce variety.
    guidance_schedule: a name in `GUIDANCE_SCHEDULES`.
  """

  steps: int = fields.static(20)
  schedule: str = fields.static("cosine")
  temperature: float = 6.0
  order: str = fields.static("confidence")
  softmax_temperature: float = 1.0
  softmax_ramp: float = 1.0
  top_k: int = fields.static(0)
  top_p: float = fields.static(1.0)
  reuse: int = fields.static(1)
  guidance: float = fields.static(1.0, at=(0.0, 1.0))
  guidance_schedule: str = fields.static("constant")

  def __post_init__(self):
    remaining_table(self.schedule, self.steps, 0)
    config_lib.check_at_least(
      self, 0, "temperature", "softmax_temperature", "softmax_ramp", "top_k", "top_p", "guidance"
    )
    if not self.softmax_temperature:
      raise UserError("softmax_temperature is 0: it must be greater, and top_k=1 is greedy")
    if not isinstance(self.top_k, int):
      raise UserError(f"top_k is {self.top_k!r}: give a whole number, or 0 for all codes")
    if not 0 < self.top_p <= 1:
      raise UserError(f"top_p is {self.top_p}: give a probability above 0, or 1 for all codes")
    for name, known in (("order", ORDERS), ("guidance_schedule", GUIDANCE_SCHEDULES)):
      if getattr(self, name) not in known:
        raise UserError(f"{name} '{getattr(self, name)}' does not exist{nearest(getattr(self, name), known)}")
    if not isinstance(self.reuse, int) or self.reuse < 1 or self.steps % self.reuse:
      raise UserError(f"reuse is {self.reuse!r}: it must divide the number of steps, {self.steps}")

  @property
  def ignored(self) -> tuple[str, ...]:
    """Options that have no effect beside the others."""
    without_noise = ("temperature",) if self.order != "confidence" else ()
    unguided = ("guidance_schedule",) if self.guidance == 1 else ()
    return without_noise + unguided


def guide(
  conditional: jax.Array,
  unconditional: jax.Array,
  t: jax.Array,
  *,
  guidance: float | jax.Array,
  guidance_schedule: str,
) -> jax.Array:
  """Classifier-free guidance (Ho and Salimans 2022).

  The scale grows from 1 to s by the schedule f, s_t = 1 + (s - 1) f(t), and the logits are u + s_t (c - u).

  Args:
    conditional: c, logits of any shape.
    unconditional: u, logits of the same shape.
    t: float32 scalar, the fraction of completed steps.
    guidance: s, see `MaskedSampling`.
    guidance_schedule: see `MaskedSampling`.
  """
  excess = (guidance - 1.0) * GUIDANCE_SCHEDULES[guidance_schedule](t)
  return conditional + excess * (conditional - unconditional)


def needed(guidance: float | jax.Array, guidance_schedule: str) -> tuple[bool, bool]:
  """Whether `guide` needs the conditional and the unconditional logits: one of them if its scale says so."""
  if isinstance(guidance, jax.Array):
    return True, True
  return guidance != 0 or guidance_schedule != "constant", guidance != 1


def remaining_table(schedule: str, steps: int, num_tokens: int) -> np.ndarray:
  """Tabulates how many of u = 0 .. n initially unknown tokens are still masked after each step.

  The counts are floor(u * schedule(t)) for t = (step + 1) / steps, except that each step before the last
  unmasks at least one token and leaves at least one. They are computed in float64, independently of the
  device's rounding.

  Returns:
    int32 [steps, n + 1]; the last row is 0.

  Raises:
    UserError: for an unknown schedule, or if steps is not an integer of at least 1.
  """
  if schedule not in SCHEDULES:
    raise UserError(f"schedule '{schedule}' does not exist{nearest(schedule, SCHEDULES)}")
  if not isinstance(steps, int) or steps < 1:
    raise UserError(f"sampling needs a whole number of steps, at least 1 (got {steps!r})")
  shares = [SCHEDULES[schedule]((step + 1) / steps) for step in range(steps)]
  masked = np.arange(num_tokens + 1)
  # 1e-9, since (1 - 10 / 12) * 12 should be 2, not 1.999....
  table = np.floor(np.outer(shares, masked) + 1e-9).astype(np.int32)
  for row in table[:-1]:
    row[:] = masked = np.minimum(np.clip(row, 1, np.maximum(masked - 1, 1)), masked)
  table[-1] = 0
  return table


def halton(grid: tuple[int, int]) -> np.ndarray:
  """The order in which the 2-D Halton sequence of bases 2 and 3 first visits the cells of a grid.

  Besnier et al. 2025, section 4: tokens that are unmasked together are far apart and nearly independent, and
  after any number of steps the known tokens cover the image evenly.

  Args:
    grid: (h', w').

  Returns:
    int64 [h' * w'], each cell's row-major index once.
  """
  from scipy.stats import qmc  # takes a second to import, only needed here

  count = grid[0] * grid[1]
  sequence = qmc.Halton(2, scramble=False).fast_forward(1)  # point 0 is the corner, point 1 is central
  cells = np.zeros(0, np.int64)
  while len(np.unique(cells)) < count:
    # 1e-9, since 3 * (1 / 3) should be 1 also where 1 / 3 is a rounded sum of digits.
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
  softmax_ramp: float | jax.Array = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  reuse: int = 1,
) -> jax.Array:
  """Fills in unknown tokens, by default the most confident first.

  Each step samples every unknown token, adds Gumbel noise annealed by (1 - t) to the log-probability of the
  sample, and masks the least confident ones again; the schedule and the example's number of initially
  unknown tokens determine how many. Other orders use neither noise nor confidence. The confidence of a sample
  is its probability among all codes, also where `top_k` or `top_p` exclude some: of greedy samples, too, some
  are more certain than others.

  With `reuse`, a full evaluation selects all tokens that it and the partial evaluations after it unmask
  (ReCAP, Liu et al. 2025, section 4); each partial evaluation samples them again, given the earlier ones.

  Args:
    logits_fn: (tokens int32 [b, n], unknown bool [b, n], t float32 scalar) -> logits [b, n, K]; it must hide
      the unknown tokens. t is the fraction of completed steps, 0 at the first.
    keys: PRNG keys [b]; example i depends only on key i.
    tokens: int32 [b, n]; values at unknown positions do not matter.
    unknown: bool [b, n]; any number per example, including none.
    grid: (h', w'), the row-major layout of the n tokens.
    reusing_fn: like `logits_fn`, required if `reuse` exceeds 1; it returns the logits and a function (tokens,
      unknown, where int32 [b, q], t) -> logits [b, q, K] at the distinct positions `where`, which may reuse
      everything else from the full evaluation.
    steps: see `MaskedSampling`.
    schedule: see `MaskedSampling`.
    temperature: see `MaskedSampling`.
    order: see `MaskedSampling`.
    softmax_temperature: see `MaskedSampling`.
    softmax_ramp: see `MaskedSampling`.
    top_k: see `MaskedSampling`.
    top_p: see `MaskedSampling`.
    reuse: see `MaskedSampling`.

  Returns:
    int32 [b, n]; known tokens are unchanged.

  Raises:
    UserError: if an option is wrong, or `reuse` exceeds 1 without a `reusing_fn`.
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
    softmax_ramp=softmax_ramp,
    top_k=top_k,
    top_p=top_p,
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
  softmax_ramp: float | jax.Array = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  reuse: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """The intermediate states of `decode`, with the same arguments.

  Returns:
    Tokens int32 [steps, b, n] after each step, with the most recent sample of unknown ones; and which tokens
    are unknown, bool [steps, b, n].
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
    sharpness = 1.0 + (softmax_ramp - 1.0) * (step / max(steps - 1, 1))
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32) / softmax_temperature * sharpness)
    likely = keep_likely(log_p, top_k, top_p)
    sampled = jax.vmap(jax.random.categorical)(step_keys[:, 0], likely).astype(jnp.int32)
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
    # Everything unmasked before the next full step, padded with positions known or unmasked later.
    start = jnp.minimum(remaining(first + reuse - 1), tokens.shape[-1] - most)
    where = jnp.take_along_axis(positions, start + jnp.arange(most)[None], axis=-1)
    place = jnp.clip(rank - start, 0, most - 1)  # index of each token in `where`, if present

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


def keep_likely(log_p: jax.Array, top_k: int, top_p: float) -> jax.Array:
  """Sets the log-probabilities [..., K] of unlikely codes to -inf; equally probable codes share one fate.

  Args:
    log_p: log-probabilities.
    top_k: keeps the k most probable codes; 0 keeps all.
    top_p: of these, keeps each that, renormalised, has less than this probability before it; 1 keeps all
      (nucleus sampling, Holtzman et al. 2020, section 3.1).
  """
  if 0 < top_k < log_p.shape[-1]:
    least = jax.lax.top_k(log_p, top_k)[0][..., -1:]
    log_p = jnp.where(log_p >= least, log_p, -jnp.inf)
  if top_p < 1:
    falling = jnp.sort(log_p, axis=-1, descending=True)
    p = jax.nn.softmax(falling)
    before = jnp.cumsum(p, axis=-1) - p
    least = jnp.where(before < top_p, falling, jnp.inf).min(axis=-1, keepdims=True)
    log_p = jnp.where(log_p >= least, log_p, -jnp.inf)
  return log_p


def most_unmasked(remaining: np.ndarray, reuse: int) -> int:
  """The largest number of tokens that `reuse` steps, starting at a full one, can unmask.

  Args:
    remaining: the table int32 [steps, n + 1] of `remaining_table`.
    reuse: number of steps.

  Raises:
    UserError: if `reuse` does not divide the number of steps.
  """
  if reuse < 1 or len(remaining) % reuse:
    raise UserError(f"reuse is {reuse}: it must divide the number of steps, {len(remaining)}")
  before = np.concatenate([np.arange(remaining.shape[1])[None], remaining])[::reuse]
  return int(-np.diff(before, axis=0).min())


def _priority(order: str, grid: tuple[int, int], keys: jax.Array, steps: int) -> jax.Array | None:
  """A priority for each token [b, n], higher is unmasked sooner; None for the order by confidence."""
  if order == "confidence":
    return None
  count = grid[0] * grid[1]
  keys = jax.vmap(lambda key: jax.random.fold_in(key, steps))(keys)  # `draw` uses 0 to steps - 1
  if order == "random":
    return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)
  if order not in ("halton", "halton_rolled"):
    raise UserError(f"order '{order}' does not exist{nearest(order, ORDERS)}")
  place = jnp.tile(jnp.argsort(jnp.asarray(halton(grid)))[None], (len(keys), 1))
  if order == "halton_rolled":
    place = (place + jax.vmap(lambda key: jax.random.randint(key, (1,), 0, count))(keys)) % count
  return -place.astype(jnp.float32)
