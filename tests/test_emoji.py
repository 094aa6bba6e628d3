"""The embedded emoji: what is held out, and captions."""

import collections

import numpy as np
import pytest

from maskgen.data import emoji
from maskgen.data.cpu_tf import tf
from maskgen.data.sources import open_source
from maskgen.errors import UserError

KNOWN = emoji.load()
PICTURES = [picture.tobytes() for picture in KNOWN.images]


def index(name: str) -> int:
  return KNOWN.names.index(name)


@pytest.mark.parametrize(("split", "size"), [("train", 3408), ("test", 373)])
def test_records(split, size):
  opened = open_source("emoji", split)
  assert opened.size == size and len(opened.class_names) == 9
  for record, at in list(enumerate(KNOWN.split(split)))[:: size // 30]:
    fetched = opened.fetch(tf.constant(record, tf.int64))
    np.testing.assert_array_equal(fetched["image"], KNOWN.images[at])
    assert opened.class_names[fetched["label"].numpy()] == KNOWN.categories[at] != "Component"
    captions = tuple(text.decode() for text in fetched["caption"].numpy())
    assert captions == KNOWN.captions(at)[: None if split == "train" else 1]
    assert opened.describe(record) == f"'{KNOWN.names[at]}'"


def test_the_licences_lie_beside_the_file():
  notice, licence = (emoji.FILE.with_name(name).read_text() for name in ("NOTICE", "LICENSE"))
  assert "Noto Emoji" in notice and "Copyright (c) 2013 Cal Henderson" in notice
  assert "Apache License" in licence


def test_what_is_held_out_has_one_right_picture():
  names, pictures = collections.Counter(KNOWN.names), collections.Counter(PICTURES)
  for i in KNOWN.split("test"):
    assert names[KNOWN.names[i]] == pictures[PICTURES[i]] == 1, KNOWN.names[i]
    assert KNOWN.variants[KNOWN.bases[i]][KNOWN.tones[i]] == i
  assert "snowboarder" not in KNOWN.variants and "man in tuxedo" not in KNOWN.variants


def test_parts_of_what_is_held_out_stand_in_training():
  train = {(KNOWN.bases[i], KNOWN.tones[i]) for i in KNOWN.split("train")}
  kinds = collections.Counter(KNOWN.held_out)
  assert (kinds["tone"], kinds["form"]) == (301, 72)
  for i in KNOWN.split("test"):
    base, tones = KNOWN.bases[i], ("", *emoji.TONES)
    if KNOWN.held_out[i] == "tone":
      assert sum((base, tone) in train for tone in tones) == 5
    else:
      assert not any((base, tone) in train for tone in tones)
      assert sum((KNOWN.other_form(base), tone) in train for tone in tones) == 5
  tones = collections.Counter(KNOWN.tones[i] for i in KNOWN.split("test") if KNOWN.held_out[i] == "tone")
  assert set(tones) == set(emoji.TONES) and max(tones.values()) - min(tones.values()) <= 1


@pytest.mark.parametrize(
  ("name", "others"),
  [
    (
      "woman firefighter, dark skin tone",
      ("a woman firefighter with dark skin", "dark-skinned woman firefighter"),
    ),
    (
      "man: beard, light skin tone",
      ("a man with a beard and light skin", "light-skinned man with a beard"),
    ),
    ("india flag", ("flag of india",)),
    ("snowboarder", ()),
    ("kiss: man, man, light skin tone and dark skin tone", ()),
  ],
)
def test_captions(name, others):
  assert KNOWN.captions(index(name)) == (name, *others)


def test_forms():
  assert KNOWN.other_form("woman cook") == "man cook" and KNOWN.other_form("man: beard") == "woman: beard"
  assert (
    KNOWN.other_form("cook") == KNOWN.other_form("woman") == KNOWN.other_form("woman with headscarf") == ""
  )


def test_unknown_split():
  with pytest.raises(UserError, match="split 'val' of emoji is unknown"):
    open_source("emoji", "val")
