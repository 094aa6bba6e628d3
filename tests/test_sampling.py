import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from maskgen import sampling
from maskgen.errors import UserError

NUM_TOKENS, CODES = 12, 7
# Which share of the unknown tokens is still masked when the share t, a fraction, of the steps is done.
SHARES = {
  "cosine": lambda t: np.cos(float(t) * np.pi / 2),
  "linear": lambda t: 1 - t,
  "square": lambda t: 1 - t * t,
  "cubic": lambda t: 1 - t * t * t,
  "arccos": lambda t: 2 * np.arccos(float(t)) / np.pi,
}


def hiding(tokens, unknown, t):
  """Logits that look at known tokens alone, as those of a model do: of all positions, and the own one."""
  visible = jnp.where(unknown, CODES, tokens)
  context = jax.nn.one_hot(visible, CODES + 1)
  table = jnp.sin(jnp.arange((CODES + 1) * CODES, dtype=jnp.float32).reshape(CODES + 1, CODES) * 1.7)
  position = jnp.cos(jnp.arange(NUM_TOKENS * CODES, dtype=jnp.float32).reshape(1, NUM_TOKENS, CODES))
  return 2.0 * position + (context @ table).mean(axis=1, keepdims=True) + context @ table


def problem(unknown_counts, seed: int = 0):
  """Keys, random tokens, and masks with the given numbers of unknown tokens at random positions."""
  rng = np.random.default_rng(seed)
  counts = np.asarray(unknown_counts)
  order = rng.permuted(np.tile(np.arange(NUM_TOKENS), (len(counts), 1)), axis=1)
  tokens = rng.integers(0, CODES, order.shape).astype(np.int32)
  return jax.random.split(jax.random.key(seed), len(counts)), tokens, order < counts[:, None]


SEEN: list[tuple[np.ndarray, np.ndarray]] = []


@functools.partial(jax.jit, static_argnames=("logits_fn", "steps", "schedule"))
def compiled(keys, tokens, unknown, temperature, *, logits_fn, steps, schedule):
  def watched(tokens, unknown, t):
    seen = (tokens, unknown, t)
    jax.debug.callback(lambda *seen: SEEN.append(tuple(map(np.asarray, seen))), *seen, ordered=True)
    return logits_fn(tokens, unknown, t)

  return sampling.decode(
    watched, keys, tokens, unknown, steps=steps, schedule=schedule, temperature=temperature
  )


def run(keys, tokens, unknown, logits_fn=hiding, *, steps=8, schedule="cosine", temperature=4.0):
  """Decodes under jit; returns the result and what the model saw: tokens and masks [steps, b, n]."""
  SEEN.clear()
  options = dict(logits_fn=logits_fn, steps=steps, schedule=schedule)
  result = np.asarray(compiled(keys, tokens, unknown, temperature, **options))
  jax.effects_barrier()
  seen_tokens, seen_masks, shares = (np.stack(arrays) for arrays in zip(*SEEN, strict=True))
  np.testing.assert_allclose(shares, np.arange(steps) / steps, rtol=1e-6)
  return result, seen_tokens, seen_masks


def oracle(schedule: str, steps: int, count: int) -> list[int]:
  """The number of masked tokens that each of the steps starts with."""
  masked = [count]
  for step in range(1, steps):
    share = SHARES[schedule](Fraction(step, steps)) * count
    scheduled = round(share) if abs(share - round(share)) < 1e-9 else int(share)
    masked.append(min(masked[-1], max(1, min(masked[-1] - 1, scheduled))))
  return masked


@pytest.mark.parametrize(
  "schedule,steps", [("cosine", 1), ("cosine", 15), ("linear", 12), *((name, 8) for name in sorted(SHARES))]
)
def test_each_step_unmasks_the_scheduled_number(schedule, steps):
  counts = [0, 1, 2, 3, 7, 11, 12]
  keys, tokens, unknown = problem(counts)
  _, _, masks = run(keys, tokens, unknown, steps=steps, schedule=schedule)
  assert len(masks) == steps
  np.testing.assert_array_equal(masks.sum(axis=-1).T, [oracle(schedule, steps, count) for count in counts])


def test_all_schedules_are_tested_and_fall_from_1_to_0():
  assert set(sampling.SCHEDULES) == set(SHARES)
  for schedule in sampling.SCHEDULES.values():
    shares = [schedule(t) for t in np.linspace(0, 1, 50)]
    assert shares[0] == pytest.approx(1) and shares[-1] == pytest.approx(0)
    assert (np.diff(shares) < 0).all()


@pytest.mark.parametrize("temperature", [0.0, 4.0])
def test_known_tokens_never_change_and_results_are_codes(temperature):
  keys, tokens, unknown = problem([0, 1, 5, 12])
  result, seen, masks = run(keys, tokens, unknown, temperature=temperature)
  assert result.dtype == np.int32
  assert result.min() >= 0 and result.max() < CODES
  np.testing.assert_array_equal(result[~unknown], tokens[~unknown])
  # What is known once stays known and keeps its value.
  for before, after in itertools.pairwise(masks):
    assert (before | ~after).all()
  for seen_tokens, mask in zip(seen, masks, strict=True):
    np.testing.assert_array_equal(seen_tokens[~mask], result[~mask])


def test_what_stands_at_unknown_positions_does_not_matter():
  keys, tokens, unknown = problem([0, 1, 5, 12])
  other = np.where(unknown, (tokens + 3) % CODES, tokens)
  np.testing.assert_array_equal(run(keys, tokens, unknown)[0], run(keys, other, unknown)[0])


def test_an_image_depends_on_its_key_alone():
  keys, tokens, unknown = problem([12, 5, 12, 9])
  together = run(keys, tokens, unknown)[0]
  for i in range(4):
    alone = run(keys[i : i + 1], tokens[i : i + 1], unknown[i : i + 1])[0]
    np.testing.assert_array_equal(alone[0], together[i])
  assert (run(keys[::-1], tokens, unknown)[0] != together).any()


BEST = np.arange(NUM_TOKENS) % CODES


def peaked(tokens, *_):
  return jnp.tile(50.0 * jax.nn.one_hot(BEST, CODES), (len(tokens), 1, 1))


def test_peaked_logits_give_the_argmax():
  keys, tokens, unknown = problem([12, 5, 0])
  result = run(keys, tokens, unknown, peaked, temperature=0.0)[0]
  np.testing.assert_array_equal(result, np.where(unknown, BEST, tokens))


PLACES = np.random.default_rng(0).permutation(NUM_TOKENS)


def sure_by_place(tokens, *_):
  """The position that stands k-th in PLACES, from 1, draws evenly from k codes: log p is -log k for sure."""
  possible = np.arange(NUM_TOKENS) <= np.argsort(PLACES)[:, None]
  return jnp.tile(np.where(possible, 0.0, -1e9).astype(np.float32), (len(tokens), 1, 1))


def one_by_one(temperature, examples=200):
  """Of each example the masks [b, steps, n] while all tokens are unmasked, one at each step."""
  keys, tokens, unknown = problem([NUM_TOKENS] * examples)
  options = dict(steps=NUM_TOKENS, schedule="linear", temperature=temperature)
  return run(keys, tokens, unknown, sure_by_place, **options)[2].swapaxes(0, 1)


def test_without_noise_the_most_confident_are_unmasked_first():
  order = np.argsort(one_by_one(temperature=0.0).sum(axis=1), axis=-1)  # by how long each stays masked
  np.testing.assert_array_equal(order, np.tile(PLACES, (len(order), 1)))


def test_noise_decides_where_it_drowns_the_confidence():
  first = (~one_by_one(temperature=1e6)[:, 1]).sum(axis=0)
  assert scipy.stats.chisquare(first).pvalue > 0.01


@pytest.mark.parametrize("step", [1, 6, 10])
def test_noise_anneals_with_the_share_of_steps_that_are_left(step):
  temperature = 1.0
  masks = one_by_one(temperature, examples=2000)
  before, after = masks[:, step - 1], masks[:, step]
  # Gumbel noise of scale s turns the choice of the most confident into a draw from p ** (1 / s) (Gumbel-max).
  scale = temperature * (1 - step / NUM_TOKENS)
  weights = before * (np.argsort(PLACES) + 1.0) ** (-1 / scale)
  expected = (weights / weights.sum(axis=-1, keepdims=True)).sum(axis=0)
  found = (before & ~after).sum(axis=0)
  common = expected > 5
  assert (
    scipy.stats.chisquare(
      [*found[common], found[~common].sum() + 1], [*expected[common], expected[~common].sum() + 1]
    ).pvalue
    > 0.01
  )


PROBABILITIES = np.array([0.4, 0.05, 0.2, 0.1, 0.15, 0.07, 0.03])


def uneven(tokens, *_):
  return jnp.tile(np.log(PROBABILITIES).astype(np.float32), (*tokens.shape, 1))


def test_samples_follow_the_probabilities_of_the_model():
  keys, tokens, unknown = problem([NUM_TOKENS] * 400)
  for steps in (1, 4):
    # Without so much noise, likely samples would be kept sooner.
    result = run(keys, tokens, unknown, uneven, steps=steps, temperature=1e9, schedule="linear")[0]
    found = np.bincount(result.ravel(), minlength=CODES)
    assert scipy.stats.chisquare(found, PROBABILITIES * found.sum()).pvalue > 0.01


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(schedule="cosin"), "cosin.*did you mean 'cosine'"),
    (dict(steps=0), "steps, at least 1"),
  ],
)
def test_wrong_options_are_refused(options, message):
  with pytest.raises(UserError, match=message):
    sampling.Sampling(**options)
  keys, tokens, unknown = problem([3])
  with pytest.raises(UserError, match=message):
    sampling.decode(
      hiding, keys, tokens, unknown, **{"steps": 2, "schedule": "cosine", "temperature": 1.0, **options}
    )
