"""Captioned digits: pictures match their captions, and both can be read back."""

import itertools

import numpy as np
import pytest
from sklearn import svm

from maskgen import images
from maskgen.data import digit_scenes as scenes
from maskgen.data.cpu_tf import tf
from maskgen.data.sources import open_source
from maskgen.errors import UserError


def fetch(split, start=0, stop=None):
  opened = open_source("captioned_digits", split)
  records = tf.data.Dataset.range(start, stop or opened.size).map(opened.fetch, tf.data.AUTOTUNE)
  return next(records.batch(opened.size).as_numpy_iterator())


@pytest.fixture(scope="module")
def train():
  return fetch("train", stop=2 * 1437)


@pytest.fixture(scope="module")
def test():
  return fetch("test")


def captions(records):
  return [text.decode() for (text,) in records["caption"]]


def read(records):
  return scenes.read(records["image"].astype(np.float32) / 255.0)


def test_records(train):
  opened = open_source("captioned_digits", "train")
  assert opened.size == 64 * 1437 and open_source("captioned_digits", "test").size == 4 * 360
  assert opened.class_names == scenes.KINDS["class"]
  assert train["image"].shape[1:] == (16, 16, 3) and train["image"].dtype == np.uint8
  np.testing.assert_array_equal(fetch("train", 700, 710)["image"], train["image"][700:710])
  # A digit is drawn many times, each time otherwise.
  np.testing.assert_array_equal(train["label"][:1437], train["label"][1437:])
  assert len({image.tobytes() for image in train["image"]}) == len(train["image"])


def test_splits_share_no_picture(train, test):
  assert not {image.tobytes() for image in train["image"]} & {image.tobytes() for image in test["image"]}


def test_captions_for_testing_mention_everything(test):
  said = [scenes.parse(caption) for caption in captions(test)]
  assert all(one is not None and one.keys() == scenes.KINDS.keys() for one in said)
  np.testing.assert_array_equal([one["class"] for one in said], test["label"])
  for kind, values in read(test)[0].items():
    assert np.mean(values == [one[kind] for one in said]) > 0.99, kind
  for kind, words in scenes.KINDS.items():
    shares = np.bincount([one[kind] for one in said], minlength=len(words)) / len(said)
    assert np.ptp(shares * len(words)) < 0.5, kind


def test_captions_for_training_leave_something_out(train):
  said = [scenes.parse(caption) for caption in captions(train)]
  np.testing.assert_array_equal([one["class"] for one in said], train["label"])
  values, _ = read(train)
  for kind in values:
    pairs = [(one[kind], value) for one, value in zip(said, values[kind], strict=True) if kind in one]
    assert abs(len(pairs) / len(said) - 0.95) < 0.02, kind
    assert np.mean([a == b for a, b in pairs]) > 0.99, kind


@pytest.mark.parametrize("shift", range(1, 6))
def test_shifted_hues_are_other_values_of_colours(test, shift):
  before, glyphs = read(test)
  pictures = test["image"].astype(np.float32) / 255.0
  turned = images.shift_hues(pictures, np.full(len(pictures), shift, np.int32))
  after, same = scenes.read(np.asarray(turned))
  for kind in ("colour", "background"):
    assert np.mean(after[kind] == (before[kind] + shift) % 6) > 0.99, kind
  for kind in ("size", "place"):
    assert np.mean(after[kind] == before[kind]) > 0.99, kind
  assert np.abs(same - glyphs).mean() < 0.05


def test_glyphs_determine_the_class(train, test):
  (_, known), (_, seen) = read(train), read(test)
  classifier = svm.SVC().fit(known.reshape(len(known), -1), train["label"])
  assert classifier.score(seen.reshape(len(seen), -1), test["label"]) > 0.93


def test_captions_round_trip():
  kinds = list(scenes.KINDS)
  for kept in itertools.product([True, False], repeat=len(kinds) - 1):
    said = {kind: i for i, (kind, keep) in enumerate(zip(kinds, (True, *kept), strict=True)) if keep}
    said["class"] = 7
    if "size" in said:
      said["size"] = 1
    assert scenes.parse(scenes.describe(said)) == said
  text = "a large red seven at the top left on a blue background"
  assert scenes.describe(scenes.parse(text)) == text
  assert set(text.split()) <= set(scenes.WORDS) and len(set(scenes.WORDS)) == len(scenes.WORDS)
  for wrong in ("", "a seven in red", "a red large seven", "a seven at the top left right", "a seven eight"):
    assert scenes.parse(wrong) is None


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_contradictions_differ_in_one_word(kind):
  for value in range(len(scenes.KINDS[kind])):
    said = dict.fromkeys(scenes.KINDS, 0) | {kind: value}
    other = scenes.contradict(said, kind)
    assert {name for name in said if said[name] != other[name]} == {kind}
    assert scenes.parse(scenes.describe(other)) == other


def test_unknown_split():
  with pytest.raises(UserError, match="split 'val' of captioned_digits is unknown"):
    open_source("captioned_digits", "val")
