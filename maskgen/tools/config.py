"""Prints a config as it will run: python -m maskgen.tools.config FILE"""

import json
import sys
from collections.abc import Sequence

from maskgen import cli
from maskgen import config as config_lib
from maskgen.main import parse_overrides
from maskgen.training.pretrained import complete
from maskgen.training.sections import find_type


def main(argv: Sequence[str]) -> None:
  """Prints the config, and what arguments and overrides change in it.

  Raises:
    UserError: if the config or an override is wrong.
  """
  parser = cli.Parser(
    "Prints the config that a command line means, as JSON, and on stderr what its arguments and overrides "
    "change. Any key can be set with --config.KEY=VALUE.",
    "python -m maskgen.tools.config configs/mage_base.py:size=large --config.batch_size=256",
  )
  parser.add_argument("config", metavar="FILE", help="config file, FILE[:key=value,...]")
  args, rest = parser.parse_known_args(argv)
  config = resolve(args.config, parse_overrides(rest))
  print(json.dumps(config, indent=2))
  changes = config_lib.difference(resolve(config_lib.split_path(args.config)[0], {}), config, find_type)
  if changes:
    print("differs from the config without arguments in", *changes, sep="\n  ", file=sys.stderr)


def resolve(path_and_args: str, overrides: dict[str, str]) -> dict:
  """Loads a config and fills in what pretrained models say."""
  return complete(config_lib.to_dict(config_lib.load(path_and_args, overrides, find_type)))


if __name__ == "__main__":
  cli.run(main)
