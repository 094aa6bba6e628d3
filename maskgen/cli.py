"""What all entry points share: arguments, logging, and errors that a user can act on."""

import argparse
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from etils import epath

from maskgen import plugins
from maskgen.errors import UserError, of_storage

PATIENCE = 10.0


class Parser(argparse.ArgumentParser):
  """An argument parser that shows its example as written and takes no abbreviations."""

  def __init__(self, description: str, example: str):
    super().__init__(
      description=description,
      epilog=f"example:\n  {example}",
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )

  def add_model(self, help: str) -> None:  # noqa: A002  (argparse's name)
    """Adds `--model`, the folder of a trained model, and whether code in it may run."""
    self.add_argument("--model", required=True, help=help)
    self.add_argument(
      "--trust_code", action="store_true", help="run the code that lies in the model's folder"
    )

  def parse_known_args(self, *args: Any, **options: Any) -> Any:
    parsed, rest = super().parse_known_args(*args, **options)
    if getattr(parsed, "trust_code", False):
      plugins.trust(parsed.model)
    return parsed, rest

  def error(self, message: str):
    raise UserError(f"{message} (see --help)")


def check_out(path: str, flag: str = "out", kind: str = ".png") -> None:
  """Checks that a file can be written, before long work.

  Raises:
    UserError: if not.
  """
  folder = epath.Path(path).parent
  if not path.endswith(kind):
    raise UserError(f"--{flag}={path}: give the name of a {kind} file")
  if not folder.is_dir():
    raise UserError(f"--{flag}={path}: the folder {folder} does not exist, make it first")
  if not writable(folder):
    raise UserError(f"--{flag}={path}: the folder {folder} is not writable, give another")


def writable(folder: epath.Path) -> bool:
  """Whether a local folder can be made or written; a store is taken at its word."""
  if "://" in str(folder):
    return True
  folder = nearest_existing(folder)
  return folder.is_dir() and os.access(folder, os.W_OK)


def nearest_existing(folder: epath.Path) -> epath.Path:
  """A local folder or the nearest one above it that exists; a store has no folders, and all exist."""
  while "://" not in str(folder) and not folder.exists():
    folder = folder.parent
  return folder


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs an entry point: a `UserError` becomes one line on stderr and its exit status.

  A process that fails ends within `PATIENCE` seconds: JAX would let it meet the other processes of the run
  before, and they may wait for it elsewhere.
  """
  # Quiet libraries that are not ours, before they are imported.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  logging.basicConfig(
    level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
  )
  logging.getLogger("maskgen").setLevel(logging.INFO)
  # Orbax warns of what it was told to do, such as to read only, and asyncio repeats an error of each array.
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  for handler in logging.getLogger().handlers:
    handler.addFilter(lambda record: record.name != "absl" or record.levelno >= logging.ERROR)
  try:
    with of_storage():
      main(sys.argv[1:])
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    _end(error.status)
  except KeyboardInterrupt:
    sys.exit(130)
  except Exception:
    traceback.print_exc()
    _end(1)


def _end(status: int) -> NoReturn:
  sys.unraisablehook = lambda _: None  # what libraries leave behind says nothing new
  timer = threading.Timer(PATIENCE, os._exit, [status])
  timer.daemon = True
  timer.start()
  sys.exit(status)
