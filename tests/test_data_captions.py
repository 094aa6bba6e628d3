"""The op on captions."""

import pytest

from maskgen.data.captions import tokenize
from maskgen.data.cpu_tf import tf
from maskgen.errors import UserError


@pytest.fixture
def words(tmp_path):
  (tmp_path / "words.txt").write_text("a\ncat\ndog\nun\n")
  return f"words:{tmp_path / 'words.txt'}"


def test_draws_take_the_captions_in_turn(words):
  captions = tf.constant(["A cat", "a dog", "cat dog cat dog"])
  wanted = [[1, 4, 5, 2, 0], [1, 4, 6, 2, 0], [1, 5, 6, 5, 2]]
  for draw in range(7):
    ids = tokenize(captions, words, 5, draw=tf.constant(draw, tf.int64))
    assert ids.dtype == tf.int32 and ids.numpy().tolist() == wanted[draw % 3]


def test_shape_is_known_inside_tf_data(words):
  def take(draw):
    return tokenize(tf.repeat("a dog", 1 + draw % 2), words, length=6, draw=draw)

  dataset = tf.data.Dataset.range(4).map(take).batch(4)
  assert dataset.element_spec == tf.TensorSpec((None, 6), tf.int32)
  assert next(iter(dataset)).numpy().tolist() == [[1, 4, 6, 2, 0, 0]] * 4


def test_text_that_is_not_utf8_is_read_as_well_as_possible(words):
  ids = tokenize(tf.constant([b"a \xff cat"]), words, 5, draw=tf.constant(0, tf.int64))
  assert ids.numpy().tolist() == [1, 4, 3, 5, 2]


def test_refused_arguments(words):
  def call(*args):
    tokenize(tf.constant(["a"]), *args, draw=tf.constant(0, tf.int64))

  for length in (1, 0, 4.0, True, "4"):
    with pytest.raises(ValueError, match="length is"):
      call(words, length)
  with pytest.raises(ValueError, match="tokenizer is 3"):
    call(3, 4)
  with pytest.raises(UserError, match="cannot be read"):
    call("words:/does/not/exist", 4)
