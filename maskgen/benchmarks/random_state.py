"""A run without its data and pretrained models, to measure how fast it is."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from maskgen import objectives
from maskgen.experiment import Experiment
from maskgen.state import TrainState


def without_data(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a config with synthetic pictures of the right shape in place of its data, and no evaluations."""
  height, width, channels = objectives.build(config["objective"]).image_shape
  preprocess = f"decode({channels})|resize(({height}, {width}))"
  data = {"source": "synthetic", "preprocess": preprocess, "eval_preprocess": preprocess}
  return {**config, "data": data, "evals": {}}


def random_state(experiment: Experiment) -> tuple[TrainState, Any]:
  """Returns (state, frozen) with small random parameters, each where it belongs."""
  rng = np.random.default_rng(0)

  def random(leaf: Any) -> jax.Array:
    values = rng.standard_normal(leaf.shape, np.float32)
    return jax.device_put((0.02 * values).astype(leaf.dtype), leaf.sharding)

  def zeros(leaf: Any) -> jax.Array:
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)

  target = experiment.targets["state"]
  state = jax.tree.map(zeros, target.replace(params=None))
  state = state.replace(params=jax.tree.map(random, target.params))
  return state, jax.tree.map(random, experiment.targets["frozen"])
