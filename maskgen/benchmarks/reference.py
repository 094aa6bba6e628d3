"""The speed of MAGE beside that of LTH14/mage, alternated."""

import argparse
import json
import logging
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from maskgen import cli
from maskgen.benchmarks import common, recipes
from maskgen.config import fields
from maskgen.errors import UserError

TASKS = ("live", "tokens", "sample")
_WORKER = pathlib.Path(__file__).with_name("reference_worker.py")
# 32 pixels, where the paper's networks have 256.
_SMALL = dict(
  image_size=[32, 32],
  tokenizer=dict(channels=32, multipliers=[1, 2, 2], strides=[2, 2], code_width=64),
  width=192,
  depth=6,
  heads=6,
  decoder_width=192,
  decoder_depth=4,
  decoder_heads=6,
)
_SIZES: dict[str, tuple[str, dict[str, Any]]] = {
  "small": ("mage_base", _SMALL),
  "base": ("mage_base", {}),
  "large": ("mage_large", {}),
}
log = logging.getLogger("maskgen")


class Taken(NamedTuple):
  """The mean time of a step: by the clock, and of all cores together."""

  seconds: float
  cpu_seconds: float


def add_folder(parser: cli.Parser, *, required: bool) -> None:
  """Adds the flags that `check_folder` checks."""
  parser.add_argument(
    "--reference", required=required, help="a checkout of github.com/LTH14/mage to compare with"
  )
  parser.add_argument("--python", default=sys.executable, help="a Python with PyTorch, by default this one")


def check_folder(args: argparse.Namespace) -> None:
  """Checks `--reference` and `--python`.

  Raises:
    UserError: if the folder is no such checkout, or the Python lacks a package.
  """
  if not (pathlib.Path(args.reference) / "models_mage.py").is_file():
    raise UserError(f"--reference={args.reference} has no models_mage.py: give a checkout of LTH14/mage")
  code = "import einops, numpy, scipy, torch, yaml"
  try:
    found = subprocess.run(
      [args.python, "-c", code], capture_output=True, text=True, check=False, env=_environment()
    )
  except OSError as error:
    raise UserError(
      f"--python={args.python} does not run ({error.strerror}): give a Python with PyTorch"
    ) from error
  if found.returncode:
    reason = (found.stderr.splitlines() or ["it fails"])[-1]
    raise UserError(f"--python={args.python} cannot run the reference ({reason}): install it there")


def _environment() -> dict[str, str]:
  # Threads that wait actively would take cores from whom they alternate with.
  return {"OMP_WAIT_POLICY": "PASSIVE"} | {
    key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"
  }


class Worker:
  """A process that takes steps of the reference.

  Attributes:
    ready: what it says of its device and precision.
  """

  def __init__(
    self,
    args: argparse.Namespace,
    size: str,
    task: str,
    batch_size: int,
    *,
    sampling_steps: int = 20,
    fast: bool = False,
  ):
    """Starts it.

    Args:
      args: flags of `add_folder`.
      size: "small", "base" or "large".
      task: one of `TASKS`.
      batch_size: examples.
      sampling_steps: decoding steps of generation.
      fast: whether GPUs use mixed precision and compile.
    """
    flags = dict(
      reference=args.reference, size=size, task=task, batch_size=batch_size, sampling_steps=sampling_steps
    )
    command = [args.python, str(_WORKER), *(f"--{key}={value}" for key, value in flags.items())]
    self._process = subprocess.Popen(
      command + ["--fast"] * fast,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=_environment(),
    )
    self.ready: dict[str, Any] = self._read()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *failure: object) -> None:
    self._process.kill()
    self._process.wait()

  def measure(self, steps: int) -> Taken:
    """Takes steps, and returns their mean time."""
    assert self._process.stdin is not None
    self._process.stdin.write(f"{steps}\n")
    self._process.stdin.flush()
    return Taken(**self._read())

  def _read(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise UserError(f"the reference failed with exit code {self._process.wait()}: see its error above")
    answer: dict[str, Any] = json.loads(line)
    return answer


def main(argv: Sequence[str]) -> Iterator[dict[str, Any]]:
  """Parses the command line and measures, one task and batch size after the other.

  Raises:
    UserError: if a flag is wrong, or the reference fails.
  """
  parser = cli.Parser(
    "Measures MAGE and LTH14/mage in turn, in two processes: a training step on images ('live') or on "
    "codes ('tokens'), or generation ('sample'), in float32 and with random weights. 'ratio' is the "
    "reference's time divided by maskgen's.",
    "python -m maskgen.tools.bench reference --reference=mage --task=live,tokens --size=base --batch_size=2",
  )
  add_folder(parser, required=True)
  parser.add_argument("--size", default="base", choices=_SIZES, help="small has 32 pixels and a width of 192")
  parser.add_argument(
    "--task", default="live", help=f"one of {', '.join(TASKS)}, or several such as live,tokens"
  )
  common.add_batch_sizes(parser)
  parser.add_argument("--sampling_steps", type=int, default=20, help="decoding steps of generation")
  parser.add_argument("--steps", type=int, default=2, help="steps, or batches, of each in each round")
  parser.add_argument("--rounds", type=int, default=3, help="number of rounds; medians count")
  args = parser.parse_args(argv)
  common.check_at_least(args, 1, "steps", "rounds", "sampling_steps")
  tasks = args.task.split(",")
  if not set(tasks) <= set(TASKS):
    raise UserError(f"--task={args.task}: give some of {', '.join(TASKS)}")
  sizes = common.batch_sizes(args, {"batch_size": 2})
  check_folder(args)

  from maskgen.training import cpu

  name, changes = _SIZES[args.size]
  config = recipes.read(name)
  exact = {"dtype": "float32", "tokenizer": {"dtype": "float32"}}
  config["objective"] = fields.merge(fields.merge(config["objective"], changes), exact)
  if "sample" not in tasks:  # loaded models generate on one device
    cpu.use_cores([config | {"batch_size": size} for size in sizes])
  for task in tasks:
    for size in sizes:
      yield {"task": task, "size": args.size, "batch_size": size} | _compare(
        config | {"batch_size": size}, task, args
      )


def _compare(config: dict[str, Any], task: str, args: argparse.Namespace) -> dict[str, Any]:
  steps = args.sampling_steps
  with Worker(args, args.size, task, config["batch_size"], sampling_steps=steps) as worker:
    step = _step(config, task, steps)

    def ours(steps: int) -> Taken:
      began, cpu = time.perf_counter(), time.process_time()
      for _ in range(steps):
        step()
      return Taken((time.perf_counter() - began) / steps, (time.process_time() - cpu) / steps)

    turns = {"maskgen": ours, "reference": worker.measure}
    taken: dict[str, list[Taken]] = {name: [] for name in turns}
    for number in range(args.rounds + 1):
      for name, measure in turns.items():
        taken[name].append(measure(args.steps if number else 1))  # round 0 is to warm up
      log.info("round %d | %s", number, " | ".join(f"{k} {v[-1].seconds:.3g} s" for k, v in taken.items()))
    seconds, cpu_seconds = (
      {name: np.array(each[1:])[:, i] for name, each in taken.items()} for i in range(2)
    )
    result = common.spread("seconds", seconds["maskgen"])
    result |= common.spread("reference_seconds", seconds["reference"])
    result |= common.ratios(seconds["reference"], seconds["maskgen"])
    for name, values in cpu_seconds.items():
      result["cpu_seconds" if name == "maskgen" else "reference_cpu_seconds"] = float(np.median(values))
    return result | worker.ready


def _step(config: dict[str, Any], task: str, sampling_steps: int) -> Callable[[], None]:
  """A function that takes one of our steps, or generates a batch."""
  import jax

  from maskgen import sharding
  from maskgen.benchmarks import dataless

  source = "tokens" if task == "tokens" else "synthetic"
  experiment = dataless.build(config, source)
  if task == "sample":
    variables = dataless.random_tree(experiment.targets["state"].variables(experiment.targets["frozen"]))
    where = sharding.batch_sharding(experiment.mesh)
    keys = jax.device_put(jax.random.split(jax.random.key(0), config["batch_size"]), where)

    def generate() -> None:
      images = experiment.predict["generate"](
        variables, {"key": keys}, jax.random.key(0), steps=sampling_steps
      )
      jax.block_until_ready(images)

    return generate
  batch = dataless.random_batch(experiment, source)
  compiled = experiment.compile(batch)
  state, frozen = dataless.random_state(experiment)

  def step() -> None:
    nonlocal state
    state, metrics = compiled(state, frozen, batch)
    jax.block_until_ready((state, metrics))

  return step
