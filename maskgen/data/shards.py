"""Patterns for many files, such as `train-{000..099}.tar`."""

import collections
import concurrent.futures
import itertools
import math
import os
import re

from maskgen.data.cpu_tf import tf
from maskgen.errors import UserError

_THREADS = 16
# Checking whether they exist takes seconds.
_MOST_FILES = 250_000


def shard_paths(pattern: str, split: str) -> list[str]:
  """Expands a pattern to the files it matches, all of which exist.

  `{split}` stands for the name of the split, `{000..099}` for each number of a range (zero-padded as
  written) and `{a,b}` for each of these texts; then `*`, `?` and `[a-z]` match file names as in a shell.

  Raises:
    UserError: if the pattern is malformed, files are missing, or nothing matches.
  """
  paths = expand_braces(os.path.expanduser(pattern.replace("{split}", split)))
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as executor:
    found = list(executor.map(_matches, paths))
  missing = [path for path, matches in zip(paths, found, strict=True) if not matches]
  if missing:
    rest = f" and {len(missing) - 1} more of the {len(paths)} files" if len(missing) > 1 else ""
    raise UserError(f"'{missing[0]}'{rest} of '{pattern}' cannot be found: check the path and the range")
  result = [path for matches in found for path in matches]
  if repeated := [path for path, count in collections.Counter(result).items() if count > 1]:
    raise UserError(f"'{pattern}' names '{repeated[0]}' twice: name each file once")
  return result


def expand_braces(pattern: str) -> list[str]:
  """Expands `{000..099}` and `{a,b}` in a pattern; the leftmost changes slowest.

  Raises:
    UserError: if braces contain anything else, a range is decreasing, or there are too many names.
  """
  parts = re.split(r"(\{.*?\})", pattern)  # at odd indices those in braces
  choices = [_choices(part, pattern) if i % 2 else [part] for i, part in enumerate(parts)]
  _check_count(math.prod(map(len, choices)), pattern)
  return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(braces: str, pattern: str) -> list[str]:
  """Expands `{000..099}` or `{a,b}`, a part of a pattern."""
  inner = braces[1:-1]
  choices = inner.split(",")
  if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
    padded = any(len(bound) > 1 and bound.startswith("0") for bound in bounds.groups())
    width = max(map(len, bounds.groups())) if padded else 0
    first, last = map(int, bounds.groups())
    _check_count(last - first + 1, pattern)
    choices = [f"{number:0{width}}" for number in range(first, last + 1)]
  if not choices or "{" in inner or (len(choices) == 1 and not bounds):
    raise UserError(f"'{braces}' of '{pattern}' is malformed: write {{000..099}}, {{a,b}} or {{split}}")
  return choices


def _check_count(count: int, pattern: str) -> None:
  if count > _MOST_FILES:
    raise UserError(f"'{pattern}' names {count:,} files: name at most {_MOST_FILES:,}")


def _matches(path: str) -> list[str]:
  """Returns the path itself if it is a file, else the files that match it."""
  if "://" not in path and os.path.isfile(path):
    return [path]
  try:
    if tf.io.gfile.exists(path):
      found = [] if tf.io.gfile.isdir(path) else [path]
    else:
      found = sorted(tf.io.gfile.glob(path)) if re.search(r"[*?[]", path) else []
  except tf.errors.OpError as error:
    raise UserError(f"'{path}' cannot be read: {error.message or type(error).__name__}") from error
  return found if "://" in path else [name for name in found if os.path.isfile(name)]  # no named pipes
