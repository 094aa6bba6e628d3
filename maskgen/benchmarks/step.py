"""The time of a training step and its model FLOPs utilisation."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from maskgen import cli
from maskgen.benchmarks import common

# The number of steps in a profile.
_PROFILED = 3
log = logging.getLogger("maskgen")


def main(argv: Sequence[str]) -> Iterator[dict[str, Any]]:
  """Parses the command line and measures, one batch size after the other.

  Raises:
    UserError: if the config is wrong, a batch does not divide over the devices or does not fit, or the
      objective does not support the source.
  """
  parser = cli.Parser(
    "Measures the training step on the devices of this machine: compilation, seconds per step, images per "
    "second, model FLOPs, their share of the matmul peak measured in the same run (MFU), memory. Weights and "
    "data are random, so no data and no trained tokenizer are needed. Prints one line per batch size.",
    "python -m maskgen.tools.bench step --config=configs/mage_base.py --batch_size=64,128",
  )
  common.add_config(parser)
  parser.add_argument(
    "--source",
    default="synthetic",
    choices=("synthetic", "tokens", "config"),
    help="random images, random codes as from a token cache, or the config's own data; by default images",
  )
  common.add_batch_sizes(parser)
  parser.add_argument("--steps", type=int, default=10, help="number of steps to measure")
  parser.add_argument("--warmup", type=int, default=2, help="number of steps before them")
  parser.add_argument("--profile", help=f"folder for a recording of {_PROFILED} more steps, for TensorBoard")
  args, config = common.parse(parser, argv)
  common.check_at_least(args, 1, "steps")
  common.check_at_least(args, 0, "warmup")
  sizes = common.batch_sizes(args, config)
  if args.profile is not None:
    cli.check_out_folder(args.profile, "profile")

  import jax

  from maskgen import processes
  from maskgen.benchmarks import devices
  from maskgen.training import cpu

  processes.start(None, None, None)
  cpu.use_cores([config | {"batch_size": size} for size in sizes])
  peak = None
  for size in sizes:
    with devices.enough_memory(size):
      result = measure(config | {"batch_size": size}, args.source, args.steps, args.warmup, args.profile)
    if peak is None:  # after the step, so that its matrices do not count as the step's memory
      log.info("measuring the peak of matrix products in %s", result["dtype"])
      peak = devices.matmul_peak(result["dtype"])
    if jax.process_index() == 0:
      names = {"config": args.config, "stage": args.stage}
      yield names | result | devices.utilisation(result, peak)


def measure(
  config: Mapping[str, Any], source: str, steps: int, warmup: int, profile: str | None = None
) -> dict[str, Any]:
  """Measures one batch size, except for what depends on the peak.

  Args:
    config: the plain config.
    source: one of `dataless.SOURCES`.
    steps: the number of steps to measure.
    warmup: the number of steps before them.
    profile: folder for a recording of more steps, or None.
  """
  import jax

  from maskgen.benchmarks import dataless, devices, recording
  from maskgen.benchmarks.model_flops import model_flops

  experiment = dataless.build(config, source)
  spec = dataless.batch_spec(experiment, source)
  size = experiment.config.batch_size
  log.info("batches of %d: counting and compiling", size)
  flops = model_flops(experiment, spec)
  began = time.monotonic()
  compiled = experiment.compile(spec)
  compile_seconds = time.monotonic() - began
  memory: Any = compiled.memory_analysis()
  state, frozen = dataless.random_state(experiment)
  batches = dataless.batches(experiment, source)

  def step() -> Any:
    nonlocal state
    state, metrics = compiled(state, frozen, next(batches))
    return metrics

  times = common.seconds_in_a_row(step, warmup, steps)
  result: dict[str, Any] = common.spread("step_seconds", times)
  log.info("batches of %d: %.3g s per step", size, result["step_seconds"])
  result |= devices.peak_memory()
  if profile:
    with jax.profiler.trace(profile):
      jax.block_until_ready([step() for _ in range(_PROFILED)])
    result["time_shares"] = recording.shares(profile, compiled.as_text() or "")
  batches.close()
  return (
    devices.describe()
    | {
      "batch_size": size,
      "source": source,
      "dtype": common.compute_dtype(experiment.objective),
      "compile_seconds": compile_seconds,
      "images_per_second": size / result["step_seconds"],
      "model_flops_per_step": flops,
      "achieved_flops_per_second": flops / result["step_seconds"],
      "argument_bytes": memory.argument_size_in_bytes,
      "temporary_bytes": memory.temp_size_in_bytes,
    }
    | result
  )
