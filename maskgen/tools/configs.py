"""Lists the configs that come with maskgen, with their arguments: python -m maskgen.tools.configs"""

import ast
import pathlib
import re
from collections.abc import Sequence

from maskgen import cli
from maskgen import config as config_lib


def main(argv: Sequence[str]) -> None:
  """Prints the name, the first line and the arguments of each config."""
  parser = cli.Parser(
    "Lists the configs that come with maskgen: what each trains, and its arguments after a colon.",
    "python -m maskgen.tools.configs",
  )
  parser.parse_args(argv)
  for file in config_lib.shipped():
    first, arguments = describe(file)
    print(f"{file.name}\n  {first}\n  {' '.join(arguments)}")


def describe(file: pathlib.Path) -> tuple[str, list[str]]:
  """The first line of a config's docstring, and the arguments that it lists, such as ":tiny"."""
  text = ast.get_docstring(ast.parse(file.read_text())) or ""
  arguments = [
    name for line in re.findall(r"^  (:\w+(?:, :\w+)*)  ", text, re.MULTILINE) for name in line.split(", ")
  ]
  if of := re.search(r"^Arguments: those of (\w+\.py)", text, re.MULTILINE):
    arguments = describe(file.with_name(of[1]))[1]
  return text.split("\n")[0], arguments


if __name__ == "__main__":
  cli.run(main)
