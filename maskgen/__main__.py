"""All commands under one name: `maskgen COMMAND ...`, or `python -m maskgen COMMAND ...`."""

import ast
import pathlib
import runpy
import sys
from collections.abc import Sequence

from maskgen import cli
from maskgen.errors import UserError, nearest

_TRAIN = "train"


def find_commands() -> dict[str, pathlib.Path]:
  """The file of each command by name: `train` is `maskgen.main`, the others are of `maskgen.tools`."""
  package = pathlib.Path(__file__).parent
  tools = {path.stem: path for path in sorted((package / "tools").glob("*.py"))}
  return {_TRAIN: package / "main.py"} | {
    name: path for name, path in tools.items() if '__name__ == "__main__"' in path.read_text()
  }


def main(argv: Sequence[str]) -> None:
  """Runs the command that the first argument names with the other arguments.

  Raises:
    UserError: if there is no such command.
  """
  commands = find_commands()
  if not argv or argv[0] in ("-h", "--help"):
    print("usage: maskgen COMMAND ...\n")
    for name, path in commands.items():
      print(f"  {name:<16} {summary(path)}")
    print("\nmaskgen COMMAND --help describes a command and gives an example.")
    return
  name, *rest = argv
  if name not in commands:
    raise UserError(f"command '{name}' does not exist{nearest(name, commands)} (see maskgen --help)")
  module = "maskgen.main" if name == _TRAIN else f"maskgen.tools.{name}"
  sys.argv = [f"maskgen {name}", *rest]  # the name in its help
  runpy.run_module(module, run_name="__main__")


def summary(path: pathlib.Path) -> str:
  """What a file's docstring says first, without the command."""
  first = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]
  return first.split(": python -m")[0].rstrip(".")


def run() -> None:
  """The console script."""
  cli.run(main)


if __name__ == "__main__":
  run()
