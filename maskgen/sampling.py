"""Iterative parallel decoding (MaskGIT, Chang et al. 2022, section 3.2), for any model of tokens.

Letters: b batch, n tokens, K codebook size.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from maskgen import config as config_lib
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
      most confident tokens first. Quality and variety depend on it strongly.
    guidance: s, how much the condition counts, for models that have one: 0 not at all, 1 as trained, above 1
      the condition shows more and variety less.
    guidance_schedule: a name in `GUIDANCE_SCHEDULES`.
  """

  steps: int = 20
  schedule: str = "cosine"
  temperature: float = 6.0
  guidance: float = 1.0
  guidance_schedule: str = "constant"

  def __post_init__(self):
    remaining_table(self.schedule, self.steps, 0)
    config_lib.check_at_least(self, 0, "temperature", "guidance")
    if self.guidance_schedule not in GUIDANCE_SCHEDULES:
      raise UserError(
        f"guidance_schedule '{self.guidance_schedule}' does not exist"
        f"{nearest(self.guidance_schedule, GUIDANCE_SCHEDULES)}"
      )


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
  """Tabulates floor(u * schedule(t)) for t = (step + 1) / steps and u = 0 .. n unknown tokens.

  Tabulating in float64 makes the counts independent of the device's rounding.

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
  # The billionth: (1 - 10 / 12) * 12 is 2, not 1.999....
  table = np.floor(np.outer(shares, np.arange(num_tokens + 1)) + 1e-9).astype(np.int32)
  table[-1] = 0
  return table


def num_remaining(scheduled: jax.Array, unknown: jax.Array, last: jax.Array) -> jax.Array:
  """How many tokens stay masked after a step: at least 1 and at most unknown - 1 before the last step."""
  bounded = jnp.clip(scheduled, 1, jnp.maximum(unknown - 1, 1))
  return jnp.where(last, 0, jnp.minimum(bounded, unknown))


def decode(
  logits_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
  keys: jax.Array,
  tokens: jax.Array,
  unknown: jax.Array,
  *,
  steps: int,
  schedule: str,
  temperature: float | jax.Array,
) -> jax.Array:
  """Fills in unknown tokens, the most confident first.

  Each step samples every unknown token, adds Gumbel noise annealed by (1 - t) to the log-probability of
  the sample, and masks the least confident ones again, as many as the schedule says for that example's
  number of initially unknown tokens.

  Args:
    logits_fn: (tokens int32 [b, n], unknown bool [b, n], t float32 scalar) -> logits [b, n, K]; it must hide
      the unknown tokens. t is the share of the steps that are done, 0 at the first.
    keys: PRNG keys [b]; example i depends on key i alone.
    tokens: int32 [b, n]; what stands at unknown positions does not matter.
    unknown: bool [b, n]; any number per example, also none.
    steps: see `Sampling`.
    schedule: see `Sampling`.
    temperature: see `Sampling`.

  Returns:
    int32 [b, n]; known tokens are unchanged.
  """
  table = jnp.asarray(remaining_table(schedule, steps, tokens.shape[-1]))
  initially_unknown = unknown.sum(axis=-1)  # [b]

  def one_step(carry: tuple[jax.Array, jax.Array], step: jax.Array):
    tokens, unknown = carry
    step_keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, step)))(keys)  # [b, 2]
    log_p = jax.nn.log_softmax(logits_fn(tokens, unknown, step / steps).astype(jnp.float32))  # [b, n, K]
    sampled = jax.vmap(jax.random.categorical)(step_keys[:, 0], log_p).astype(jnp.int32)
    tokens = jnp.where(unknown, sampled, tokens)
    gumbel = jax.vmap(lambda key: jax.random.gumbel(key, tokens.shape[1:]))(step_keys[:, 1])
    confidence = jnp.take_along_axis(log_p, sampled[..., None], axis=-1)[..., 0]
    confidence += temperature * (1.0 - (step + 1) / steps) * gumbel
    confidence = jnp.where(unknown, confidence, jnp.inf)
    remaining = num_remaining(table[step][initially_unknown], unknown.sum(axis=-1), step + 1 == steps)
    rank = jnp.argsort(jnp.argsort(confidence, axis=-1), axis=-1)
    return (tokens, rank < remaining[:, None]), None

  (tokens, _), _ = jax.lax.scan(one_step, (tokens, unknown), jnp.arange(steps))
  return tokens
