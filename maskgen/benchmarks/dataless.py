"""A run without data and pretrained models, to measure its speed."""

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from maskgen import objectives, sharding
from maskgen.errors import UserError
from maskgen.numerics.text import Captions
from maskgen.training.experiment import Experiment
from maskgen.training.state import TrainState

# The content of a batch: random images, random codes, or the output of the config's own pipeline.
SOURCES = ("synthetic", "tokens", "config")
_INPUTS = {"synthetic": "image", "tokens": "tokens"}
_Spec = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class NoData:
  """What an `Experiment` needs from its data before reading any, without TensorFlow.

  Attributes:
    objective: the objective that the data would be for.
    num_train: the number of records, for lengths in epochs.
  """

  objective: objectives.Objective
  num_train: int = 1_000_000

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return self.objective.image_shape

  @property
  def class_names(self) -> tuple[str, ...] | None:
    return tuple(map(str, range(self.objective.batch_spec().num_classes))) or None

  @property
  def lacks(self) -> dict[str, str]:
    return {}

  @property
  def captions(self) -> Captions | None:
    return self.objective.batch_spec().captions

  @property
  def codes(self) -> None:
    return None

  @property
  def spec(self) -> _Spec:
    """Shapes and dtypes of a batch of one image."""
    return self.objective.batch_spec().shapes(1)


def build(
  config: Mapping[str, Any], source: str = "synthetic", devices: Sequence[jax.Device] | None = None
) -> Experiment:
  """Builds the experiment of a plain config of one stage, without evaluations.

  Args:
    config: the config.
    source: one of `SOURCES`; only "config" opens the config's data, which imports TensorFlow.
    devices: see `Experiment`.

  Raises:
    UserError: if the config is wrong, or the objective does not support the source.
  """
  objective = objectives.build(config["objective"])
  if source == "tokens" and "tokens" not in objective.batch_spec().inputs:
    raise UserError(
      f"objective '{config['objective']['name']}' is not trained on codes: give a config, or a --stage, with "
      "objective 'mage'"
    )
  data = None if source == "config" else NoData(objective)
  return Experiment({**config, "evals": {}}, devices, data=data)


def batch_spec(experiment: Experiment, source: str) -> _Spec:
  """Shapes, dtypes and shardings of a global training batch; nothing is allocated.

  Args:
    experiment: from `build`.
    source: one of `SOURCES`.

  Returns:
    For "synthetic" and "tokens" the objective's `batch_spec`, with images or cached codes; for "config" the
    output of the config's pipeline.
  """
  if source == "config":
    spec = experiment.data.spec
  else:
    spec = experiment.objective.batch_spec().shapes(experiment.config.batch_size, _INPUTS[source])
  where = sharding.batch_sharding(experiment.mesh)
  return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where) for name, leaf in spec.items()}


def random_batch(experiment: Experiment, source: str) -> dict[str, jax.Array]:
  """Makes a sharded global batch of `batch_spec`, for "synthetic" or "tokens"."""
  spec = batch_spec(experiment, source)
  arrays = experiment.objective.batch_spec().arrays(_INPUTS[source])

  def make(key: jax.Array) -> dict[str, jax.Array]:
    return {
      name: jax.random.randint(key, leaf.shape, 0, arrays[name].below).astype(leaf.dtype)
      for name, leaf in spec.items()
    }

  where = {name: leaf.sharding for name, leaf in spec.items()}
  return jax.jit(make, out_shardings=where)(jax.random.key(0))


def batches(experiment: Experiment, source: str) -> Generator[Mapping[str, jax.Array]]:
  """Endless global training batches: one random batch repeated, or the config's own."""
  if source == "config":
    yield from experiment.train_batches(0)
  batch = random_batch(experiment, source)
  while True:
    yield batch


def random_tree(targets: Any) -> Any:
  """Small random arrays for a tree of shapes, with their shardings."""
  rng = np.random.default_rng(0)

  def random(leaf: Any) -> jax.Array:
    values = rng.standard_normal(leaf.shape, np.float32)
    return jax.device_put((0.02 * values).astype(leaf.dtype), leaf.sharding)

  return jax.tree.map(random, targets)


def random_state(experiment: Experiment) -> tuple[TrainState, Any]:
  """Returns (state, frozen) with small random parameters, with their shardings."""

  def zeros(leaf: Any) -> jax.Array:
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)

  target = experiment.targets["state"]
  state = jax.tree.map(zeros, target.replace(params=None))
  return state.replace(params=random_tree(target.params)), random_tree(experiment.targets["frozen"])
