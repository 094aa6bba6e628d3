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
  "accelerator": "what matters of all of these, on an accelerator that is at hand for minutes",
  "reference": "seconds per step and per generated batch, beside LTH14/mage",
  "evaluate": "pictures per second of FID and its family, beside torch-fidelity",
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
