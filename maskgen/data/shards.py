"""Patterns for many files, such as `train-{000..099}.tar`."""

import collections
import concurrent.futures
import os
import re

from maskgen.data.cpu_tf import tf
from maskgen.errors import UserError

_THREADS = 16


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
    UserError: if braces contain anything else, or a range is decreasing.
  """
  match = re.search(r"\{(.*?)\}", pattern)
  if not match:
    return [pattern]
  choices = match[1].split(",")
  if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
    padded = any(len(bound) > 1 and bound.startswith("0") for bound in bounds.groups())
    width = max(map(len, bounds.groups())) if padded else 0
    choices = [f"{number:0{width}}" for number in range(int(bounds[1]), int(bounds[2]) + 1)]
  if not choices or "{" in match[1] or (len(choices) == 1 and not bounds):
    raise UserError(f"'{match[0]}' of '{pattern}' is malformed: write {{000..099}}, {{a,b}} or {{split}}")
  before, after = pattern[: match.start()], pattern[match.end() :]
  return [path for choice in choices for path in expand_braces(f"{before}{choice}{after}")]


def _matches(path: str) -> list[str]:
  """Returns the path itself if it is a file, else the files that match it."""
  if "://" not in path and os.path.isfile(path):
    return [path]
  try:
    if tf.io.gfile.exists(path):
      return [] if tf.io.gfile.isdir(path) else [path]
    return sorted(tf.io.gfile.glob(path)) if re.search(r"[*?[]", path) else []
  except tf.errors.OpError as error:
    raise UserError(f"'{path}' cannot be read: {error.message or type(error).__name__}") from error
