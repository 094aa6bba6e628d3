"""What benchmarks share: flags, the config, and alternated time measurements."""

import argparse
import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from maskgen import cli, main
from maskgen.errors import UserError

# Calls that take longer are logged.
_SECONDS_TO_LOG = 2.0
log = logging.getLogger("maskgen")


def add_config(parser: cli.Parser) -> None:
  """Adds the flags that `parse` reads."""
  parser.add_argument("--config", required=True, help="config file, FILE[:key=value,...]")
  parser.add_argument("--stage", help="which stage of the config, by default the last")
  parser.add_argument(
    "--checkpoint",
    help="a workdir, export or converted model whose sizes replace those of the config's",
  )


def parse(parser: cli.Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
  """Parses flags and `--config.KEY=VALUE`.

  Returns:
    The flags, with the name of the chosen stage, if any, as `stage`; and the plain config of that stage.

  Raises:
    UserError: if a flag or the config is wrong.
  """
  args, rest = parser.parse_known_args(argv)
  overrides = main.parse_overrides(rest)
  args.stage, config = main.choose_stage(args.config, overrides, args.stage, args.checkpoint)
  return args, config


def add_batch_sizes(parser: cli.Parser) -> None:
  """Adds the flag that `batch_sizes` reads."""
  parser.add_argument(
    "--batch_size", help="examples per batch, or several such as 8,16; by default the config's"
  )


def batch_sizes(args: argparse.Namespace, config: Mapping[str, Any]) -> list[int]:
  """The batch sizes to measure, in increasing order, so that each has its own peak of memory.

  Raises:
    UserError: if they are not numbers of at least 1.
  """
  if args.batch_size is None:
    return [config["batch_size"]]
  sizes = args.batch_size.split(",")
  if not all(size.isdecimal() and int(size) for size in sizes):
    raise UserError(f"--batch_size={args.batch_size}: give numbers of at least 1, such as 8 or 8,16")
  return sorted({int(size) for size in sizes})


def compute_dtype(objective: Any) -> str:
  """The type in which an objective's main network computes."""
  networks = [objective, *(getattr(objective, name, None) for name in ("unet", "tokenizer"))]
  if hasattr(objective, "image_encoder"):
    networks.append(objective.image_encoder.encoder.network)
  return next(network.dtype for network in networks if hasattr(network, "dtype"))


def check_at_least(args: argparse.Namespace, least: int, *names: str) -> None:
  """Checks flags that are numbers.

  Raises:
    UserError: naming a flag that is less than `least`.
  """
  for name in names:
    if not getattr(args, name) >= least:
      raise UserError(f"--{name}={getattr(args, name)}: give at least {least}")


def items_per_second(
  make: Mapping[str, Callable[[], Generator[Any]]], size: int, seconds: float, rounds: int
) -> dict[str, np.ndarray]:
  """Measures endless iterators alternately, so that other load on the machine affects all of them equally.

  Each turn makes a new iterator: one that waited for its turn would have prefetched elements.

  Args:
    make: makes the iterators to measure, by name.
    size: items per element.
    seconds: how long to measure each in each round, after a warm-up of a quarter of that time.
    rounds: the number of rounds.

  Returns:
    Items per second [rounds], by name.
  """
  rates: dict[str, list[float]] = {name: [] for name in make}
  for number in range(rounds):
    for name in make:
      with contextlib.closing(make[name]()) as iterator:
        _pull(iterator, seconds / 4)
        count, elapsed = _pull(iterator, seconds)
      rates[name].append(count * size / elapsed)
    log.info("round %d | %s", number + 1, " | ".join(f"{name} {rates[name][-1]:.0f}/s" for name in make))
  return {name: np.array(values) for name, values in rates.items()}


def _pull(iterator: Iterator[Any], seconds: float) -> tuple[int, float]:
  """Skips one element and takes at least one more for some time; returns their number and the time."""
  next(iterator)  # the first one waits for tracing
  began, count = time.monotonic(), 0
  while count == 0 or time.monotonic() - began < seconds:
    next(iterator)
    count += 1
  return count, time.monotonic() - began


def seconds_per_call(functions: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, np.ndarray]:
  """Calls functions alternately; returns seconds [rounds], by name."""
  times: dict[str, list[float]] = {name: [] for name in functions}
  for _ in range(rounds):
    for name, function in functions.items():
      began = time.monotonic()
      function()
      times[name].append(time.monotonic() - began)
      if times[name][-1] > _SECONDS_TO_LOG:
        log.info("%s: %.1f s", name, times[name][-1])
  return {name: np.array(values) for name, values in times.items()}


def seconds_in_a_row(start: Callable[[], Any], warmup: int, count: int) -> np.ndarray:
  """Measures steps with the next one always queued while one runs, as in training.

  Args:
    start: starts a step and returns its results, which need not be ready.
    warmup: the number of steps that do not count.
    count: the number of steps that count.

  Returns:
    Seconds from the end of one step to the end of the next, [count].
  """
  import jax

  ends = []
  under_way = start()
  for _ in range(warmup + count):
    following = start()
    jax.block_until_ready(under_way)
    ends.append(time.perf_counter())
    under_way = following
  jax.block_until_ready(under_way)
  ends.append(time.perf_counter())
  return np.diff(ends)[warmup:]


def spread(name: str, values: np.ndarray) -> dict[str, float]:
  """The median, minimum and maximum of measurements [n]."""
  return {
    name: float(np.median(values)),
    f"{name}_min": float(values.min()),
    f"{name}_max": float(values.max()),
  }


def ratios(values: np.ndarray, others: np.ndarray) -> dict[str, float]:
  """The ratio of two [rounds] measurements' medians, and the extremes of the ratios in single rounds."""
  single = values / others
  ratio = float(np.median(values) / np.median(others))
  return {"ratio": ratio, "ratio_min": float(single.min()), "ratio_max": float(single.max())}
