"""A classifier of pictures that an evaluation trains from scratch, on the devices."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from maskgen import images as images_lib
from maskgen.evaluators.batches import put
from maskgen.models.resnet import Classifier

# Pictures per step, rounded up to a multiple of the number of devices.
_BATCH = 64
_LEARNING_RATE, _WEIGHT_DECAY = 2e-3, 1e-2

# From images uint8 [n, h, w, c] to classes int32 [n].
Classify = Callable[[np.ndarray], np.ndarray]


class _Program(NamedTuple):
  """Compiled functions: the first state, a step of training, and a classification."""

  start: Callable[..., Any]
  step: Callable[..., Any]
  predict: Callable[..., jax.Array]


def train(
  images: np.ndarray, labels: np.ndarray, classes: int, *, rows: NamedSharding, steps: int, seed: int
) -> Classify:
  """Trains `models.resnet.Classifier` by AdamW with a cosine schedule, without augmentation.

  Args:
    images: uint8 [n, h, w, c], the same in every process.
    labels: integers [n] below `classes`.
    classes: the number of classes.
    rows: how a batch is placed on the devices: all of them compute.
    steps: the number of steps of 64 pictures.
    seed: of the parameters and the order of the pictures.
  """
  program = _compile(classes, steps, rows)
  size = -(-_BATCH // rows.mesh.size) * rows.mesh.size
  rng = np.random.default_rng(seed)
  epochs = -(-steps * size // len(images))
  order = np.concatenate([rng.permutation(len(images)) for _ in range(epochs)])[: steps * size]
  state = program.start(seed, put(images[order[:size]], rows))
  for chosen in order.reshape(steps, size):
    batch = put(images[chosen], rows), put(labels[chosen].astype(np.int32), rows)
    state = jax.block_until_ready(program.step(state, *batch))

  def classify(images: np.ndarray) -> np.ndarray:
    batches = _padded(images, size)
    found = [np.asarray(program.predict(state[0], put(batch, rows)))[:count] for batch, count in batches]
    return np.concatenate(found)

  return classify


@functools.lru_cache(maxsize=4)
def _compile(classes: int, steps: int, rows: NamedSharding) -> _Program:
  network, everywhere = Classifier(classes), NamedSharding(rows.mesh, PartitionSpec())
  schedule = optax.cosine_decay_schedule(_LEARNING_RATE, steps)
  optimizer = optax.adamw(schedule, weight_decay=_WEIGHT_DECAY)

  def logits(params: Any, images: jax.Array) -> jax.Array:
    found: Any = network.apply({"params": params}, images_lib.to_float(images))
    return found

  def start(seed: int, images: jax.Array) -> Any:
    params = network.init(jax.random.key(seed), images_lib.to_float(images[:1]))["params"]
    return params, optimizer.init(params)

  def step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
    def loss(params: Any) -> jax.Array:
      return optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels).mean()

    params, moments = state
    updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
    return optax.apply_updates(params, updates), moments

  def predict(params: Any, images: jax.Array) -> jax.Array:
    return logits(params, images).argmax(axis=-1)

  return _Program(
    jax.jit(start, out_shardings=everywhere),
    jax.jit(step, out_shardings=everywhere, donate_argnums=0),
    jax.jit(predict, out_shardings=everywhere),
  )


def _padded(images: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
  """Batches of one size, and how many of their pictures are not padding."""
  for first in range(0, len(images), size):
    batch = images[first : first + size]
    yield np.concatenate([batch, np.repeat(batch[:1], size - len(batch), axis=0)]), len(batch)
