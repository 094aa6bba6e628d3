"""Balanced parts of a data set."""

import numpy as np
import pytest

from maskgen.data import subset
from maskgen.data.cpu_tf import tf
from maskgen.data.pipeline import Data
from maskgen.data.sources import Source
from maskgen.errors import UserError

LABELS = np.repeat(np.arange(3), [5, 9, 20])[np.random.default_rng(0).permutation(34)]


def source(labels=LABELS) -> Source:
  table = tf.constant(labels, tf.int64)

  def fetch(index: tf.Tensor) -> dict[str, tf.Tensor]:
    return {"image": tf.io.read_file("/not/there"), "label": tf.gather(table, index)}  # must not be read

  names = None if labels is None else ("ant", "bee", "cat")
  return Source("test", len(labels), names, fetch, "fingerprint", lambda index: f"record {index}")


def take(shots=None, share=None, seed=0):
  part = subset.take(source(), shots=shots, share=share, seed=seed)
  records = [int(part.describe(index).split()[1]) for index in range(part.size)]
  return part, records


def test_every_class_has_as_many():
  part, records = take(shots=5)
  assert part.size == 15 and len(set(records)) == 15
  np.testing.assert_array_equal(np.bincount(LABELS[records]), [5, 5, 5])


@pytest.mark.parametrize("share,counts", [(0.01, [1, 1, 1]), (0.2, [1, 2, 4]), (1.0, [5, 9, 20])])
def test_every_class_has_the_same_share(share, counts):
  _, records = take(share=share)
  np.testing.assert_array_equal(np.bincount(LABELS[records]), counts)


def test_fewer_are_a_part_of_more_and_seeds_differ():
  chosen = [set(take(shots=shots)[1]) for shots in (1, 3, 5)]
  assert chosen[0] < chosen[1] < chosen[2]
  assert take(shots=3)[1] == take(shots=3)[1] != take(shots=3, seed=1)[1]


def test_fingerprints_tell_parts_apart():
  parts = [take(shots=3)[0], take(shots=5)[0], take(shots=3, seed=1)[0], source()]
  assert len({part.fingerprint for part in parts}) == 4
  assert take(shots=3)[0].fingerprint == parts[0].fingerprint


def test_too_many_are_refused():
  with pytest.raises(UserError, match=r"class 'ant' of test has 5 records, but data\.shots is 6"):
    take(shots=6)


OPTIONS = dict(
  source="synthetic", preprocess="decode(3)|resize(8)", eval_preprocess="decode(3)|resize(8)", batch_size=10
)


def test_training_and_probes_see_the_part_and_evaluation_the_whole():
  whole, part = Data(**OPTIONS), Data(**OPTIONS, shots=2)
  assert (part.num_train, part.num_eval) == (20, whole.num_eval)
  assert part.fingerprints["evaluation"] == whole.fingerprints["evaluation"]
  assert part.fingerprints["training"] != whole.fingerprints["training"]
  batches = part.train_batches(0)
  epoch = [next(batches) for _ in range(2)]
  np.testing.assert_array_equal(np.bincount(np.concatenate([b["label"] for b in epoch])), [2] * 10)
  again = next(part.train_batches(1))
  np.testing.assert_array_equal(again["image"], epoch[1]["image"])
  seen = np.concatenate([b["label"][b["valid"]] for b in part.eval_batches("train", 8)])
  np.testing.assert_array_equal(np.bincount(seen), [2] * 10)


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(shots=2, share=0.1), "not both"),
    (dict(shots=0), "shots is 0"),
    (dict(share=0.0), "share is 0.0"),
    (dict(share=1.5), "share is 1.5"),
    (dict(shots=1000), "class .* has 2[56] records, but data.shots is 1000"),
  ],
)
def test_wrong_parts_are_refused(options, message):
  with pytest.raises(UserError, match=message):
    Data(**OPTIONS, **options)


def test_sources_without_labels_have_no_parts():
  with pytest.raises(UserError, match="no labels to choose by"):
    subset.take(Source("test", 3, None, source().fetch, "f"), shots=1, share=None, seed=0)
