"""Measures speed: python -m maskgen.tools.bench input --config=configs/quickstart.py"""

import importlib
import json
from collections.abc import Sequence

from maskgen import cli

BENCHMARKS = {
  "input": "images per second of the training pipeline",
  "tokens": "seconds per step with live and with cached tokens",
}


def main(argv: Sequence[str]) -> None:
  """Parses the command line, measures, and prints one line of JSON."""
  parser = cli.Parser(
    "Measures one thing and prints it as a line of JSON; each benchmark has its own --help.\n"
    + "".join(f"\n  {name:<8} {what}" for name, what in BENCHMARKS.items()),
    "python -m maskgen.tools.bench input --config=configs/quickstart.py",
  )
  parser.add_argument("benchmark", choices=BENCHMARKS, help="what to measure")
  name = parser.parse_args(argv[:1]).benchmark
  print(json.dumps(importlib.import_module(f"maskgen.benchmarks.{name}").main(argv[1:])))


if __name__ == "__main__":
  cli.run(main)
