"""The adversarial losses of the tokenizer, and LeCAM's regularisation with its state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskgen import objectives, sharding, tree
from maskgen.benchmarks.dataless import random_state
from maskgen.costs import flops
from maskgen.errors import UserError
from maskgen.numerics import losses
from maskgen.objectives import tokenizer
from maskgen.training.experiment import Experiment

REAL = np.array([-3.0, -0.5, 0.0, 0.7, 1.0, 4.0], np.float32)
FAKE = np.array([2.0, -1.0, -2.5, 0.3, 0.0, -0.2], np.float32)


# Formulas


def test_hinge_losses():
  np.testing.assert_allclose(losses.hinge_generator_loss(FAKE), -FAKE)
  expected = [max(0, 1 - real) + max(0, 1 + fake) for real, fake in zip(REAL, FAKE, strict=True)]
  np.testing.assert_allclose(losses.hinge_discriminator_loss(REAL, FAKE), expected, rtol=1e-6)


def test_a_hinge_leaves_alone_what_is_beyond_its_margin():
  sure = jnp.array([1.5]), jnp.array([-1.5])
  gradients = jax.grad(lambda x: losses.hinge_discriminator_loss(*x).sum())(sure)
  np.testing.assert_array_equal(gradients, np.zeros((2, 1)))
  logistic = jax.grad(lambda x: losses.discriminator_loss(*x).sum())(sure)
  assert logistic[0] < 0 < logistic[1]


def test_lecam_penalty():
  found = losses.lecam_penalty(REAL, FAKE, jnp.float32(0.6), jnp.float32(-0.4))
  np.testing.assert_allclose(found, (REAL + 0.4) ** 2 + (FAKE - 0.6) ** 2, rtol=1e-6)


def test_rectified_lecam_penalty_counts_means_on_the_right_side():
  found = losses.rectified_lecam_penalty(REAL, FAKE, jnp.float32(0.6), jnp.float32(-0.4))
  np.testing.assert_allclose(found, (REAL.mean() + 0.4) ** 2 + (0.6 - FAKE.mean()) ** 2, rtol=1e-6)
  confused = jax.grad(lambda x: losses.rectified_lecam_penalty(*x, jnp.float32(-9.0), jnp.float32(9.0)))
  np.testing.assert_array_equal(confused((jnp.array(REAL), jnp.array(FAKE))), np.zeros((2, len(REAL))))


# The objective


def experiment(mesh=(1, 1, 1), batch_size=8, accumulation=1, **fields):
  config = tiny.stage("tokenizer", batch_size=str(batch_size), accumulation=str(accumulation))
  config["objective"] |= fields
  config["mesh"] = dict(zip(sharding.AXES, mesh, strict=True))
  return Experiment(config | {"evals": {}}, jax.devices()[: int(np.prod(mesh))])


def run(built, steps=2):
  """The metrics of the first steps, and the last state."""
  state, frozen = random_state(built)
  batches, found = built.train_batches(0), []
  for _ in range(steps):
    state, metrics = built.update(state, frozen, next(batches))
    found.append({name: float(value) for name, value in metrics.items()})
  batches.close()
  return found, jax.device_get(state)


@pytest.fixture(scope="module")
def plain():
  return run(experiment())


@pytest.fixture(scope="module")
def regularised():
  return run(experiment(lecam_weight=0.5, adversarial_loss="hinge"))


def test_without_lecam_the_state_has_the_same_names(plain):
  metrics, state = plain
  assert set(tree.flatten(state.model_state)) == {"usage"}
  assert "lecam" not in metrics[0]


def test_anchors_follow_the_logits(regularised):
  metrics, state = regularised
  assert set(tree.flatten(state.model_state)) == {"usage", "anchors/real", "anchors/fake"}
  for kind, anchor in state.model_state["anchors"].items():
    expected = 0.0
    for step, row in enumerate(metrics):
      decay = min(tokenizer.ANCHOR_DECAY, (1 + step) / (10 + step))
      expected = decay * expected + (1 - decay) * row[f"logit_{kind}"]
    assert expected != 0
    np.testing.assert_allclose(anchor, expected, rtol=1e-5)


def test_lecam_adds_to_the_discriminator_alone(plain, regularised):
  """At the first step, where parameters are the same and anchors are 0."""
  hinge = run(experiment(adversarial_loss="hinge"), steps=1)[0][0]
  found = regularised[0][0]
  assert found["lecam"] > 0
  np.testing.assert_allclose(
    found["loss/discriminator"], hinge["loss/discriminator"] + 0.5 * found["lecam"], rtol=1e-5
  )
  assert found["loss/generator"] == pytest.approx(hinge["loss/generator"], rel=1e-6)
  assert found["norm/generator_gradient"] == pytest.approx(hinge["norm/generator_gradient"], rel=1e-5)
  logistic = plain[0][0]
  np.testing.assert_allclose(hinge["adversarial"], -hinge["logit_fake"], rtol=1e-6)
  np.testing.assert_allclose(logistic["adversarial"], np.log1p(np.exp(-logistic["logit_fake"])), rtol=1e-3)


def test_a_loss_without_weight_is_not_computed():
  named = ("r1_weight", "entropy_weight", "revive_weight", "lecam_weight")

  def trace(**fields):
    """FLOPs of all gradients, and the names of the metrics."""
    objective = objectives.build(tiny.stage("tokenizer")["objective"] | dict.fromkeys(named, 0.0) | fields)
    parts = jax.eval_shape(objective.init, jax.random.key(0), {})
    batch = {"image": jax.ShapeDtypeStruct((4, *objective.image_shape), jnp.float32)}
    names = set()

    def gradients(parts, batch):
      def values(params):
        found, metrics, _ = objective.losses(
          params, {}, parts["extra"], batch, jax.random.key(0), jnp.int32(0), train=True
        )
        names.update(metrics)
        return found

      found, pull_back = jax.vjp(values, parts["params"])
      return [pull_back({name: jnp.float32(name == group) for name in found})[0][group] for group in found]

    return flops.count(gradients, parts, batch), names

  cost, names = trace()
  assert not names & {"r1", "entropy", "revive", "lecam", "perceptual"}
  penalised, more = trace(r1_weight=1.0)
  assert more == names | {"r1"} and penalised > 1.05 * cost
  _, every = trace(**dict.fromkeys(named, 1.0))
  assert every == names | {"r1", "entropy", "revive", "lecam"}


@pytest.mark.parametrize("form", losses.LECAM)
def test_a_step_asks_for_the_opposite_anchor(form):
  fields = {"lecam_weight": 1.0, "lecam_loss": form}
  objective = objectives.build(tiny.stage("tokenizer")["objective"] | fields)
  parts = jax.jit(objective.init)(jax.random.key(0), {})
  parts["extra"]["anchors"] = {"real": jnp.float32(2.0), "fake": jnp.float32(-3.0)}
  images = jax.random.uniform(jax.random.key(1), (4, *objective.image_shape))
  _, metrics, extra = jax.jit(functools.partial(objective.losses, train=True))(
    parts["params"], {}, parts["extra"], {"image": images}, jax.random.key(2), jnp.int32(10**6)
  )
  real = objective.discriminator.apply({"params": parts["params"]["discriminator"]}, images)
  if form == "squared":
    off = metrics["lecam"] - np.square(np.asarray(real) + 3.0).mean()
    spread = off - (metrics["logit_fake"] - 2.0) ** 2  # the variance of the fakes' logits
    assert -1e-4 < spread < 1.0
  else:
    expected = (real.mean() + 3.0) ** 2 + (2.0 - metrics["logit_fake"]) ** 2
    np.testing.assert_allclose(metrics["lecam"], expected, rtol=1e-5)
  # Old averages move by a thousandth.
  np.testing.assert_allclose(extra["anchors"]["real"], 2.0 + 0.001 * (real.mean() - 2.0), rtol=1e-6)


def test_every_mesh_gives_the_same_numbers(regularised):
  found, state = run(experiment((2, 4, 1), lecam_weight=0.5, adversarial_loss="hinge"))
  for one, other in zip(found, regularised[0], strict=True):
    for name in ("loss/discriminator", "loss/generator", "lecam"):
      np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-6)
  for kind, anchor in state.model_state["anchors"].items():
    np.testing.assert_allclose(anchor, regularised[1].model_state["anchors"][kind], rtol=1e-4)


@pytest.mark.slow
def test_anchors_move_with_every_micro_batch():
  built = experiment(batch_size=4, accumulation=2, lecam_weight=0.5)
  _, state = run(built, steps=1)
  parameters, _ = random_state(built)
  batches = built.train_batches(0)
  batch = next(batches)["image"]
  batches.close()
  extra, losses_of = parameters.model_state, built.objective.losses
  for part in (batch[::2], batch[1::2]):
    _, _, extra = losses_of(
      parameters.params, {}, extra, {"image": part}, jax.random.key(0), parameters.step, train=True
    )
  for name, value in tree.flatten(extra).items():
    np.testing.assert_allclose(tree.flatten(state.model_state)[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
  "fields,message",
  [
    (dict(adversarial_loss="hing"), "adversarial_loss 'hing' does not exist; did you mean 'hinge'"),
    (dict(lecam_loss="rectify"), "lecam_loss 'rectify' does not exist; did you mean 'rectified'"),
    (dict(lecam_weight=-1.0), "lecam_weight is -1.0"),
    (dict(lecam_weight=1.0, adversarial_weight=0.0), "set adversarial_weight above 0"),
  ],
)
def test_wrong_values_are_refused(fields, message):
  with pytest.raises(UserError, match=message):
    objectives.build(tiny.stage("tokenizer")["objective"] | fields)
