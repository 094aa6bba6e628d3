import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maskgen.models.mage import Mage
from maskgen.models.vqgan import VQGAN
from maskgen.numerics import losses, masking
from maskgen.objectives import mage


def logits_and_targets(shape=(3, 5), classes=11, seed=0):
  rng = np.random.default_rng(seed)
  logits = rng.normal(scale=3.0, size=(*shape, classes)).astype(np.float32)
  return logits, rng.integers(0, classes, shape).astype(np.int32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy(smoothing):
  logits, targets = logits_and_targets()
  found = losses.cross_entropy(logits, targets, smoothing)
  smoothed = optax.smooth_labels(jax.nn.one_hot(targets, logits.shape[-1]), smoothing)
  np.testing.assert_allclose(found, optax.softmax_cross_entropy(logits, smoothed), rtol=1e-5)
  # The same once more, by hand and in float64.
  log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True))
  nll = -np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(found, (1 - smoothing) * nll - smoothing * log_p.mean(axis=-1), rtol=1e-5)


def test_cross_entropy_of_bfloat16_logits_is_computed_in_float32():
  logits, targets = logits_and_targets()
  low = jnp.asarray(logits, jnp.bfloat16)
  found = losses.cross_entropy(low, targets, 0.1)
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, losses.cross_entropy(low.astype(jnp.float32), targets, 0.1))


def test_masked_mean():
  values = jnp.array([[1.0, 2.0, 6.0], [1.0, 1e30, 5.0], [7.0, 8.0, 9.0]])
  mask = jnp.array([[True, True, False], [True, False, True], [False, False, False]])
  np.testing.assert_allclose(losses.masked_mean(values, mask), [1.5, 3.0, 0.0])
  gradient = jax.grad(lambda values: losses.masked_mean(values, mask).sum())(values)
  np.testing.assert_allclose(gradient, [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0, 0]])


def test_mean_per_example():
  values = np.random.default_rng(0).normal(size=(3, 4, 5, 2)).astype(np.float32)
  found = losses.mean_per_example(jnp.asarray(values))
  np.testing.assert_allclose(found, values.mean(axis=(1, 2, 3)), rtol=1e-5, atol=1e-6)


def test_mage_learns_only_from_masked_tokens(monkeypatch):
  tokenizer = VQGAN(
    channels=4, multipliers=(1, 1), strides=(2,), blocks=1, norm_groups=2, codebook_size=6, code_width=4
  )
  width = dict(width=8, depth=1, heads=2, decoder_width=8, decoder_depth=1, decoder_heads=2)
  objective = mage.Objective(image_size=(8, 8), tokenizer=tokenizer, **width)
  rng = np.random.default_rng(1)
  weights = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype),
    objective.pretrained_shapes()["tokenizer"]["params"]["generator"],
  )
  params, frozen = {"main": {}}, {"tokenizer": weights}  # the logits come from below
  keys = jax.random.split(jax.random.key(2), 4)
  batch = {"image": jax.random.uniform(jax.random.key(3), (4, 8, 8, 3)), "key": keys}
  logits = jax.random.normal(jax.random.key(4), (4, objective.num_tokens, 6))

  @jax.jit
  def loss(logits):
    monkeypatch.setattr(Mage, "encode", lambda *args, **kwargs: None)
    monkeypatch.setattr(Mage, "decode", lambda *args, **kwargs: jnp.pad(logits, ((0, 0), (1, 0), (0, 0))))
    values, metrics, _ = objective.losses(
      params, frozen, {}, batch, jax.random.key(5), jnp.int32(0), train=True
    )
    return values["main"], metrics

  gradient, metrics = jax.grad(loss, has_aux=True)(logits)
  mask, _ = masking.random_mask(keys, objective.num_tokens, objective.mask_ratio)
  np.testing.assert_array_equal(np.abs(gradient).sum(axis=-1) > 0, mask)
  # Accuracy, too: right at every masked position, wrong at all others.
  tokens = jax.jit(objective.predict_fns()["encode"])({"frozen": frozen}, batch, None)
  shown = jnp.where(mask, tokens, (tokens + 1) % 6)
  assert metrics["accuracy"] < 1
  assert loss(jax.nn.one_hot(shown, 6))[1]["accuracy"] == 1


def test_gan_losses_at_known_values():
  logits = jnp.array([0.0, math.log(3.0), -math.log(3.0), 80.0, -80.0])
  np.testing.assert_allclose(
    losses.generator_loss(logits),
    [math.log(2), math.log(4 / 3), math.log(4), 0.0, 80.0],
    rtol=1e-6,
    atol=1e-7,
  )
  # Real ones that look real and fakes that look fake cost nothing; the reverse costs the sum.
  np.testing.assert_allclose(losses.discriminator_loss(logits[3:4], logits[4:5]), [0.0], atol=1e-7)
  np.testing.assert_allclose(losses.discriminator_loss(logits[4:5], logits[3:4]), [160.0], rtol=1e-6)
  np.testing.assert_allclose(
    losses.discriminator_loss(logits[1:2], logits[2:3]), [2 * math.log(4 / 3)], rtol=1e-6
  )


def test_r1_penalty_of_a_quadratic_discriminator():
  rng = np.random.default_rng(0)
  matrix = rng.normal(size=(12, 12)).astype(np.float32)
  real = rng.normal(size=(5, 2, 3, 2)).astype(np.float32)

  def penalty(matrix):
    def discriminate(images):  # D(x) = x' A x, so that its gradient is (A + A') x
      x = images.reshape(len(images), -1)
      return jnp.einsum("bi,ij,bj->b", x, matrix, x)

    return losses.r1_penalty(discriminate, jnp.asarray(real))

  flat = real.reshape(5, -1)
  gradient = flat @ (matrix + matrix.T)
  np.testing.assert_allclose(penalty(matrix), np.square(gradient).sum(axis=-1), rtol=1e-4)
  # Its own gradient: d |(A + A') x|^2 / dA = 2 (g x' + x g').
  found = jax.grad(lambda matrix: penalty(matrix).sum())(jnp.asarray(matrix))
  outer = gradient.T @ flat
  np.testing.assert_allclose(found, 2 * (outer + outer.T), rtol=1e-3, atol=1e-3)


def test_code_entropy_loss_at_its_extremes():
  codes, vectors = 8, 64
  used = jax.nn.one_hot(jnp.arange(vectors) % codes, codes)
  # Sure of their codes, all used alike: the least there is.
  assert losses.code_entropy_loss(1.0 - used) == pytest.approx(-math.log(codes), abs=1e-5)
  # Sure, all on one code.
  assert losses.code_entropy_loss(1.0 - jnp.roll(used[:1], 3).repeat(vectors, 0)) == pytest.approx(
    0.0, abs=1e-5
  )
  # Undecided between all codes.
  assert losses.code_entropy_loss(jnp.ones((vectors, codes))) == pytest.approx(0.0, abs=1e-5)
  # A softmax, at its temperature, over negative distances.
  distances = jax.random.uniform(jax.random.key(0), (vectors, codes))
  p = np.asarray(jax.nn.softmax(-distances / 0.5))
  entropy = lambda p: -(p * np.log(p)).sum(axis=-1)  # noqa: E731
  expected = entropy(p).mean() - entropy(p.mean(axis=0))
  assert losses.code_entropy_loss(distances, 0.5) == pytest.approx(expected, abs=1e-5)
