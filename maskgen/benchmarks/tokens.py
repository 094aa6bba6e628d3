"""What cached codes save: the time of a training step with and without the tokenizer's encoder."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from maskgen import cli
from maskgen.benchmarks import common
from maskgen.errors import UserError

log = logging.getLogger("maskgen")


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Parses the command line and measures.

  Raises:
    UserError: if the config is wrong, or its objective cannot be trained on codes.
  """
  parser = cli.Parser(
    "Measures seconds per training step on random data, with images tokenized as they come and with cached "
    "codes, in turns. 'ratio' is live to cached.",
    "python -m maskgen.tools.bench tokens --config=configs/mage_base.py --batch_size=64",
  )
  common.add_config(parser)
  parser.add_argument("--batch_size", type=int, help="examples per step, by default the config's")
  parser.add_argument("--steps", type=int, default=3, help="how many steps of each, whose medians count")
  args, config = common.parse(parser, argv)
  common.check_at_least(args, 1, "steps")
  if args.batch_size is not None:
    common.check_at_least(args, 1, "batch_size")
    config["batch_size"] = args.batch_size

  import jax
  import jax.numpy as jnp

  from maskgen import objectives, sharding
  from maskgen.benchmarks.random_state import random_state, without_data
  from maskgen.experiment import Experiment

  objective = objectives.build(config["objective"])
  if not {"image", "tokens"} <= set(objective.inputs):
    raise UserError(
      f"objective '{config['objective']['name']}' is not trained on codes: give a config, or a --stage, with "
      "objective 'mage'"
    )
  experiment = Experiment(without_data(config))
  size, num_codes = experiment.config.batch_size, objective.codebook_size
  images = np.random.default_rng(0).integers(0, 256, (size, *objective.image_shape), np.uint8)
  encode = objective.predict_fns()["encode"]
  variables = experiment.targets["state"].variables(experiment.targets["frozen"])
  shape = jax.eval_shape(encode, variables, {"image": jnp.asarray(images)}, jax.random.key(0)).shape
  code = np.min_scalar_type(num_codes - 1)
  codes = np.random.default_rng(1).integers(0, num_codes, shape).astype(code)
  where = sharding.batch_sharding(experiment.mesh)
  batches = {
    "live": {"image": jax.device_put(images, where)},
    "cached": {"tokens": jax.device_put(codes, where)},
  }

  compiled = {}
  for name, batch in batches.items():
    log.info("compiling the step, %s", name)
    target = experiment.targets
    compiled[name] = experiment.update.lower(target["state"], target["frozen"], batch).compile()
  log.info("making random parameters")
  state, frozen = random_state(experiment)

  def step(name: str) -> Callable[[], None]:
    def run() -> None:
      nonlocal state
      state, metrics = compiled[name](state, frozen, batches[name])
      jax.block_until_ready((state, metrics))

    return run

  steps = {name: step(name) for name in batches}
  common.seconds_per_call(steps, 1)  # to warm up
  times = common.seconds_per_call(steps, args.steps)
  per_million = 1_000_000 * shape[1] * code.itemsize
  for crops in (1, 10):
    log.info("a cache of %d crops takes %.3g GB per million images", crops, crops * per_million / 1e9)
  result: dict[str, Any] = {}
  for name, values in times.items():
    flops = float((compiled[name].cost_analysis() or {}).get("flops", 0.0))
    log.info("%-6s %.3g s per step, %.3g GFLOP", name, np.median(values), flops / 1e9)
    result |= {f"{name}_seconds_per_step": float(np.median(values)), f"{name}_flops_per_step": flops}
  return (
    result
    | common.ratios(times["live"], times["cached"])
    | {
      "batch_size": size,
      "tokens": shape[1],
      "code_dtype": code.name,
      "bytes_per_million_images_per_crop": per_million,
      "bytes_per_million_images_10_crops": 10 * per_million,
      "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
  )
