"""What to measure in a few minutes on an accelerator, the most important first."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from maskgen import cli
from maskgen.benchmarks import common, recipes, reference
from maskgen.errors import UserError

log = logging.getLogger("maskgen")


class Row(NamedTuple):
  """What one row measures.

  Attributes:
    part: "step", "sample", or "reference", a step of the reference.
    recipe: see `maskgen.benchmarks.recipes`.
    batch_size: examples.
    source: of a step, "synthetic" or "tokens".
  """

  part: str
  recipe: str
  batch_size: int
  source: str = "synthetic"


class Size(NamedTuple):
  """The networks and batch sizes to measure, of which the second comes first.

  Attributes:
    mage: batch sizes by recipe.
    vqgan: likewise, one.
    samples: batch sizes of generation, with the first recipe of `mage`.
    sampling_steps: its decoding steps.
    reuse: its option `reuse`, in turn with full evaluations.
    reference: the size of the reference, see `reference.Worker`.
  """

  mage: dict[str, tuple[int, int, int]]
  vqgan: tuple[str, int]
  samples: tuple[int, int]
  sampling_steps: int
  reuse: int
  reference: str


SIZES = {
  "paper": Size(
    mage={"mage_base": (64, 128, 256), "mage_large": (32, 64, 128)},
    vqgan=("vqgan", 16),
    samples=(1, 64),
    sampling_steps=20,
    reuse=4,
    reference="base",
  ),
  "tiny": Size(
    mage={"mage_tiny": (8, 16, 24)},
    vqgan=("vqgan_tiny", 8),
    samples=(1, 16),
    sampling_steps=4,
    reuse=2,
    reference="small",
  ),
}


def rows(size: Size, against: bool) -> list[Row]:
  """The rows in their order: each kind once, then the other batch sizes.

  Args:
    size: one of `SIZES`.
    against: whether there is a reference.
  """
  sources = ("synthetic", "tokens")
  first, others = (
    [
      Row("step", recipe, sizes[i], source)
      for i in which
      for recipe, sizes in size.mage.items()
      for source in sources
    ]
    for which in ((1,), (0, 2))
  )
  base = next(iter(size.mage))
  found = first[:2]
  if against:
    found += [Row("reference", base, size.mage[base][1], source) for source in sources]
  found += first[2:] + [Row("sample", base, number) for number in size.samples] + [Row("step", *size.vqgan)]
  return found + others


def main(argv: Sequence[str]) -> Iterator[dict[str, Any]]:
  """Parses the command line and measures.

  Raises:
    UserError: if a flag is wrong.
  """
  parser = cli.Parser(
    "Measures what matters on an accelerator within some minutes, without data, trained models, "
    "TensorFlow, clu and ml-collections: training steps of MAGE (ViT-B and ViT-L, on images and on codes, "
    "three batch sizes), generation with and without reuse, a step of the tokenizer. Prints each row once "
    "it is measured, the most important first, and starts none that would probably exceed --seconds.",
    "python -m maskgen.tools.bench accelerator --profile=/tmp/profile | tee rows.jsonl",
  )
  parser.add_argument("--size", default="paper", choices=SIZES, help="the published networks, or tiny ones")
  parser.add_argument("--seconds", type=float, default=480.0, help="how long to measure at most")
  parser.add_argument("--steps", type=int, default=10, help="steps to measure in each row")
  parser.add_argument("--profile", help="folder for a recording of more steps, with the first batch size")
  reference.add_folder(parser, required=False)
  args = parser.parse_args(argv)
  common.check_at_least(args, 1, "steps", "seconds")
  if args.profile is not None:
    cli.check_out_folder(args.profile, "profile")
  if args.reference is not None:
    reference.check_folder(args)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")  # leaves some to PyTorch

  from maskgen.benchmarks import devices

  size, began, longest = SIZES[args.size], time.monotonic(), 0.0
  planned = rows(size, args.reference is not None)
  recipe, (smallest, *_) = next(iter(size.mage.items()))
  peaks: dict[str, float] = {}
  for i, row in enumerate(planned):
    started = time.monotonic()
    if started - began + longest > args.seconds:
      yield {"left_out": [each._asdict() for each in planned[i:]]}
      return
    log.info("%d of %d: %s", i + 1, len(planned), " ".join(map(str, row)))
    try:
      with devices.enough_memory(row.batch_size):
        profile = args.profile if row == Row("step", recipe, smallest) else None
        results = _measure(row, size, args, profile, peaks)
    except Exception as error:  # whatever it is, other rows may work
      log.warning("this row fails", exc_info=not isinstance(error, UserError))
      results = [{"error": f"{type(error).__name__}: {error}"}]
    longest = max(longest, time.monotonic() - started)
    for result in results:
      yield row._asdict() | {"after_seconds": round(time.monotonic() - began, 1)} | result


def _measure(
  row: Row, size: Size, args: Any, profile: str | None, peaks: dict[str, float]
) -> list[dict[str, Any]]:
  """Measures one row; adds the peak of matrix products to `peaks` by dtype if it is not known."""
  from maskgen.benchmarks import devices, sample, step

  if row.part == "reference":
    task = "live" if row.source == "synthetic" else "tokens"
    with reference.Worker(args, size.reference, task, row.batch_size, fast=True) as worker:
      worker.measure(2)
      return [{"images_per_second": row.batch_size / worker.measure(args.steps).seconds} | worker.ready]
  config = recipes.read(row.recipe) | {"batch_size": row.batch_size, "accumulation": 1}
  if row.part == "sample":
    return sample.measure(config, size.sampling_steps, 5, (1, size.reuse))
  result = step.measure(config, row.source, args.steps, 2, profile)
  dtype = result["dtype"]
  if dtype not in peaks:  # after the step, so that its matrices do not count as the step's memory
    peaks[dtype] = devices.matmul_peak(dtype)
  return [result | devices.utilisation(result, peaks[dtype])]
