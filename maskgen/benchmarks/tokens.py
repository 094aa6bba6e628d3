"""The speed-up by cached codes: the time of a training step with and without the tokenizer's encoder."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from maskgen import cli
from maskgen.benchmarks import common

log = logging.getLogger("maskgen")


def main(argv: Sequence[str]) -> Iterator[dict[str, Any]]:
  """Parses the command line and measures.

  Raises:
    UserError: if the config is wrong, or its objective cannot be trained on codes.
  """
  parser = cli.Parser(
    "Measures seconds per training step on random data, alternating between images that are tokenized in the "
    "step and cached codes. 'ratio' is live to cached.",
    "python -m maskgen.tools.bench tokens --config=configs/mage_base.py --batch_size=64",
  )
  common.add_config(parser)
  parser.add_argument("--batch_size", type=int, help="examples per step, by default the config's")
  parser.add_argument("--steps", type=int, default=3, help="number of steps of each; medians count")
  args, config = common.parse(parser, argv)
  common.check_at_least(args, 1, "steps")
  if args.batch_size is not None:
    common.check_at_least(args, 1, "batch_size")
    config["batch_size"] = args.batch_size

  import jax

  from maskgen.benchmarks import dataless, devices
  from maskgen.benchmarks.model_flops import model_flops

  experiment = dataless.build(config, "tokens")
  batches = {
    "live": dataless.random_batch(experiment, "synthetic"),
    "cached": dataless.random_batch(experiment, "tokens"),
  }
  compiled = {}
  for name, batch in batches.items():
    log.info("compiling the step, %s", name)
    compiled[name] = experiment.compile(batch)
  log.info("initialising random parameters")
  state, frozen = dataless.random_state(experiment)

  def step(name: str) -> Callable[[], None]:
    def run() -> None:
      nonlocal state
      state, metrics = compiled[name](state, frozen, batches[name])
      jax.block_until_ready((state, metrics))

    return run

  steps = {name: step(name) for name in batches}
  common.seconds_per_call(steps, 1)  # to warm up
  times = common.seconds_per_call(steps, args.steps)
  codes = batches["cached"]["tokens"]
  per_million = 1_000_000 * codes.shape[1] * codes.dtype.itemsize
  for crops in (1, 10):
    log.info("a cache of %d crops takes %.3g GB per million images", crops, crops * per_million / 1e9)
  result: dict[str, Any] = {}
  for name, values in times.items():
    flops = model_flops(experiment, batches[name])
    log.info("%-6s %.3g s per step, %.3g GFLOP", name, np.median(values), flops / 1e9)
    result |= {f"{name}_seconds_per_step": float(np.median(values)), f"{name}_flops_per_step": flops}
  yield (
    result
    | common.ratios(times["live"], times["cached"])
    | devices.describe()
    | {
      "batch_size": config["batch_size"],
      "tokens": codes.shape[1],
      "code_dtype": codes.dtype.name,
      "bytes_per_million_images_per_crop": per_million,
      "bytes_per_million_images_10_crops": 10 * per_million,
    }
  )
