"""The speed of generation."""

import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from maskgen import cli
from maskgen.benchmarks import common
from maskgen.errors import UserError

log = logging.getLogger("maskgen")


def main(argv: Sequence[str]) -> Iterator[dict[str, Any]]:
  """Parses the command line and measures, one batch size after the other.

  Raises:
    UserError: if the config is wrong, a batch does not divide over the devices or does not fit, or the
      objective does not generate.
  """
  parser = cli.Parser(
    "Measures image generation on the devices of this machine: compilation, seconds per batch, images per "
    "second, memory. Weights are random, so no trained model is needed. Prints one line per batch size; "
    "size 1 measures the latency of one image. With --reuse, also one line for each such `reuse`, alternated "
    "with the full evaluation that it is compared with.",
    "python -m maskgen.tools.bench sample --config=configs/mage_base.py --batch_size=1,64",
  )
  common.add_config(parser)
  common.add_batch_sizes(parser)
  parser.add_argument("--sampling_steps", type=int, help="decoding steps, by default the config's")
  parser.add_argument("--reuse", help="steps from one full evaluation to the next, such as 2,4")
  parser.add_argument("--repeats", type=int, default=5, help="batches to measure, after a first one")
  args, config = common.parse(parser, argv)
  common.check_at_least(args, 1, "repeats")
  if args.sampling_steps is not None:
    common.check_at_least(args, 1, "sampling_steps")
  sizes, reuses = common.batch_sizes(args, config), []
  if args.reuse is not None:
    values = args.reuse.split(",")
    if not all(value.isdecimal() and int(value) for value in values):
      raise UserError(f"--reuse={args.reuse}: give numbers of at least 1, such as 2 or 2,4")
    reuses = sorted({1, *map(int, values)})

  import jax

  from maskgen import processes
  from maskgen.benchmarks import devices

  processes.start(None, None, None)
  for size in sizes:
    with devices.enough_memory(size):
      one = config | {"batch_size": size, "accumulation": 1}
      results = measure(one, args.sampling_steps, args.repeats, reuses)
    if jax.process_index() == 0:
      yield from ({"config": args.config, "stage": args.stage} | result for result in results)


def measure(
  config: Mapping[str, Any], sampling_steps: int | None, repeats: int, reuses: Sequence[int]
) -> list[dict[str, Any]]:
  """Measures one batch size.

  Args:
    config: the plain config.
    sampling_steps: decoding steps, by default the config's.
    repeats: the number of batches to measure.
    reuses: values of the option `reuse`; none for models without it.

  Returns:
    A result for each value of `reuse`.

  Raises:
    UserError: if the objective does not generate.
  """
  import jax

  from maskgen import objectives, sharding
  from maskgen.benchmarks import dataless, devices
  from maskgen.costs import flops

  experiment = dataless.build(config)
  objective: Any = experiment.objective
  generate_fn: Any = experiment.predict.get("generate")
  if generate_fn is None:
    raise UserError(
      f"objective '{config['objective']['name']}' does not generate: give a config, or a --stage, with "
      "objective 'mage'"
    )
  size = experiment.config.batch_size
  shared = {} if sampling_steps is None else {"steps": sampling_steps}
  variants = {reuse: shared | {"reuse": reuse} for reuse in reuses} or {1: shared}
  for options in variants.values():
    objectives.check_sampling(objective, options)
  variables = dataless.random_tree(experiment.targets["state"].variables(experiment.targets["frozen"]))
  split = jax.jit(jax.random.split, static_argnums=1, out_shardings=sharding.batch_sharding(experiment.mesh))
  batch = {"key": split(jax.random.key(0), size)}
  plain: Any = objective.predict_fns()["generate"]
  compile_seconds, functions, counts = {}, {}, {}
  for reuse, options in variants.items():
    log.info("batches of %d, reuse %d: compiling", size, reuse)
    counts[reuse] = flops.count(functools.partial(plain, **options), variables, batch, jax.random.key(0))
    began = time.monotonic()
    chosen = jax.jit(functools.partial(generate_fn, **options))
    compiled = chosen.lower(variables, batch, jax.random.key(0)).compile()
    compile_seconds[reuse] = time.monotonic() - began

    def generate(compiled: Any = compiled) -> None:
      jax.block_until_ready(compiled(variables, batch, jax.random.key(0)))

    generate()
    functions[f"reuse {reuse}"] = generate
  seconds = common.seconds_per_call(functions, repeats)
  results = []
  for reuse in variants:
    own = seconds[f"reuse {reuse}"]
    result = common.spread("batch_seconds", own)
    log.info("batches of %d, reuse %d: %.3g s", size, reuse, result["batch_seconds"])
    if reuse > 1:
      result |= {"reuse": reuse} | common.ratios(seconds["reuse 1"], own)
    results.append(
      devices.describe()
      | {
        "batch_size": size,
        "sampling_steps": sampling_steps or objective.sampling.steps,
        "dtype": common.compute_dtype(objective),
        "compile_seconds": compile_seconds[reuse],
        "model_flops_per_image": counts[reuse] / size,
        "images_per_second": size / result["batch_seconds"],
      }
      | result
      | devices.peak_memory()
    )
  return results
