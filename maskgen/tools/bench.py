"""Measures speed: python -m maskgen.tools.bench step --config=configs/quickstart.py"""

import importlib
import json
from collections.abc import Sequence

from maskgen import cli
from maskgen.training import cpu

BENCHMARKS = {
  "step": "seconds per training step, and the share of the matmul peak that it uses",
  "sample": "generated images per second",
  "input": "images per second of the training pipeline",
  "tokens": "seconds per step with live and with cached tokens",
  "speedrun": "seconds until training reaches a fixed quality on the digits",
  "accelerator": "the most important of these, in a few minutes on an accelerator",
  "reference": "seconds per step and per generated batch, compared with LTH14/mage",
  "evaluate": "pictures per second of FID and its family, compared with torch-fidelity",
}


def main(argv: Sequence[str]) -> None:
  """Parses the command line, runs a benchmark, and prints each result as a line of JSON."""
  parser = cli.Parser(
    "Runs a benchmark and prints its results as lines of JSON; each benchmark has its own --help.\n"
    + "".join(f"\n  {name:<11} {what}" for name, what in BENCHMARKS.items()),
    "python -m maskgen.tools.bench step --config=configs/quickstart.py",
  )
  parser.add_argument("benchmark", choices=BENCHMARKS, help="what to measure")
  name = parser.parse_args(argv[:1]).benchmark
  for result in importlib.import_module(f"maskgen.benchmarks.{name}").main(argv[1:]):
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
  cpu.use_large_pages()
  cli.run(main)
