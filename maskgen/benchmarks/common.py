"""What benchmarks share: their config, and time measured in turns."""

import argparse
import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from maskgen import cli, main
from maskgen import config as config_lib
from maskgen.errors import UserError, nearest
from maskgen.training.sections import find_type

# Calls that take longer are progress to speak of.
_SECONDS_TO_LOG = 2.0
log = logging.getLogger("maskgen")


def add_config(parser: cli.Parser) -> None:
  """Adds the flags that `parse` reads."""
  parser.add_argument("--config", required=True, help="config file, FILE[:key=value,...]")
  parser.add_argument("--stage", help="which stage of the config, by default the last")


def parse(parser: cli.Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
  """Parses flags and `--config.KEY=VALUE`.

  Returns:
    The flags, `stage` being the one that was chosen, if there are any; and the plain config of that stage.

  Raises:
    UserError: if one of them is wrong.
  """
  args, rest = parser.parse_known_args(argv)
  config = config_lib.to_dict(config_lib.load(args.config, main.parse_overrides(rest), find_type))
  config = main.complete(config)
  if args.stage is not None and "stages" not in config:
    raise UserError(f"--stage={args.stage}: {args.config} has no stages, remove the flag")
  stages = {path.name: stage for path, stage in main.split_stages(config, epath.Path("run")).items()}
  name = args.stage if args.stage is not None else list(stages)[-1]
  if name not in stages:
    raise UserError(f"--stage={name}: {args.config} has no such stage{nearest(name, stages)}")
  args.stage = name if "stages" in config else None
  return args, stages[name]


def add_batch_sizes(parser: cli.Parser) -> None:
  """Adds the flag that `batch_sizes` reads."""
  parser.add_argument(
    "--batch_size", help="examples per batch, or several such as 8,16; by default the config's"
  )


def batch_sizes(args: argparse.Namespace, config: Mapping[str, Any]) -> list[int]:
  """The batch sizes to measure, rising, since the memory in use is known by its peak alone.

  Raises:
    UserError: if they are no numbers of at least 1.
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
    UserError: naming the one that is less than `least`.
  """
  for name in names:
    if not getattr(args, name) >= least:
      raise UserError(f"--{name}={getattr(args, name)}: give at least {least}")


def items_per_second(
  make: Mapping[str, Callable[[], Generator[Any]]], size: int, seconds: float, rounds: int
) -> dict[str, np.ndarray]:
  """Measures endless iterators in turns, so that what else the machine does falls on all alike.

  Each turn has an iterator of its own: one that waited for its turn would have work done in advance.

  Args:
    make: what to measure, by name.
    size: items per element.
    seconds: how long to measure each in each round, after a quarter as long to get going.
    rounds: how many rounds.

  Returns:
    For each name [rounds].
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
  """After one more, takes elements for some time, at least one; returns how many and how long it took."""
  next(iterator)  # the first one waits for graphs
  began, count = time.monotonic(), 0
  while count == 0 or time.monotonic() - began < seconds:
    next(iterator)
    count += 1
  return count, time.monotonic() - began


def seconds_per_call(functions: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, np.ndarray]:
  """Calls functions in turns; for each name [rounds]."""
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
  """Measures work of which the next piece is always queued while one is under way, as in training.

  Args:
    start: starts a piece and returns its results, which need not be there yet.
    warmup: how many pieces do not count.
    count: how many do.

  Returns:
    From the end of one piece to the end of the next, [count].
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
  """The median of measurements [n], the least and the greatest."""
  return {
    name: float(np.median(values)),
    f"{name}_min": float(values.min()),
    f"{name}_max": float(values.max()),
  }


def ratios(values: np.ndarray, others: np.ndarray) -> dict[str, float]:
  """The ratio of the medians of two [rounds], and the least and the greatest of those of single rounds."""
  single = values / others
  ratio = float(np.median(values) / np.median(others))
  return {"ratio": ratio, "ratio_min": float(single.min()), "ratio_max": float(single.max())}
