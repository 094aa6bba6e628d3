"""A test of the objective and the op: `pytest docs/examples/colours`."""

import pathlib

import colour_mage
import jax
import numpy as np
import tint

from maskgen import config as config_lib
from maskgen import objectives
from maskgen.data.cpu_tf import tf

CONFIG = str(pathlib.Path(__file__).with_name("colour_config.py"))


def test_histograms_are_shares():
  images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
  found = colour_mage.histogram(images, 8)
  expected = [[np.histogram(image[..., c], 8, (0, 256))[0] / 16 for c in range(3)] for image in images]
  np.testing.assert_allclose(found, expected)


def test_the_head_learns_and_predicts():
  objective = objectives.build(config_lib.to_dict(config_lib.load(f"{CONFIG}:debug"))["mage"]["objective"])
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), objective.pretrained_shapes())
  parts = jax.jit(objective.init)(jax.random.key(0), zeros)
  images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)

  def loss(params):
    batch = {"image": images, "key": jax.random.split(jax.random.key(1), 2)}
    values, metrics, _ = objective.losses(
      params, parts["frozen"], {}, batch, jax.random.key(2), 0, train=True
    )
    return values["main"], metrics

  gradient, metrics = jax.jit(jax.grad(loss, has_aux=True))(parts["params"])
  assert metrics["histogram_loss"] > 0
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["main"]["histogram"]))
  predicted = objective.predict_fns()["histogram"](parts, {"image": images}, jax.random.key(0))
  np.testing.assert_allclose(predicted.sum(axis=-1), np.ones((2, 3)), rtol=1e-6)


def test_tint_moves_a_channel_as_a_whole():
  image = tf.fill([4, 4, 3], tf.constant(128, tf.uint8))
  shift = tint.tint(image, 0.1, seed=tf.constant([0, 1], tf.int64)).numpy().astype(int) - 128
  assert (shift == shift[0, 0]).all() and 0 < np.abs(shift).max() <= 26
