"""Shared by all entry points: command-line arguments, logging and error reporting."""

import argparse
import contextlib
import difflib
import logging
import os
import re
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from etils import epath

from maskgen import plugins
from maskgen.config import MAX_SEED, check_seed
from maskgen.errors import UserError, is_permanent, lost_process, storage_errors

EXIT_TIMEOUT = 10.0


class Parser(argparse.ArgumentParser):
  """An argument parser that prints its example verbatim and accepts no abbreviations.

  A value that begins with `~` is a path in a home folder: shells do not expand it in `--flag=~/path`.
  """

  def __init__(self, description: str, example: str):
    super().__init__(
      description=description,
      epilog=f"example:\n  {example}",
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    self._given: Sequence[str] = ()

  def add_model(self, help: str, default: str | None = None) -> None:  # noqa: A002  (argparse's name)
    """Adds `--model`, the folder or name of a model, and `--trust_code`, which lets code in it run."""
    required = default is None
    self.add_argument(
      "--model",
      required=required,
      default=default,
      help=f"{help}; or a name of maskgen.available(), or hf://owner/name@revision",
    )
    self.add_argument("--trust_code", action="store_true", help="run the code in the model's folder")

  def add_seed(self, help: str) -> None:  # noqa: A002  (argparse's name)
    """Adds `--seed`."""
    self.add_argument("--seed", type=_seed, default=0, help=help)

  def parse_known_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
    self._given = sys.argv[1:] if args is None else args
    parsed, rest = super().parse_known_args(args, *others, **options)
    for name, value in vars(parsed).items():
      setattr(parsed, name, [*map(_at_home, value)] if isinstance(value, list) else _at_home(value))
    if getattr(parsed, "trust_code", False):
      plugins.trust(parsed.model)
    return parsed, rest

  def error(self, message: str):
    if re.match("unrecognized|the following .* required", message):
      message += self._suggestions()
    raise UserError(f"{message} (see --help)")

  def _suggestions(self) -> str:
    """The end of a message, with the nearest flag that is not given for each one that does not exist."""
    known = self._option_string_actions.keys()
    given = {arg.partition("=")[0] for arg in self._given if arg.startswith("--")}
    text = ""
    for flag in sorted(given - known):
      close = difflib.get_close_matches(flag, known - given, n=1, cutoff=0.8)
      if close and not flag.startswith("--config."):
        text += f"; did you mean {close[0]} instead of {flag}?"
    return text


def _at_home(value: Any) -> Any:
  return os.path.expanduser(value) if isinstance(value, str) else value


def _seed(text: str) -> int:
  try:
    check_seed("seed", number := int(text))
  except ValueError:
    raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 to {MAX_SEED}") from None
  return number


def check_out(path: str, flag: str = "out", kind: str = ".png") -> None:
  """Checks before long work that a file can be written.

  Raises:
    UserError: if not.
  """
  folder = epath.Path(path).parent
  if not path.endswith(kind):
    raise UserError(f"--{flag}={path}: give the name of a {kind} file")
  if epath.Path(path).is_dir():
    raise UserError(f"--{flag}={path} is a folder: give the name of a {kind} file")
  if not folder.is_dir():
    raise UserError(f"--{flag}={path}: the folder {folder} does not exist, create it first")
  if not writable(folder):
    raise UserError(f"--{flag}={path}: the folder {folder} is not writable, give another")


def check_out_folder(path: str, flag: str = "out", *, new: bool = False) -> None:
  """Checks before long work that a folder can be created or written, and if it is to be new, holds nothing.

  Raises:
    UserError: if not.
  """
  folder = epath.Path(path)
  if not path or (folder.exists() and not folder.is_dir()) or not writable(folder):
    raise UserError(f"--{flag}={path}: it is not a writable folder, give another")
  if new and folder.exists() and any(folder.iterdir()):
    raise UserError(f"--{flag}={path} is not an empty folder: give a new one")


def writable(folder: epath.Path) -> bool:
  """Whether a local folder can be created or written; stores are not checked."""
  if "://" not in str(folder):
    try:
      probe(folder)
    except OSError as error:
      if not is_permanent(error):
        raise
      return False
  return True


def probe(folder: epath.Path) -> None:
  """Writes and removes a file in the nearest existing ancestor of a folder; in stores all folders exist.

  Raises:
    OSError: if that fails; permissions do not tell, as root has all of them.
  """
  if "://" not in str(folder):
    with contextlib.suppress(FileNotFoundError):
      os.lstat(folder)  # its name may be too long
  while "://" not in str(folder) and not folder.exists():
    folder = folder.parent
  file = folder / f".writable-{uuid.uuid4().hex}"
  file.write_text("")
  file.unlink()


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs an entry point: a `UserError` becomes one line on stderr and its exit status.

  A process that fails exits within `EXIT_TIMEOUT` seconds: JAX would make it wait for the other processes of
  the run at exit, while they may wait for it elsewhere.
  """
  # Silence other libraries before they are imported.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  logging.basicConfig(
    level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
  )
  logging.getLogger("maskgen").setLevel(logging.INFO)
  # Orbax warns about requested behaviour such as read-only access; asyncio repeats the errors of each array.
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  for handler in logging.getLogger().handlers:
    handler.addFilter(lambda record: record.name != "absl" or record.levelno >= logging.ERROR)
  try:
    with storage_errors():
      main(sys.argv[1:])
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    _end(error.status)
  except KeyboardInterrupt:
    sys.exit(130)
  except BrokenPipeError:  # a reader such as `head` has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)
  except Exception as error:
    if lost := lost_process(error):
      print(f"error: {lost}", file=sys.stderr)
      _end(lost.status)
    traceback.print_exc()
    _end(1)


def _end(status: int) -> NoReturn:
  sys.unraisablehook = lambda _: None  # errors of libraries at exit add no information
  timer = threading.Timer(EXIT_TIMEOUT, os._exit, [status])
  timer.daemon = True
  timer.start()
  sys.exit(status)
