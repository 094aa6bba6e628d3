"""Prompts of words and images, compared with a plain loop, and TailDrop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskgen.errors import UserError
from maskgen.numerics import prompts
from maskgen.numerics.prompts import Frame, Segment, TailDrop, Templates, Words

WIDTH, LENGTH = 3, 12
FRAME = Frame(*(np.full(WIDTH, value, np.float32) for value in (-1, -2, -3)))


def reference(segments, length):
  """Prompts, row by row and vector by vector."""
  rows, ends = [], []
  for b in range(len(segments[0].number)):
    row = [FRAME.start]
    for segment in segments:
      row += list(segment.vectors[b, : segment.number[b]])
    ends.append(len(row))
    row.append(FRAME.end)
    rows.append(row + [FRAME.padding] * (length - len(row)))
  return np.array(rows), np.array(ends)


def draw(rng, n, batch=4):
  return Segment(
    rng.normal(size=(batch, n, WIDTH)).astype(np.float32), rng.integers(0, n + 1, batch, np.int32)
  )


@pytest.mark.parametrize("sizes", [(6, 4), (4, 6), (10,), (3, 2, 2, 3), (1,)])
def test_prompts_are_what_a_loop_writes(sizes):
  traces = []

  @jax.jit
  def assemble(segments):
    traces.append(segments)
    return prompts.assemble(segments, FRAME, LENGTH)

  rng = np.random.default_rng(0)
  for _ in range(20):
    segments = [draw(rng, n) for n in sizes]
    found = assemble(segments)
    embeddings, end = reference(segments, LENGTH)
    np.testing.assert_array_equal(found.embeddings, embeddings)
    np.testing.assert_array_equal(found.end, end)
    assert found.end.dtype == jnp.int32
  assert len(traces) == 1  # other numbers compile nothing anew


def test_dropped_vectors_leave_no_trace():
  rng = np.random.default_rng(1)
  image, words = draw(rng, 6), draw(rng, 4)
  for k in range(7):
    whole = prompts.assemble([image._replace(number=np.full(4, k, np.int32)), words], FRAME, LENGTH)
    short = prompts.assemble([Segment(image.vectors[:, :k], np.full(4, k, np.int32)), words], FRAME, LENGTH)
    np.testing.assert_array_equal(whole.embeddings, short.embeddings)
    np.testing.assert_array_equal(whole.end, short.end)


def test_gradients_reach_what_is_used_and_nothing_else():
  segment = Segment(np.ones((1, 5, WIDTH), np.float32), np.int32([3]))
  slope = jax.grad(lambda v: prompts.assemble([segment._replace(vectors=v)], FRAME, LENGTH).embeddings.sum())(
    segment.vectors
  )
  np.testing.assert_array_equal(slope[0, :, 0], [1, 1, 1, 0, 0])


def test_words_stay():
  found = prompts.num_fitting(np.int32([6, 6, 2]), np.int32([3, 9, 3]), LENGTH)
  np.testing.assert_array_equal(found, [6, 1, 2])


def say(words, number=6, subjects=(), examples=4000):
  """The numbers of a caption's words before and behind images, and the hue shifts."""
  keys = jax.random.split(jax.random.key(0), examples)
  vectors = np.tile(np.arange(1.0, 8.0, dtype=np.float32)[None, :, None], (examples, 1, WIDTH))
  caption = Segment(vectors, np.full(examples, number, np.int32))
  said = jax.jit(words.draw)(keys, caption, np.tile(np.isin(np.arange(1, 8), subjects), (examples, 1)))
  before, behind, shift = map(np.asarray, (said.before.number, said.behind.number, said.hue_shift))
  assert ((before + behind) <= number).all()
  for vectors, first, last in zip(np.asarray(said.behind.vectors), before, behind, strict=True):
    assert list(vectors[:last, 0]) == list(range(number - last + 1, number + 1)) and first >= 0
  np.testing.assert_array_equal(said.before.vectors, caption.vectors)
  return before, behind, shift


def test_a_share_of_images_has_words_beside_it():
  for place in ("before", "behind"):
    before, behind, shift = say(Words(0.3, place))
    (none, words) = (before, behind) if place == "before" else (behind, before)
    assert not none.any() and not shift.any() and set(words) == {0, 6}
    assert abs(np.mean(words > 0) - 0.3) < 0.03
  before, behind, shift = say(Words(0.5, recoloured=0.4))
  assert abs(np.mean(shift > 0) - 0.2) < 0.03 and not shift[behind == 0].any()
  assert all(abs(np.mean(shift == n) - 0.04) < 0.015 for n in range(1, 6))


def test_templates_stand_in_for_captions():
  """Half of the examples have words, a quarter of these a template; so has who has no caption."""
  count, width = 8000, 6

  def mark(value, numbers):
    return Segment(np.full((2, width, WIDTH), value, np.float32), np.array(numbers))

  templates = Templates(mark(2.0, [2, 0]), mark(3.0, [1, 4]))
  for number, templated in ((5, 0.25), (0, 0.0), (0, 1.0)):
    words = Words(0.5, templates=("a {}", "{}"), templated=templated)
    caption = Segment(np.ones((count, width, WIDTH), np.float32), np.full(count, number, np.int32))
    made = words.draw(
      jax.random.split(jax.random.key(0), count), caption, np.zeros((count, width), bool), templates
    )
    numbers = list(
      zip(*(np.asarray(side.number).tolist() for side in (made.before, made.behind)), strict=True)
    )
    shares = {pair: numbers.count(pair) / count for pair in set(numbers)}
    half = (0.125 if number else 0.5) / 2
    expected = {(0, 0): 0.5, (2, 1): half, (0, 4): half} | ({(0, 5): 0.375} if number else {})
    assert shares.keys() == expected.keys()
    assert all(abs(shares[pair] - expected[pair]) < 0.02 for pair in shares)
    before, behind = (np.asarray(side.vectors[:, 0, 0]) for side in (made.before, made.behind))
    for i, pair in enumerate(numbers):
      assert (before[i], behind[i]) == {(2, 1): (2, 3), (0, 4): (2, 3)}.get(pair, (1, 1))


def test_an_image_replaces_words():
  before, behind, _ = say(Words(1.0, "within"), number=4)
  for i in range(5):  # two of five places, in their order
    assert abs(np.mean(before == i) - (9 - 2 * i) / 25) < 0.03
    assert abs(np.mean(behind == i) - (9 - 2 * i) / 25) < 0.03


def test_an_image_replaces_its_subject():
  """The image replaces the third of five words, the first of two subjects."""
  words = Words(1.0, "within", ("cat", "dog"), 0.5)
  before, behind, shift = say(words, 5, (3, 4))
  plain, turned = shift == 0, shift > 0
  for i in range(3):
    assert abs(np.mean(before[plain] == i) - 1 / 3) < 0.04 and abs(np.mean(behind[plain] == i) - 1 / 3) < 0.04
    share = 2 / 3 if i == 2 else 1 / 6
    assert abs(np.mean(before[turned] == i) - share) < 0.04
    assert abs(np.mean(behind[turned] == i) - share) < 0.04
  assert before.max() == 2 and behind.max() == 2
  # A word behind the end of the caption is no subject.
  before, behind, _ = say(words, 2, (4,))
  assert before.max() == 2 and behind.max() == 2


@pytest.mark.parametrize(
  ("drop", "expected"),
  [
    (TailDrop(full=0.0), dict.fromkeys(range(1, 7), 1 / 6)),
    (TailDrop(), dict.fromkeys(range(1, 6), 0.125) | {6: 0.375}),
    (TailDrop("powers", 0.0), {1: 0.25, 2: 0.25, 4: 0.25, 6: 0.25}),
    (TailDrop("all"), {6: 1.0}),
  ],
)
def test_the_number_of_kept_tokens(drop, expected):
  drawn = np.asarray(drop.draw(jax.random.split(jax.random.key(0), 4000), 6))
  shares = {k: (drawn == k).mean() for k in range(8)}
  for k, share in shares.items():
    assert abs(share - expected.get(k, 0.0)) < 0.03, k


@pytest.mark.parametrize(
  ("cls", "fields", "message"),
  [
    (TailDrop, dict(distribution="pow"), "distribution 'pow' does not exist"),
    (TailDrop, dict(full=1.5), "full is 1.5"),
    (Words, dict(share=-0.1), "share is -0.1: give a share from 0 to 1"),
    (Words, dict(share=0.5, recoloured=1.1), "recoloured is 1.1"),
    (Words, dict(place="amid"), "place 'amid' does not exist"),
    (Words, dict(recoloured=0.5), "recoloured is 0.5 but share is 0: give a share of examples with words"),
    (Words, dict(templates=("a {} and {}",)), "the template 'a {} and {}' does not have one {}: write it"),
    (Words, dict(share=0.5, templated=0.5), "templated is 0.5 but there are no templates: give some"),
    (Words, dict(share=1.0, recoloured=0.5, templates=("{}",), templated=1.0), "recoloured has no effect on"),
    (Words, dict(place="behind", subject=("cat",)), "subject requires place='within', but place is 'behind'"),
  ],
)
def test_wrong_fields(cls, fields, message):
  with pytest.raises(UserError, match=message):
    cls(**fields)
