"""Images per second of the training pipeline, compared with a hand-written loop."""

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from maskgen import cli
from maskgen import config as config_lib
from maskgen.benchmarks import common

log = logging.getLogger("maskgen")


def main(argv: Sequence[str]) -> Iterator[dict[str, Any]]:
  """Parses the command line and measures.

  Raises:
    UserError: if the config is wrong, or its preprocessing has no counterpart in the hand-written loop.
  """
  parser = cli.Parser(
    "Measures images per second on this host, alternating between the training pipeline of a config, a "
    "minimal hand-written tf.data loop over the same pictures, and decoding alone.",
    "python -m maskgen.tools.bench input --config=configs/quickstart.py --seconds=2 --rounds=5",
  )
  common.add_config(parser)
  parser.add_argument("--seconds", type=float, default=10.0, help="how long to measure each in each round")
  parser.add_argument("--rounds", type=int, default=3, help="number of rounds; medians count")
  args, config = common.parse(parser, argv)
  common.check_at_least(args, 1, "rounds")
  common.check_at_least(args, 0, "seconds")

  from maskgen.benchmarks.handwritten import Handwritten
  from maskgen.data.pipeline import Data

  batch_size = config["batch_size"]
  data = config_lib.build_dataclass(
    Data,
    config["data"],
    "config.data",
    batch_size=batch_size,
    seed=config["seed"],
    process_index=0,
    process_count=1,
  )
  loop = Handwritten(data.source, data.split, data.preprocess)
  log.info("%s | %s | batches of %d", data.source, data.preprocess, batch_size)
  log.info("measuring for %.0f s", 3 * 1.25 * args.seconds * args.rounds)
  measured = common.items_per_second(
    {
      "pipeline": data.train_batches,
      "handwritten": lambda: loop.batches(batch_size),
      "decode": lambda: loop.decodings(batch_size),
    },
    batch_size,
    args.seconds,
    args.rounds,
  )
  for name, rates in measured.items():
    log.info("%-12s %8.0f images/s", name, np.median(rates))
  result: dict[str, Any] = {
    f"{name}_images_per_second": float(np.median(rates)) for name, rates in measured.items()
  }
  result |= common.ratios(measured["pipeline"], measured["handwritten"])
  yield result | {
    "cores": os.cpu_count(),
    "source": data.source,
    "preprocess": data.preprocess,
    "batch_size": batch_size,
  }
