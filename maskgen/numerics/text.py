"""Text tokenizers: CLIP's byte pairs, or the words of a list.

A tokenizer returns captions as int32 [length]: a start id, the caption, truncated so that an end id always
fits, the end id, and padding. `open_text_tokenizer` opens the one that a config names.
"""

import abc
import dataclasses
import functools
import gzip
import html
import itertools
import json
import os
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from maskgen.config import check_at_least, fields
from maskgen.errors import UserError, nearest

# Kinds of tokenizers, see `open_text_tokenizer`.
BYTE_PAIRS, CLEAN_BYTE_PAIRS = "bpe", "bpe_clean"
# The number of merges that CLIP uses; its file contains more.
_CLIP_MERGES = 49_152 - 256 - 2
_WORD_END = "</w>"
_START, _END = "<|startoftext|>", "<|endoftext|>"
# Files of a folder that may name the padding token; if they differ, the first one applies.
_PADDING_FILES = ("special_tokens_map.json", "tokenizer_config.json")
_FILES = ("vocab.json", "merges.txt", "tokenizer.json", *_PADDING_FILES)


class TextTokenizer(abc.ABC):
  """Converts between texts and ids in [0, vocabulary_size).

  Attributes:
    vocabulary_size: the number of ids, including special ones.
    padding_id: fills the positions after the end id; it may be any id, including the end id.
    start_id: the id before a caption.
    end_id: the id after it, which does not occur in captions.
  """

  vocabulary_size: int
  padding_id: int = 0
  start_id: int
  end_id: int

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without special ids around it."""

  @abc.abstractmethod
  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text up to the first end id, in lower case."""

  def unknown(self, text: str) -> str | None:
    """Returns a text's first out-of-vocabulary word and a remedy, such as the nearest known one, or None."""
    return None

  def pad(self, text: str, length: int) -> np.ndarray:
    """Returns start, text, end and padding as int32 [length]; length must be at least 2."""
    ids = [self.start_id, *self.encode(text)[: length - 2], self.end_id]
    return np.array(ids + [self.padding_id] * (length - len(ids)), np.int32)

  __call__ = pad

  def _content(self, ids: Iterable[int]) -> Iterator[int]:
    before_end = itertools.takewhile(lambda i: i != self.end_id, map(int, ids))
    return (i for i in before_end if i != self.start_id)


class WordTokenizer(TextTokenizer):
  """Lower-case words and punctuation marks; ids are padding, start, end, unknown, then the words.

  Args:
    words: the vocabulary: runs of letters and digits, and single punctuation marks.

  Raises:
    UserError: if it is empty, or a word is repeated or can never occur.
  """

  padding_id, start_id, end_id, unknown_id = range(4)

  def __init__(self, words: Sequence[str]):
    if not words:
      raise UserError("the list of words is empty: write one word per line")
    for word in words:
      if _words(word) != [word]:
        raise UserError(f"'{word}' in the list of words is not one lower-case word: split or remove it")
    self._words = ["", "", "", "<unknown>", *words]
    self._ids = {word: i for i, word in enumerate(self._words) if i > self.unknown_id}
    if len(self._ids) < len(words):
      twice = next(word for i, word in enumerate(words) if word in words[:i])
      raise UserError(f"'{twice}' occurs twice in the list of words: remove one")
    self.vocabulary_size = len(self._words)

  def encode(self, text: str) -> list[int]:
    return [self._ids.get(word, self.unknown_id) for word in _words(text)]

  def unknown(self, text: str) -> str | None:
    words = (word for word in _words(text) if word not in self._ids)
    return next((f"'{word}'{nearest(word, self._ids)}" for word in words), None)

  def decode(self, ids: Iterable[int]) -> str:
    return " ".join(filter(None, (self._words[i] for i in self._content(ids))))


class BytePairTokenizer(TextTokenizer):
  """Byte pairs as in CLIP (Radford et al. 2021, section 2.4; Sennrich et al. 2016).

  Ids are the 256 bytes, the 256 bytes at the end of a word, the merges in order, start and end; with CLIP's
  48,894 merges the last two are 49,406 and 49,407. Text is NFC-normalised and lower-cased, and repeated white
  space is collapsed, as in `transformers.CLIPTokenizer` without ftfy. All ids after the first end id are
  padding. In a text, "!" is a word even if it is the padding token, as when the models were trained
  (transformers treats it as padding).

  A text cannot contain the start or the end: prompts with the name of one are refused, and in the captions of
  data it is spelled like any other word. In transformers, the name would end the text.

  Args:
    merges: pairs of pieces to join, the most frequent first.
    padding: the padding token, a piece or a special token; the original uses "!", whose id is 0.
    clean: whether texts are first repaired by ftfy and their HTML entities replaced, as for the training of
      CLIP and OpenCLIP.

  Raises:
    UserError: if a pair joins a piece that no earlier pair makes, the padding token does not exist, or
      `clean` needs ftfy.
  """

  def __init__(self, merges: Sequence[tuple[str, str]], padding: str = "!", *, clean: bool = False):
    self._clean = _open_cleaning() if clean else str
    alphabet = _byte_alphabet()
    self._bytes = {char: byte for byte, char in alphabet.items()}
    self._pieces = [*alphabet.values(), *(char + _WORD_END for char in alphabet.values())]
    self._ids = {piece: i for i, piece in enumerate(self._pieces)}
    for first, second in merges:
      if first not in self._ids or second not in self._ids or first + second in self._ids:
        raise UserError(f"the merge '{first} {second}' is repeated or joins unknown pieces: check the file")
      self._ids[first + second] = len(self._pieces)
      self._pieces.append(first + second)
    self._alphabet = alphabet
    self._ranks = {pair: rank for rank, pair in enumerate(merges)}
    self.start_id = len(self._pieces)
    self.end_id = self.start_id + 1
    self.vocabulary_size = self.start_id + 2
    if padding not in self.vocabulary:
      raise UserError(f"the padding '{padding}' is not a token of this vocabulary: check the folder")
    self.padding_id = self.vocabulary[padding]
    self._word_ids = functools.lru_cache(65_536)(self._merge)

  def encode(self, text: str) -> list[int]:
    text = " ".join(unicodedata.normalize("NFC", self._clean(text)).split()).lower()
    return [i for word in _clip_words(text) for i in self._word_ids(word)]

  def unknown(self, text: str) -> str | None:
    special = (name for name in (_START, _END) if name in text.lower())
    return next((f"'{name}', which marks an end of the text: remove it" for name in special), None)

  def decode(self, ids: Iterable[int]) -> str:
    words = "".join(self._pieces[i] for i in self._content(ids)).split(_WORD_END)
    decoded = (bytes(self._bytes[char] for char in word) for word in words)
    return b" ".join(decoded).decode(errors="replace").strip()

  @property
  def vocabulary(self) -> dict[str, int]:
    """The id of each token, including special ones."""
    return self._ids | {_START: self.start_id, _END: self.end_id}

  def _merge(self, word: str) -> tuple[int, ...]:
    """Joins all occurrences of the pair of lowest rank until no pair has a rank."""
    pieces = [self._alphabet[byte] for byte in word.encode()]
    pieces[-1] += _WORD_END
    while len(pieces) > 1:
      best = min(itertools.pairwise(pieces), key=lambda pair: self._ranks.get(pair, len(self._ranks)))
      if best not in self._ranks:
        break
      joined: list[str] = []
      for piece in pieces:
        # A piece that was just joined is longer than best[0], so it is not joined again.
        if joined and (joined[-1], piece) == best:
          joined[-1] += piece
        else:
          joined.append(piece)
      pieces = joined
    return tuple(self._ids[piece] for piece in pieces)


def local_files(spec: str) -> fields.Files | None:
  """The files of a tokenizer, see `open_text_tokenizer`; None for the words of a list."""
  kind, _, path = spec.partition(":")
  if kind == "list":
    return None
  folder = epath.Path(os.path.expanduser(path))
  names = tuple(name for name in _FILES if (folder / name).exists()) if folder.is_dir() else ("",)
  return fields.Files(path, names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captions:
  """How a model reads texts.

  Attributes:
    text_tokenizer: see `open_text_tokenizer`.
    length: the number of ids in a caption, including special ones.
  """

  text_tokenizer: str = fields.local_files(find=local_files, was="tokenizer")
  length: int

  def __post_init__(self):
    check_at_least(self, 2, "length")

  @functools.cached_property
  def opened(self) -> TextTokenizer:
    """The tokenizer."""
    return open_text_tokenizer(self.text_tokenizer)

  def word(self, word: str) -> int:
    """The id of a word.

    Raises:
      UserError: if it is out-of-vocabulary, or more than one word.
    """
    ids = self.opened.encode(word)
    if len(ids) != 1 or self.opened.unknown(word):
      raise UserError(f"'{word}' is not a single word of the tokenizer {self.text_tokenizer}: give another")
    return ids[0]

  def read(self, prompts: Sequence[str]) -> np.ndarray:
    """The ids of prompts, int32 [b, length].

    Raises:
      UserError: if a prompt is too long or has an out-of-vocabulary word.
    """
    for prompt in prompts:
      unknown = self.opened.unknown(prompt)
      if unknown is not None:
        raise UserError(f"the prompt '{prompt}' has the out-of-vocabulary word {unknown}")
      found, most = len(self.opened.encode(prompt)), self.length - 2
      if found > most:
        raise UserError(
          f"the prompt '{prompt}' has {found} words (or pieces of them): shorten it, this model reads {most}"
        )
    return np.stack([self.opened(prompt, self.length) for prompt in prompts])


def open_text_tokenizer(spec: str) -> TextTokenizer:
  """Opens a tokenizer.

  Args:
    spec: "list:a red fox", the words themselves; "words:/path/words.txt", a file with one word per line; or
      "bpe:/path", CLIP's `bpe_simple_vocab_16e6.txt.gz` or a folder with `vocab.json` and `merges.txt` (or
      with `tokenizer.json`), and with `tokenizer_config.json` or `special_tokens_map.json` if padding differs
      from the original's; or "bpe_clean:/path", the same with texts cleaned as for CLIP's training, which
      needs the extra `text`.

  Raises:
    UserError: if there is no such tokenizer, its files are missing or malformed, or ftfy is not installed.
  """
  kind, _, path = spec.partition(":")
  openers: dict[str, Callable[[str], TextTokenizer]] = {
    "list": _open_list,
    "words": _open_words,
    BYTE_PAIRS: _open_byte_pairs,
    CLEAN_BYTE_PAIRS: functools.partial(_open_byte_pairs, clean=True),
  }
  if kind not in openers:
    raise UserError(f"tokenizer '{spec}' is unknown{nearest(kind, openers)}")
  if not path:
    form = "list:some words" if kind == "list" else f"{kind}:/path"
    raise UserError(f"tokenizer '{spec}' is malformed: write it as '{form}'")
  try:
    return openers[kind](path)
  except UserError as error:
    raise UserError(f"tokenizer '{spec}': {error}") from error
  except (EOFError, ValueError, gzip.BadGzipFile, zlib.error) as error:
    raise UserError(f"tokenizer '{spec}' is damaged ({error}): copy it again") from error
  except OSError as error:
    raise UserError(f"tokenizer '{spec}' cannot be read ({error}): check the path") from error


def _open_list(words: str) -> WordTokenizer:
  return WordTokenizer(words.split())


def _open_words(file: str) -> WordTokenizer:
  return WordTokenizer(epath.Path(os.path.expanduser(file)).read_text(encoding="utf-8").split())


def _open_byte_pairs(folder: str, clean: bool = False) -> BytePairTokenizer:
  path = epath.Path(os.path.expanduser(folder))
  if not path.is_dir():
    return BytePairTokenizer(_read_merges(path), clean=clean)
  merges = path / "merges.txt"
  if merges.exists() or not (path / "tokenizer.json").exists():
    vocabulary, pairs = _read_object(path / "vocab.json"), _read_merges(merges)
  else:
    saved = _read_object(path / "tokenizer.json").get("model", {})
    pairs = [_pair(merge) for merge in saved.get("merges", ())]
    vocabulary = saved.get("vocab", {})
  tokenizer = BytePairTokenizer(pairs, _read_padding(path), clean=clean)
  if vocabulary != tokenizer.vocabulary:
    raise UserError("its vocabulary does not have CLIP's ids: give the folder of a CLIP tokenizer")
  return tokenizer


def _open_cleaning() -> Callable[[str], str]:
  """The cleaning of texts for CLIP's and OpenCLIP's training."""
  try:
    from ftfy import fix_text
  except ImportError:
    raise UserError(
      "cleaning texts needs ftfy, which is not installed: pip install 'maskgen[text]'"
    ) from None
  return lambda text: html.unescape(html.unescape(fix_text(text)))


def _read_object(path: epath.Path) -> dict[str, Any]:
  content = json.loads(path.read_text(encoding="utf-8"))
  if not isinstance(content, dict):
    raise ValueError(f"{path.name} does not contain a JSON object")
  return content


def _read_padding(path: epath.Path) -> str:
  """The padding token that the files name, by default the end, as in `transformers`."""
  for file in (path / name for name in _PADDING_FILES):
    padding = _read_object(file).get("pad_token") if file.exists() else None
    if padding:
      return padding if isinstance(padding, str) else padding["content"]
  return _END


def _read_merges(path: epath.Path) -> list[tuple[str, str]]:
  data = path.read_bytes()
  lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode().split("\n")
  if "#version" in lines[0]:
    lines = lines[1:]
  return [_pair(line) for line in filter(None, lines[:_CLIP_MERGES])]


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
  pieces = merge.split(" ") if isinstance(merge, str) else merge
  if len(pieces) != 2:
    raise UserError(f"'{merge}' in the merges is not a pair of pieces: check the file")
  return pieces[0], pieces[1]


def _words(text: str) -> list[str]:
  return re.findall(r"[^\W_]+|[^\w\s]|_", text.lower())


def _clip_words(text: str) -> Iterator[str]:
  r"""Yields contractions, runs of \p{L}, single \p{N}, and runs of the rest, as CLIP splits a text."""
  for run in re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W_]+|(?:[^\w\s]|_)+", text):
    for is_number, characters in itertools.groupby(run, lambda c: unicodedata.category(c)[0] == "N"):
      if is_number:
        yield from characters
      else:
        yield "".join(characters)


def _byte_alphabet() -> dict[int, str]:
  """A visible character for each byte: printable Latin-1 bytes first, as themselves, then the others."""
  printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
  others = [byte for byte in range(256) if byte not in printable]
  return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
