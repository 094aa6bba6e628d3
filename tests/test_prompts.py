"""Prompts of words and images: as a loop would write them, and what dropping the tail leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskgen import prompts
from maskgen.errors import UserError
from maskgen.prompts import Frame, Run, TailDrop

WIDTH, LENGTH = 3, 12
FRAME = Frame(*(np.full(WIDTH, value, np.float32) for value in (-1, -2, -3)))


def reference(runs, length):
  """Prompts, row by row and vector by vector."""
  rows, ends = [], []
  for b in range(len(runs[0].number)):
    row = [FRAME.start]
    for run in runs:
      row += list(run.vectors[b, : run.number[b]])
    ends.append(len(row))
    row.append(FRAME.end)
    rows.append(row + [FRAME.padding] * (length - len(row)))
  return np.array(rows), np.array(ends)


def draw(rng, n, batch=4):
  return Run(rng.normal(size=(batch, n, WIDTH)).astype(np.float32), rng.integers(0, n + 1, batch, np.int32))


@pytest.mark.parametrize("sizes", [(6, 4), (4, 6), (10,), (3, 2, 2, 3), (1,)])
def test_prompts_are_what_a_loop_writes(sizes):
  traces = []

  @jax.jit
  def assemble(runs):
    traces.append(runs)
    return prompts.assemble(runs, FRAME, LENGTH)

  rng = np.random.default_rng(0)
  for _ in range(20):
    runs = [draw(rng, n) for n in sizes]
    found = assemble(runs)
    embeddings, end = reference(runs, LENGTH)
    np.testing.assert_array_equal(found.embeddings, embeddings)
    np.testing.assert_array_equal(found.end, end)
    assert found.end.dtype == jnp.int32
  assert len(traces) == 1  # other numbers compile nothing anew


def test_dropped_vectors_are_as_if_they_never_were():
  rng = np.random.default_rng(1)
  image, words = draw(rng, 6), draw(rng, 4)
  for k in range(7):
    whole = prompts.assemble([image._replace(number=np.full(4, k, np.int32)), words], FRAME, LENGTH)
    short = prompts.assemble([Run(image.vectors[:, :k], np.full(4, k, np.int32)), words], FRAME, LENGTH)
    np.testing.assert_array_equal(whole.embeddings, short.embeddings)
    np.testing.assert_array_equal(whole.end, short.end)


def test_gradients_reach_what_is_used_and_nothing_else():
  run = Run(np.ones((1, 5, WIDTH), np.float32), np.int32([3]))
  slope = jax.grad(lambda v: prompts.assemble([run._replace(vectors=v)], FRAME, LENGTH).embeddings.sum())(
    run.vectors
  )
  np.testing.assert_array_equal(slope[0, :, 0], [1, 1, 1, 0, 0])


def test_words_stay():
  found = prompts.room(np.int32([6, 6, 2]), np.int32([3, 9, 3]), LENGTH)
  np.testing.assert_array_equal(found, [6, 1, 2])


def test_an_image_has_a_place_in_its_caption():
  keys, numbers = jax.random.split(jax.random.key(0), 3000), np.resize([0, 1, 4], 3000).astype(np.int32)
  words = Run(np.tile(np.arange(1.0, 7.0, dtype=np.float32)[None, :, None], (3000, 1, WIDTH)), numbers)

  def cuts(place):
    before, behind = (
      [list(vectors[:k, 0]) for vectors, k in zip(*map(np.asarray, run), strict=True)]
      for run in jax.jit(prompts.around, static_argnums=2)(keys, words, place)
    )
    for all_of, first, last in zip(numbers, before, behind, strict=True):
      said = list(range(1, all_of + 1))
      assert first == said[: len(first)] and last == said[all_of - len(last) :]
    return np.stack([list(map(len, before)), list(map(len, behind))], axis=1)

  np.testing.assert_array_equal(cuts("before"), np.stack([0 * numbers, numbers], axis=1))
  np.testing.assert_array_equal(cuts("behind"), np.stack([numbers, 0 * numbers], axis=1))
  within = cuts("within")
  assert (within.sum(axis=1) <= numbers).all()
  first, last = within[numbers == 4, 0], 4 - within[numbers == 4, 1]
  for i in range(5):  # two of five places, in their order
    assert abs(np.mean(first == i) - (9 - 2 * i) / 25) < 0.05
    assert abs(np.mean(last == i) - (2 * i + 1) / 25) < 0.05


@pytest.mark.parametrize(
  ("drop", "expected"),
  [
    (TailDrop(full=0.0), dict.fromkeys(range(1, 7), 1 / 6)),
    (TailDrop(), dict.fromkeys(range(1, 6), 0.125) | {6: 0.375}),
    (TailDrop("powers", 0.0), {1: 0.25, 2: 0.25, 4: 0.25, 6: 0.25}),
    (TailDrop("all"), {6: 1.0}),
  ],
)
def test_how_many_tokens_are_kept(drop, expected):
  drawn = np.asarray(drop.draw(jax.random.split(jax.random.key(0), 4000), 6))
  shares = {k: (drawn == k).mean() for k in range(8)}
  for k, share in shares.items():
    assert abs(share - expected.get(k, 0.0)) < 0.03, k


@pytest.mark.parametrize(
  ("fields", "message"),
  [(dict(distribution="pow"), "distribution 'pow' does not exist"), (dict(full=1.5), "full is 1.5")],
)
def test_wrong_fields(fields, message):
  with pytest.raises(UserError, match=message):
    TailDrop(**fields)
