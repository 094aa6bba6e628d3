"""Tables of labels or captions: .csv files next to the pictures."""

import csv
import dataclasses
import functools
import io
import os
import posixpath
from collections.abc import Iterable, Sequence

import numpy as np

from maskgen.data.cpu_tf import tf
from maskgen.errors import UserError


@dataclasses.dataclass(frozen=True)
class Table:
  """The rows of a table, by picture.

  Attributes:
    path: the .csv file.
    rows: for the name of each picture, the line number and text of each of its rows.
    prefix: the folder that the names are relative to, as written in the file.
  """

  path: str
  rows: dict[str, list[tuple[int, str]]]
  prefix: str = ""

  def texts(self) -> list[str]:
    """Returns the distinct texts of all rows, `in_order`."""
    return in_order({text for found in self.rows.values() for _, text in found})

  def below(self, folder: str, siblings: Sequence[str]) -> "Table":
    """Returns the rows of the pictures in `folder`, with names relative to it.

    Raises:
      UserError: if the picture of a row is in neither this nor a sibling folder.
    """
    rows = {}
    for name, found in self.rows.items():
      first, _, rest = name.partition("/")
      if first == folder:
        rows[rest] = found
      elif first not in siblings:
        raise self._error(found[0][0], f"'{name}' is in none of the folders {', '.join(siblings)}")
    return Table(self.path, rows, f"{folder}/")

  def one_for_each(self, names: Sequence[str]) -> list[str]:
    """Returns the text of each picture; the table must have exactly one row for each, and no others."""
    for name, found in self.rows.items():
      if len(found) > 1:
        raise self._error(
          found[1][0], f"'{self.prefix}{name}' is already listed in line {found[0][0]}: remove one"
        )
    given = self.some_for_each(names)
    missing = [name for name, texts in zip(names, given, strict=True) if not texts]
    if missing:
      raise UserError(
        f"'{self.path}' has no row for {len(missing)} of {len(names)} pictures, the first being "
        f"'{self.prefix}{missing[0]}': add rows for them"
      )
    return [texts[0] for texts in given]

  def some_for_each(self, names: Sequence[str]) -> list[list[str]]:
    """Returns the texts of each picture, none without a row; the table must have rows for no others."""
    known = set(names)
    for name, found in self.rows.items():
      if name not in known:
        raise self._error(
          found[0][0], f"there is no picture '{self.prefix}{name}': remove the row or add the picture"
        )
    return [[text for _, text in self.rows.get(name, ())] for name in names]

  def _error(self, line: int, problem: str) -> UserError:
    return UserError(f"'{self.path}', line {line}: {problem}")


def in_order(names: Iterable[str]) -> list[str]:
  """Sorts names of classes: as numbers if all of them are whole numbers, else as texts."""
  names = sorted(names)
  if all(name.isascii() and name.isdecimal() for name in names):
    names.sort(key=int)
  return names


def read_table(path: str, column: str) -> Table:
  """Reads a table with the columns `file` and `column`, in UTF-8 (with a byte order mark or without).

  Raises:
    UserError: if the file cannot be read, is empty, or has a wrong header, row or character.
  """
  table = Table(path, {})
  try:
    with tf.io.gfile.GFile(os.fsencode(path), "rb") as file:
      content = file.read()
  except (OSError, tf.errors.OpError) as error:
    raise UserError(f"'{path}' cannot be read: check that it is a file, and its permissions") from error
  try:
    text = content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = content[: error.start].count(b"\n") + 1
    raise table._error(line, "this is not UTF-8: save the table in that encoding") from error
  reader = csv.reader(io.StringIO(text, newline=""), strict=True)
  try:
    header = [cell.strip() for cell in next(reader, [])]
    if header != ["file", column]:
      raise table._error(1, f"the header is '{','.join(header)}': write 'file,{column}'")
    for row in filter(None, reader):
      if len(row) != 2 or not row[0] or not row[1].strip():
        problem = f"{len(row)} columns" if len(row) != 2 else "an empty column"
        raise table._error(
          reader.line_num, f"there is {problem} instead of 'file,{column}': quote texts that contain commas"
        )
      # A row may span several lines: this is the last.
      table.rows.setdefault(posixpath.normpath(row[0]), []).append((reader.line_num, row[1].strip()))
  except csv.Error as error:
    raise table._error(reader.line_num, f"this is not a row of a .csv file ({error})") from error
  if not table.rows:
    raise table._error(1, "the table is empty: add a row for each picture")
  return table


# A graph even in eager execution, so that errors are always `tf.errors`.
@functools.partial(tf.function, autograph=False)
def text_lines(text: tf.Tensor) -> tf.Tensor:
  """Returns the lines of a UTF-8 text, strings [k], stripped and without blank ones.

  Invalid UTF-8 and k = 0 raise `tf.errors`, as for a damaged record, if the lines are used.
  """
  # Unlike assertions, this does not run where nothing reads the lines.
  return tf.ensure_shape(tf.numpy_function(_split, [text], tf.string, stateful=False), [None])


def _split(text: bytes) -> np.ndarray:
  try:
    lines = [line.strip().encode() for line in text.decode("utf-8-sig").split("\n")]
  except UnicodeDecodeError:
    raise ValueError("its caption is not UTF-8 text") from None
  if not any(lines):
    raise ValueError("its caption is empty")
  return np.array([line for line in lines if line], object)
