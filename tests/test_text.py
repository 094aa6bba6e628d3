"""Text tokenizers: known ids of CLIP, round trips, and wrong files."""

import gzip
import json
import pathlib
import sys

import numpy as np
import pytest

from maskgen.errors import UserError
from maskgen.numerics.text import BytePairTokenizer, Captions, WordTokenizer, open_text_tokenizer

# Makes "cat", "the" and "'s" at the end of a word, and "ca" and "th" elsewhere.
MERGES = [("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>"), ("'", "s</w>"), ("a", "t</w>")]
CLIP = pathlib.Path(__file__).parents[2] / "shared" / "weights" / "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture(scope="module")
def clip():
  if not CLIP.exists():
    pytest.skip(f"{CLIP} is not there")
  return open_text_tokenizer(f"bpe:{CLIP}")


def pieces(tokenizer: BytePairTokenizer, text: str) -> list[str]:
  names = {i: piece for piece, i in tokenizer.vocabulary.items()}
  return [names[i] for i in tokenizer.encode(text)]


def test_merges_are_made_by_rank():
  tokenizer = BytePairTokenizer(MERGES)
  assert tokenizer.vocabulary_size == 2 * 256 + 6 + 2
  assert (tokenizer.start_id, tokenizer.end_id) == (518, 519)
  assert pieces(tokenizer, "cat") == ["cat</w>"]  # not "c" and "at", whose merge comes later
  assert pieces(tokenizer, "bat") == ["b", "at</w>"]
  assert pieces(tokenizer, "caca the") == ["ca", "c", "a</w>", "the</w>"]
  assert BytePairTokenizer([("a", "a")]).encode("aaaaa") == [512, 512, 256 + ord("a") - ord("!")]


def test_text_is_split_as_in_clip():
  tokenizer = BytePairTokenizer(MERGES)

  def words(text: str) -> list[str]:
    return "".join(pieces(tokenizer, text)).split("</w>")[:-1]

  assert words("The cat's  CAT") == ["the", "cat", "'s", "cat"]
  assert words("'sun !'s don't") == ["'s", "un", "!'", "s", "don", "'t"]
  assert words("a1b23_c, d...") == ["a", "1", "b", "2", "3", "_", "c", ",", "d", "..."]
  assert len(words("x²½Ⅷ一二")) == 5  # numbers stand alone, of whatever script; ideographs are letters
  assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00c9")  # é and É


@pytest.mark.parametrize("text", ["a photo of a cat", "naïve ☃ 😀👍🏽", "日本語 中文", "x = 3 \x00 \x7f"])
def test_byte_pairs_decode_what_they_encode(text):
  tokenizer = BytePairTokenizer(MERGES)
  decoded = tokenizer.decode(tokenizer.encode(text))
  assert decoded.replace(" ", "") == text.replace(" ", "")


def test_decode_stops_at_the_end_and_tolerates_cut_characters():
  tokenizer = BytePairTokenizer(MERGES)
  assert tokenizer.decode(tokenizer.pad("the cat", 9)) == "the cat"  # padding would be exclamation marks
  assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("length", [2, 3, 5, 9])
@pytest.mark.parametrize("tokenizer", [BytePairTokenizer(MERGES), WordTokenizer(["the", "cat"])])
def test_the_end_always_fits(tokenizer, length):
  for text in ("", "cat", "the cat the cat the cat"):
    ids = tokenizer.pad(text, length)
    assert ids.dtype == np.int32 and ids.shape == (length,)
    assert ids[0] == tokenizer.start_id
    end = list(ids).index(tokenizer.end_id)
    assert list(ids[1:end]) == tokenizer.encode(text)[: length - 2]
    assert (ids[end + 1 :] == tokenizer.padding_id).all()
    np.testing.assert_array_equal(tokenizer(text, length), ids)


def test_words():
  tokenizer = WordTokenizer(["a", "dog", ".", "s", "'", "éclair"])
  assert tokenizer.vocabulary_size == 10
  assert tokenizer.encode("A dog's Éclair, a.") == [4, 5, 8, 7, 9, tokenizer.unknown_id, 4, 6]
  assert list(tokenizer.pad("a dog", 6)) == [1, 4, 5, 2, 0, 0]
  assert tokenizer.decode([1, 4, 5, 3, 2, 0, 4]) == "a dog <unknown>"


def test_ids_of_clip(clip):
  assert (clip.vocabulary_size, clip.start_id, clip.end_id) == (49408, 49406, 49407)
  assert clip.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
  assert clip.encode("A  Photo of\ta DOG.") == [320, 1125, 539, 320, 1929, 269]
  # As transformers.CLIPTokenizer has them.
  assert clip.encode("don't 3.14 naïve 😀") == [847, 713, 274, 269, 272, 275, 1097, 35689, 563, 7334]
  assert list(clip.pad("a photo of a cat", 77)[5:9]) == [2368, 49407, 0, 0]


CLEANED = [
  ("caf\u00c3\u00a9 \u201cquoted\u201d it\u2019s", 'café "quoted" it\'s'),  # UTF-8 read as Latin-1
  ("tom &amp;amp; jerry &lt;3", "tom & jerry <3"),
  ("<b>one &amp;amp; two</b>", "<b>one & two</b>"),  # ftfy leaves entities beside tags alone
  ("\ufb01ne \uff21\uff22 \x1b[31mred\x07", "fine ab red"),
]


def test_pasted_text_is_cleaned(tmp_path):
  pytest.importorskip("ftfy", reason="ftfy (the extra text) is not installed")
  (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in MERGES))
  plain, clean = (open_text_tokenizer(f"{kind}:{tmp_path / 'merges.txt'}") for kind in ("bpe", "bpe_clean"))
  for pasted, text in CLEANED:
    assert clean.encode(pasted) == plain.encode(text) != plain.encode(pasted)


def test_cleaned_ids_of_clip(clip):
  """As transformers.CLIPTokenizer 4.57 with ftfy 6.3 has them, after OpenCLIP's second look at entities."""
  pytest.importorskip("ftfy", reason="ftfy (the extra text) is not installed")
  tokenizer = open_text_tokenizer(f"bpe_clean:{CLIP}")
  for text, ids in json.loads((pathlib.Path(__file__).parent / "golden" / "clean_texts.json").read_text()):
    assert tokenizer.encode(text) == ids, text


def test_cleaning_needs_its_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "ftfy", None)
  (tmp_path / "merges.txt").write_text("c a\n")
  with pytest.raises(UserError, match=r"needs ftfy, which is not installed: pip install 'maskgen\[text\]'"):
    open_text_tokenizer(f"bpe_clean:{tmp_path / 'merges.txt'}")


@pytest.mark.parametrize("special", ["<|endoftext|>", "<|StartOfText|>"])
def test_no_text_contains_an_end(special, tmp_path):
  """In prompts they are refused; in the captions of data they are spelled."""
  (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in MERGES))
  captions = Captions(text_tokenizer=f"bpe:{tmp_path / 'merges.txt'}", length=40)
  with pytest.raises(UserError, match=r"word '<\|\w+oftext\|>', which marks an end of the text: remove it"):
    captions.read([f"the cat {special} the"])
  ids = captions.opened.pad(f"the cat {special} the", 40)
  assert list(ids).count(captions.opened.end_id) == 1
  assert captions.opened.decode(ids).replace(" ", "") == f"thecat{special}the".lower()


def test_files_of_hugging_face(tmp_path):
  tokenizer = BytePairTokenizer(MERGES)
  lines = "\n".join(" ".join(pair) for pair in MERGES)
  (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{lines}\n")
  vocabulary = tokenizer.vocabulary
  assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (518, 519)
  (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
  text = "The cat's bat"
  assert open_text_tokenizer(f"bpe:{tmp_path}").encode(text) == tokenizer.encode(text)
  packed = tmp_path / "merges.txt.gz"
  packed.write_bytes(gzip.compress(f'"merges.txt#version: 0.2\n{lines}\n'.encode()))
  assert open_text_tokenizer(f"bpe:{packed}").encode(text) == tokenizer.encode(text)

  (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | {"the</w>": 3}))
  with pytest.raises(UserError, match="its vocabulary does not have CLIP's ids"):
    open_text_tokenizer(f"bpe:{tmp_path}")
  (tmp_path / "vocab.json").write_text("{")
  with pytest.raises(UserError, match="is damaged"):
    open_text_tokenizer(f"bpe:{tmp_path}")
  packed.write_bytes(packed.read_bytes()[:-9])
  with pytest.raises(UserError, match="is damaged"):
    open_text_tokenizer(f"bpe:{packed}")


@pytest.mark.parametrize(
  ("files", "padding"),
  [
    ({}, 519),
    ({"tokenizer_config.json": {}}, 519),
    ({"special_tokens_map.json": {"pad_token": "!"}, "tokenizer_config.json": {"pad_token": "?"}}, 0),
    ({"tokenizer_config.json": {"pad_token": "!"}}, 0),
    ({"tokenizer_config.json": {}, "special_tokens_map.json": {"pad_token": {"content": "!"}}}, 0),
    ({"special_tokens_map.json": {"pad_token": "<|endoftext|>"}}, 519),
    ({"special_tokens_map.json": {"pad_token": "?!?"}}, None),
  ],
)
def test_padding_is_that_of_the_folder(tmp_path, files, padding):
  (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in MERGES))
  (tmp_path / "vocab.json").write_text(json.dumps(BytePairTokenizer(MERGES).vocabulary))
  for name, content in files.items():
    (tmp_path / name).write_text(json.dumps(content))
  if padding is None:
    with pytest.raises(UserError, match=r"padding '\?!\?' is not a token"):
      open_text_tokenizer(f"bpe:{tmp_path}")
  else:
    tokenizer = open_text_tokenizer(f"bpe:{tmp_path}")
    assert list(tokenizer.pad("cat", 5)) == [518, *tokenizer.encode("cat"), 519, padding, padding]
    assert tokenizer.decode(tokenizer.pad("cat", 5)) == "cat"


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("c a\nca t</w>\nca t</w>\n", "'ca t</w>' is repeated or joins unknown pieces"),
    ("ca t</w>\n", "'ca t</w>' is repeated or joins unknown pieces"),
    ("c a t\n", "'c a t' in the merges is not a pair of pieces"),
  ],
)
def test_wrong_merges(tmp_path, content, message):
  (tmp_path / "merges.txt").write_text(content)
  with pytest.raises(UserError, match=message):
    open_text_tokenizer(f"bpe:{tmp_path / 'merges.txt'}")


def test_word_files(tmp_path):
  path = tmp_path / "words.txt"
  path.write_text("a\ndog\n\n.\n")
  assert open_text_tokenizer(f"words:{path}").encode("a cat.") == [4, 3, 6]
  for content, message in (
    ("", "is empty"),
    ("a\nDog\n", "'Dog' in the list of words is not one lower-case word"),
    ("t-shirt\n", "'t-shirt' in the list of words is not one"),
    ("a\nb\na\n", "'a' occurs twice"),
  ):
    path.write_text(content)
    with pytest.raises(UserError, match=message):
      open_text_tokenizer(f"words:{path}")


def test_lists_of_words():
  assert open_text_tokenizer("list:a dog .").encode("a cat.") == [4, 3, 6]
  with pytest.raises(UserError, match="'a' occurs twice"):
    open_text_tokenizer("list:a a")


def test_prompts_are_read_or_refused():
  captions = Captions(text_tokenizer="list:a red dog", length=5)
  np.testing.assert_array_equal(captions.read(["A dog", ""]), [[1, 4, 6, 2, 0], [1, 2, 0, 0, 0]])
  assert captions.opened.unknown("a dog") is None
  for prompt, message in (
    ("a rad dog", "'rad'; did you mean 'red'"),
    ("a red red dog", "has 4 words .* reads 3"),
  ):
    with pytest.raises(UserError, match=message):
      captions.read(["a dog", prompt])
  with pytest.raises(UserError, match="length is 1"):
    Captions(text_tokenizer="list:a", length=1)


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("word:/tmp/words.txt", "'word:/tmp/words.txt' is unknown; did you mean 'words'"),
    ("bpe", "write it as 'bpe:/path'"),
    ("list", "write it as 'list:some words'"),
    ("bpe:/does/not/exist", "'bpe:/does/not/exist' cannot be read .*check the path"),
    ("words:/does/not/exist", "cannot be read"),
  ],
)
def test_wrong_specification(spec, message):
  with pytest.raises(UserError, match=message):
    open_text_tokenizer(spec)
