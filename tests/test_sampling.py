import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from maskgen.errors import UserError
from maskgen.numerics import sampling

NUM_TOKENS, CODES = 12, 7
GRID = (3, 4)
# Which share of the unknown tokens is still masked when the share t, a fraction, of the steps is done.
SHARES = {
  "cosine": lambda t: np.cos(float(t) * np.pi / 2),
  "linear": lambda t: 1 - t,
  "square": lambda t: 1 - t * t,
  "cubic": lambda t: 1 - t * t * t,
  "arccos": lambda t: 2 * np.arccos(float(t)) / np.pi,
}


def hiding(tokens, unknown, t):
  """Logits that only depend on known tokens, like a model's: on those of all positions, and on their own."""
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


@functools.partial(
  jax.jit, static_argnames=("logits_fn", "steps", "schedule", "order", "reuse", "top_k", "top_p")
)
def compiled(keys, tokens, unknown, temperature, softmax_temperature, softmax_ramp, *, logits_fn, **options):
  def watched(tokens, unknown, t):
    seen = (tokens, unknown, t)
    jax.debug.callback(lambda *seen: SEEN.append(tuple(map(np.asarray, seen))), *seen, ordered=True)
    return logits_fn(tokens, unknown, t)

  def reusing(tokens, unknown, t):
    def again(tokens, unknown, where, t):
      return jnp.take_along_axis(watched(tokens, unknown, t), where[..., None], axis=1)

    return watched(tokens, unknown, t), again

  temperatures = dict(
    temperature=temperature, softmax_temperature=softmax_temperature, softmax_ramp=softmax_ramp
  )
  return sampling.decode(watched, keys, tokens, unknown, GRID, reusing, **temperatures, **options)


def run(
  keys,
  tokens,
  unknown,
  logits_fn=hiding,
  *,
  steps=8,
  schedule="cosine",
  temperature=4.0,
  softmax_temperature=1.0,
  softmax_ramp=1.0,
  order="confidence",
  reuse=1,
  **likely,
):
  """Decodes under jit; returns the result and what the model saw: tokens and masks [steps, b, n]."""
  SEEN.clear()
  options = dict(logits_fn=logits_fn, steps=steps, schedule=schedule, order=order, reuse=reuse, **likely)
  temperatures = temperature, softmax_temperature, softmax_ramp
  result = np.asarray(compiled(keys, tokens, unknown, *temperatures, **options))
  jax.effects_barrier()
  seen_tokens, seen_masks, shares = (np.stack(arrays) for arrays in zip(*SEEN, strict=True))
  np.testing.assert_allclose(shares, np.arange(steps) / steps, rtol=1e-6)
  return result, seen_tokens, seen_masks


def oracle(schedule: str, steps: int, count: int) -> list[int]:
  """The number of masked tokens at the start of each step."""
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


@pytest.mark.parametrize("order", sampling.ORDERS)
@pytest.mark.parametrize("reuse", [1, 2, 4, 8])
def test_other_orders_and_reuse_unmask_the_scheduled_number(order, reuse):
  counts = [0, 1, 2, 3, 7, 11, 12]
  keys, tokens, unknown = problem(counts)
  _, _, masks = run(keys, tokens, unknown, order=order, reuse=reuse)
  np.testing.assert_array_equal(masks.sum(axis=-1).T, [oracle("cosine", 8, count) for count in counts])


@pytest.mark.parametrize(
  "options",
  [dict(temperature=0.0), {}, dict(order="halton"), dict(reuse=2), dict(reuse=4, order="random")],
  ids=str,
)
def test_known_tokens_never_change_and_results_are_codes(options):
  keys, tokens, unknown = problem([0, 1, 5, 12])
  result, seen, masks = run(keys, tokens, unknown, **options)
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


@pytest.mark.parametrize(
  "options",
  [{}, dict(order="random"), dict(reuse=2), dict(order="halton_rolled", top_k=5, top_p=0.9)],
  ids=str,
)
def test_an_image_depends_on_its_key_alone(options):
  keys, tokens, unknown = problem([12, 5, 12, 9])
  together = run(keys, tokens, unknown, **options)[0]
  for i in range(4):
    alone = run(keys[i : i + 1], tokens[i : i + 1], unknown[i : i + 1], **options)[0]
    np.testing.assert_array_equal(alone[0], together[i])
  assert (run(keys[::-1], tokens, unknown, **options)[0] != together).any()


# What the defaults gave before there were other orders.
GOLDEN = [[0, 0, 0, 4, 4, 3, 2, 2, 0, 0, 4, 4], [4, 5, 4, 4, 3, 5, 3, 0, 0, 6, 4, 4]]


def test_the_defaults_decode_as_they_always_did():
  keys, tokens, unknown = problem([12, 7])
  np.testing.assert_array_equal(run(keys, tokens, unknown)[0], GOLDEN)


BEST = np.arange(NUM_TOKENS) % CODES


def peaked(tokens, *_):
  return jnp.tile(50.0 * jax.nn.one_hot(BEST, CODES), (len(tokens), 1, 1))


@pytest.mark.parametrize("options", [{}, dict(order="halton"), dict(reuse=2), dict(reuse=8)], ids=str)
def test_peaked_logits_give_the_argmax(options):
  keys, tokens, unknown = problem([12, 5, 0])
  result = run(keys, tokens, unknown, peaked, temperature=0.0, **options)[0]
  np.testing.assert_array_equal(result, np.where(unknown, BEST, tokens))


PLACES = np.random.default_rng(0).permutation(NUM_TOKENS)


def sure_by_place(tokens, *_):
  """The k-th position in PLACES, from 1, samples uniformly from k codes: log p is always -log k."""
  possible = np.arange(NUM_TOKENS) <= np.argsort(PLACES)[:, None]
  return jnp.tile(np.where(possible, 0.0, -1e9).astype(np.float32), (len(tokens), 1, 1))


def one_by_one(temperature, examples=200):
  """The masks [b, steps, n] of each example while tokens are unmasked one by one."""
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
  # Without so much noise, likely samples would be kept sooner.
  for options in (dict(steps=1), dict(steps=4), dict(steps=4, reuse=2), dict(steps=4, order="halton")):
    result = run(keys, tokens, unknown, uneven, temperature=1e9, schedule="linear", **options)[0]
    found = np.bincount(result.ravel(), minlength=CODES)
    assert scipy.stats.chisquare(found, PROBABILITIES * found.sum()).pvalue > 0.01


def test_a_softmax_temperature_sharpens_the_probabilities():
  keys, tokens, unknown = problem([NUM_TOKENS] * 400)
  result = run(keys, tokens, unknown, uneven, order="random", softmax_temperature=0.5)[0]
  found = np.bincount(result.ravel(), minlength=CODES)
  expected = PROBABILITIES**2 / (PROBABILITIES**2).sum()
  assert scipy.stats.chisquare(found, expected * found.sum()).pvalue > 0.01


def test_a_ramp_sharpens_the_probabilities_step_by_step():
  keys, tokens, unknown = problem([NUM_TOKENS] * 400)
  options = dict(order="halton", steps=4, schedule="linear", softmax_temperature=2.0, softmax_ramp=5.0)
  result = run(keys, tokens, unknown, uneven, **options)[0]
  for step, places in enumerate(np.split(sampling.halton(GRID), 4)):
    found = np.bincount(result[:, places].ravel(), minlength=CODES)
    expected = PROBABILITIES ** ((1 + 4 * step / 3) / 2)
    expected *= found.sum() / expected.sum()
    common = expected > 5
    pairs = ([*array[common], array[~common].sum() + 1] for array in (found, expected))
    assert scipy.stats.chisquare(*pairs).pvalue > 0.01


def likely(p, top_k, top_p):
  """The codes that can be sampled: the k most probable, and of these the fewest that sum to top_p."""
  falling = sorted(range(len(p)), key=lambda code: -p[code])[: top_k or len(p)]
  total, kept = sum(p[code] for code in falling), []
  for code in falling:
    kept.append(code)
    if sum(p[one] for one in kept) >= top_p * total:
      break
  return set(kept)


@pytest.mark.parametrize(
  ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (3, 1.0), (9, 1.0), (0, 0.5), (0, 1e-6), (4, 0.8)]
)
def test_top_k_and_top_p_keep_the_likely_codes(top_k, top_p):
  p = np.random.default_rng(0).dirichlet(np.ones(CODES), (5, 3))
  kept = np.isfinite(sampling.keep_likely(jnp.log(jnp.asarray(p, jnp.float32)), top_k, top_p))
  for row, mask in zip(p.reshape(-1, CODES), kept.reshape(-1, CODES), strict=True):
    assert {*np.flatnonzero(mask)} == likely(row, top_k, top_p)


def test_samples_are_likely_codes():
  keys, tokens, unknown = problem([NUM_TOKENS] * 100)
  result = run(keys, tokens, unknown, uneven, steps=4, temperature=1e9, top_k=5, top_p=0.75)[0]
  found = np.bincount(result.ravel(), minlength=CODES)
  kept = sorted(likely(PROBABILITIES, 5, 0.75))
  expected = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
  assert found[kept].sum() == result.size
  assert scipy.stats.chisquare(found[kept], expected * result.size).pvalue > 0.01


@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_greedy_decoding_takes_the_best_code_of_the_most_certain_token(order):
  keys, tokens, unknown = problem([12, 7])
  options = dict(steps=6, schedule="linear", order=order, temperature=0.0, top_k=1)
  result = run(keys, tokens, unknown, **options)[0]
  now, masked = np.array(tokens), np.array(unknown)
  for step in range(6):
    log_p = np.asarray(jax.nn.log_softmax(hiding(jnp.asarray(now), jnp.asarray(masked), None)))
    for i, count in enumerate((12, 7)):
      score = log_p[i].max(axis=-1) if order == "confidence" else -np.argsort(sampling.halton(GRID))
      falling = sorted(np.flatnonzero(masked[i]), key=lambda place: -score[place])
      left = ([*oracle("linear", 6, count), 0])[step + 1]
      for place in falling[: len(falling) - left]:
        now[i, place], masked[i, place] = log_p[i, place].argmax(), False
  np.testing.assert_array_equal(result, now)


def test_a_rolled_sequence_begins_anywhere():
  options = dict(order="halton_rolled", steps=NUM_TOKENS, schedule="linear")
  masks = run(*problem([NUM_TOKENS] * 300), **options)[2].swapaxes(0, 1)
  found = np.argsort(masks.sum(axis=1), axis=-1)  # by how long each stays masked
  sequence = sampling.halton(GRID)
  shifts = [int(np.flatnonzero(sequence == row[0])[0]) for row in found]
  for row, shift in zip(found, shifts, strict=True):
    np.testing.assert_array_equal(row, np.roll(sequence, -shift))
  assert scipy.stats.chisquare(np.bincount(shifts, minlength=NUM_TOKENS)).pvalue > 0.01


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (3, 4), (4, 9), (16, 16), (24, 10)])
def test_halton_meets_each_cell_once(grid):
  np.testing.assert_array_equal(np.sort(sampling.halton(grid)), np.arange(grid[0] * grid[1]))


@pytest.mark.parametrize("coarse", [(2, 1), (2, 3), (4, 3), (4, 9)])
def test_the_first_tokens_of_halton_fall_into_distinct_blocks(coarse):
  rows, columns = np.divmod(sampling.halton((8, 9))[: coarse[0] * coarse[1]], 9)
  blocks = rows * coarse[0] // 8 * coarse[1] + columns * coarse[1] // 9
  assert len(set(blocks)) == len(blocks)


@pytest.mark.parametrize("count", [8, 32, 128])
def test_halton_is_better_spread_than_rows_and_chance(count):
  def discrepancy(cells):
    places = (np.stack(np.divmod(cells[:count], 16), axis=-1) + 0.5) / 16
    return scipy.stats.qmc.discrepancy(places)

  halton = discrepancy(sampling.halton((16, 16)))
  assert halton < 0.5 * discrepancy(np.arange(256))
  chance = [discrepancy(np.random.default_rng(seed).permutation(256)) for seed in range(20)]
  assert halton < min(chance)


def test_halton_skips_known_tokens():
  keys, tokens, unknown = problem([5, 9, 12])
  _, _, masks = run(keys, tokens, unknown, order="halton", steps=NUM_TOKENS, schedule="linear")
  place = np.argsort(sampling.halton(GRID))
  for example in masks.swapaxes(0, 1):
    for before, after in itertools.pairwise(example):
      unmasked = before & ~after
      assert not unmasked.any() or place[unmasked].max() < place[after].min()


def test_a_random_order_is_even():
  options = dict(order="random", steps=NUM_TOKENS, schedule="linear", temperature=0.0)
  masks = run(*problem([NUM_TOKENS] * 300), sure_by_place, **options)[2]
  assert scipy.stats.chisquare((~masks[1]).sum(axis=0)).pvalue > 0.01


@pytest.mark.parametrize("reuse", [1, 2])
def test_a_trajectory_ends_with_the_result(reuse):
  keys, tokens, unknown = problem([0, 5, 12])

  def reusing(tokens, unknown, t):
    def again(tokens, unknown, where, t):
      return jnp.take_along_axis(hiding(tokens, unknown, t), where[..., None], axis=1)

    return hiding(tokens, unknown, t), again

  arguments = (hiding, keys, tokens, unknown, GRID, reusing)
  options = dict(steps=4, schedule="cosine", temperature=1.0, reuse=reuse)
  found, masks = sampling.trajectory(*arguments, **options)
  assert found.shape == masks.shape == (4, 3, NUM_TOKENS)
  np.testing.assert_array_equal(found[-1], sampling.decode(*arguments, **options))
  np.testing.assert_array_equal(masks.sum(axis=-1).T, [[*oracle("cosine", 4, c)[1:], 0] for c in (0, 5, 12)])
  for step in range(4):
    known = ~np.asarray(masks[step])
    np.testing.assert_array_equal(found[step][known], found[-1][known])


def test_partial_evaluations_hold_all_that_they_unmask_and_no_more_than_they_must():
  table = sampling.remaining_table("cosine", 20, 256)
  assert sampling.most_unmasked(table, 20) == 256
  assert sampling.most_unmasked(table, 2) == table[17, 256]


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(schedule="cosin"), "cosin.*did you mean 'cosine'"),
    (dict(steps=0), "steps, at least 1"),
    (dict(order="haltn"), "haltn.*did you mean 'halton'"),
    (dict(reuse=3), "reuse is 3: it must divide"),
  ],
)
def test_wrong_options_are_refused(options, message):
  with pytest.raises(UserError, match=message):
    sampling.MaskedSampling(**{"steps": 8, **options})
  keys, tokens, unknown = problem([3])
  with pytest.raises(UserError, match=message):
    sampling.decode(
      hiding, keys, tokens, unknown, GRID, **{"steps": 2, "schedule": "cosine", "temperature": 1.0, **options}
    )


def test_values_out_of_range_are_refused():
  for options, message in (
    (dict(softmax_temperature=0.0), "softmax_temperature is 0"),
    (dict(softmax_temperature=-1.0), "softmax_temperature is -1.0"),
    (dict(reuse=0), "reuse is 0"),
    (dict(softmax_ramp=-1.0), "softmax_ramp is -1.0"),
    (dict(top_k=-1), "top_k is -1"),
    (dict(top_k=2.5), "top_k is 2.5: give a whole number"),
    (dict(top_p=0.0), "top_p is 0.0: give a probability above 0"),
    (dict(top_p=1.5), "top_p is 1.5"),
  ):
    with pytest.raises(UserError, match=message):
      sampling.MaskedSampling(**options)


def test_reuse_needs_a_model_that_can():
  with pytest.raises(UserError, match="cannot reuse features"):
    options = dict(steps=2, schedule="cosine", temperature=1.0, reuse=2)
    sampling.decode(hiding, *problem([3]), GRID, **options)
