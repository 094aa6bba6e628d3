"""A config of two stages that trains in seconds, and a run of it that many tests share.

This is also a config file: `--config=tests/tiny.py:steps=8`, or one stage: `:only=tokenizer`.
"""

import dataclasses
import fcntl
import multiprocessing
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np
import pytest

from maskgen import config as config_lib
from maskgen import main, tree
from maskgen.config import parse_arg
from maskgen.numerics.sampling import MaskedSampling
from maskgen.numerics.text import Captions


@dataclasses.dataclass(frozen=True)
class FakeObjective:
  """What evaluators ask an objective for; `tokens` are those of an image among words."""

  codebook_size: int = 0
  num_classes: int = 0
  captions: Captions | None = None
  tokens: int = 0
  sampling: Any = MaskedSampling()
  image_shape: tuple[int, int, int] = (8, 8, 3)


def record_calls(predict: dict[str, Any]) -> set[Any]:
  """Wraps prediction functions so that they record their calls as (name, shapes, options) in the result."""
  calls: set[Any] = set()

  def recording(name, fn):
    def call(variables, batch, rng, **options):
      shapes = tuple(sorted((key, tuple(leaf.shape), str(leaf.dtype)) for key, leaf in batch.items()))
      calls.add((name, shapes, tuple(sorted(options.items()))))
      return fn(variables, batch, rng, **options)

    return call

  predict.update({name: recording(name, fn) for name, fn in predict.items()})
  return calls


FILE = str(pathlib.Path(__file__))
STAGES = ("tokenizer", "mage")
SIZE = (16, 16)
CODES = 32
TOKENS = 16


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = parse_arg(arg, only="", steps=6, save_steps=4, log_every_steps=3)
  common = dict(
    seed=0,
    batch_size=8,
    total_steps=args.steps,
    log_every_steps=args.log_every_steps,
    checkpoint=dict(save_steps=args.save_steps, save_minutes=60.0, keep=3),
    data=dict(
      source="synthetic",
      preprocess="decode(3)|resize(16)|pad(1)|random_crop(16)",
      eval_preprocess="decode(3)|resize(16)",
    ),
    mesh=dict(data=-1, fsdp=1, tensor=1),
  )
  network = dict(
    channels=8,
    multipliers=(1, 1),
    strides=(4,),
    blocks=1,
    norm_groups=4,
    codebook_size=CODES,
    code_width=4,
    image_channels=3,
  )
  stages = ml_collections.ConfigDict()
  stages.tokenizer = dict(
    **common,
    objective=dict(
      name="tokenizer",
      image_size=SIZE,
      tokenizer=network,
      discriminator=dict(channels=4, max_channels=4, blocks=1),
      revive_weight=1.0,
    ),
    optimizer=dict(
      generator=dict(learning_rate=1e-3, warmup_steps=2),
      discriminator=dict(learning_rate=1e-3, schedule="constant"),
    ),
    ema=dict(generator=0.9),
    evals=dict(reconstruction=dict(type="reconstruction", every_steps=4)),
  )
  stages.mage = dict(
    **common,
    pretrained=dict(tokenizer="stage:tokenizer"),
    objective=dict(
      name="mage",
      image_size=SIZE,
      tokenizer=network,
      width=16,
      depth=1,
      heads=2,
      decoder_width=16,
      decoder_depth=1,
      decoder_heads=2,
      dropout=0.1,
      sampling=dict(steps=3, schedule="cosine", temperature=4.0),
    ),
    optimizer=dict(main=dict(learning_rate=1e-3, warmup_steps=2, weight_decay=0.05, clip_norm=1.0)),
    ema=dict(main=0.9),
    evals=dict(
      validation=dict(type="loss", every_steps=4),
      samples=dict(type="samples", every_steps=100, num_generated=8, num_examples=4),
    ),
  )
  if args.only:
    return stages[args.only]
  return ml_collections.ConfigDict(dict(stages=STAGES, **stages))


def stage(name: str, arg: str = "", **overrides: str) -> dict:
  """The plain config of one stage; `overrides` are texts, with `__` for a dot."""
  given = {key.replace("__", "."): value for key, value in overrides.items()}
  return config_lib.to_dict(config_lib.load(f"{FILE}:only={name},{arg}", given))


def assert_same_bits(a, b) -> None:
  """Asserts that two trees have the same names, dtypes, shapes and bytes."""
  a, b = tree.flatten(a), tree.flatten(b)
  assert a.keys() == b.keys()
  for name in a:
    left, right = np.asarray(a[name]), np.asarray(b[name])
    assert (left.dtype, left.shape) == (right.dtype, right.shape), name
    assert left.tobytes() == right.tobytes(), name


def free_port() -> int:
  """An unused port of this machine."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


# Compiles as the tests do; the process chooses the number of its devices.
XLA_FLAGS = os.environ.get("XLA_FLAGS", "").replace("--xla_force_host_platform_device_count=8", "")


def python(*arguments: str, env: dict[str, str] | None = None, **options) -> subprocess.Popen:
  """Starts Python as a user would, with the tests' compile cache and devices unless `env` says else."""
  path = {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  return subprocess.Popen(
    [sys.executable, *arguments], env=os.environ | path | (env or {}), **pipes | options
  )


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
  ["tensorflow", "maskgen.training.experiment", "maskgen.training.train", "maskgen.report"]
)


def fork(fn: Callable[..., Any], *arguments: Any) -> multiprocessing.process.BaseProcess:
  """Calls a function in a new process: a copy of one that has imported what a run needs, and no more."""
  process = _FORKS.Process(target=fn, args=arguments, daemon=True)
  process.start()
  return process


def shared_folder(factory: pytest.TempPathFactory, name: str) -> pathlib.Path:
  """A folder of this session of pytest that its workers share."""
  root = factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    root = root.parent
  (root / name).mkdir(exist_ok=True)
  return root / name


# A test module takes it with `trained = tiny.trained`; it is trained once, whoever asks first.
@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A finished run, not to be changed: `trained / "tokenizer"` and `trained / "mage"` are models."""
  folder = shared_folder(tmp_path_factory, "tiny")
  root = folder / "run"
  with open(folder / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (root / "results.json").exists():
      main.main([f"--config={FILE}", f"--workdir={root}"])
  return root
