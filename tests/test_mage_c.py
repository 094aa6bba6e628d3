"""MAGE-C: the contrastive loss, over the global batch for any placement of its rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskgen import objectives, sharding, tree
from maskgen.benchmarks import dataless
from maskgen.costs import hlo
from maskgen.errors import UserError
from maskgen.numerics import losses, masking
from maskgen.objectives import mage, mage_c
from maskgen.training.experiment import Experiment

TEMPERATURE = 0.2


def plain_config(**overrides):
  config = tiny.stage("mage", objective__dropout="0.0", batch_size="16", **overrides)
  config["data"]["preprocess"] = "two_views|" + config["data"]["preprocess"]
  return config | {"pretrained": {"tokenizer": "random"}, "evals": {}}


def experiment(mesh=(-1, 1, 1), **overrides):
  config = plain_config(**overrides)
  config["objective"] |= {"name": "mage_c", "projection_hidden": 32, "projection_width": 8}
  config["mesh"] = dict(zip(sharding.AXES, mesh, strict=True))
  config["sharding"] = (
    ("^frozen/", ()),
    ("/(query|key|value|up)/kernel$", ("fsdp", "tensor")),
    ("/(query|key|value|up)/bias$", ("tensor",)),
    ("/(out|down)/kernel$", ("tensor", "fsdp")),
    ("(embedding|position)$", (None, "fsdp")),
  )
  return Experiment(config, None if -1 in mesh else jax.devices()[: int(np.prod(mesh))])


# The loss


def reference(embeddings):
  """Chen et al. 2020, equation 1, pair by pair and in float64."""
  z = embeddings.astype(np.float64).reshape(-1, embeddings.shape[-1])
  z /= np.linalg.norm(z, axis=-1, keepdims=True)
  total, hits = [], []
  for i in range(len(z)):
    positive = i + 1 if i % 2 == 0 else i - 1
    others = [k for k in range(len(z)) if k != i]
    scores = {k: z[i] @ z[k] / TEMPERATURE for k in others}
    total.append(-np.log(np.exp(scores[positive]) / sum(np.exp(score) for score in scores.values())))
    hits.append(max(scores, key=scores.get) == positive)
  return np.reshape(total, (-1, 2)).mean(axis=1), np.reshape(hits, (-1, 2)).mean(axis=1)


def test_nt_xent_is_that_of_simclr():
  rng = np.random.default_rng(0)
  embeddings = rng.normal(size=(7, 1, 5)) + 0.7 * rng.normal(size=(7, 2, 5))
  embeddings = (embeddings * rng.uniform(0.5, 5.0, (7, 2, 1))).astype(np.float32)
  loss, nearest = losses.nt_xent(embeddings, embeddings, TEMPERATURE)
  expected = reference(embeddings)
  assert 0 < expected[1].mean() < 1
  np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
  np.testing.assert_array_equal(nearest, expected[1])


def test_nt_xent_at_its_extremes():
  b = 6
  alike = np.repeat(np.eye(b, dtype=np.float32)[:, None], 2, axis=1)
  loss, nearest = losses.nt_xent(alike, alike, TEMPERATURE)
  np.testing.assert_allclose(loss, np.log1p((2 * b - 2) * np.exp(-1 / TEMPERATURE)), rtol=1e-5)
  np.testing.assert_array_equal(nearest, 1.0)
  equal = np.ones((b, 2, 3), np.float32)
  loss, nearest = losses.nt_xent(equal, equal, TEMPERATURE)
  np.testing.assert_allclose(loss, np.log(2 * b - 1), rtol=1e-5)
  np.testing.assert_array_equal(nearest, 0.0)  # a tie is no hit
  for x in (np.zeros((b, 2, 3), np.float32), alike[:1]):  # vectors without a direction; no negatives
    value, gradient = jax.value_and_grad(lambda x: losses.nt_xent(x, x, TEMPERATURE)[0].sum())(jnp.asarray(x))
    assert np.isfinite(value) and np.isfinite(gradient).all()


# Meshes (test_meshes has two processes compute the same)


def loss_and_gradients(built):
  """The metrics and gradients of the first batch, from the same parameters on every mesh."""
  state, frozen = dataless.random_state(built)
  batches = built.train_batches(0)
  batch = next(batches)
  batches.close()
  params = jax.tree.map(lambda x: 20.0 * x, state.params)  # so that examples differ

  def compute(params, frozen, batch):
    batch = {**batch, "key": jax.random.split(jax.random.key(1), built.config.batch_size)}
    values, metrics, _ = built.objective.losses(
      params, frozen, {}, batch, jax.random.key(2), jnp.int32(0), train=True
    )
    return values["main"], metrics

  fn = sharding.on_mesh(jax.value_and_grad(compute, has_aux=True), built.mesh)
  (loss, metrics), gradients = jax.jit(fn, out_shardings=sharding.replicated(built.mesh))(
    params, frozen, batch
  )
  found = metrics | {"loss": loss} | tree.flatten(gradients)
  return {name: np.asarray(jax.device_get(value)) for name, value in found.items()}


@pytest.fixture(scope="module")
def alone():
  return loss_and_gradients(experiment((1, 1, 1)))


def assert_close(found, expected):
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    # The gradient of a bias of keys is 0 but for rounding.
    atol = 1e-5 * abs(value).max() + 1e-8
    np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=atol, err_msg=name)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)])
def test_every_mesh_gives_the_same_loss_and_gradients(mesh, alone):
  assert alone["contrastive_loss"] > 0.1
  assert abs(alone["main/projection/down/kernel"]).max() > 0
  assert_close(loss_and_gradients(experiment(mesh)), alone)


def test_embeddings_cross_devices_and_pictures_do_not():
  """Apart from the sum of gradients: both views' embeddings forwards, and their gradient backwards."""
  built = experiment((8, 1, 1))
  batch = dataless.batch_spec(built, "config")
  collectives = hlo.analyse(built.compile(batch).as_text()).collectives
  size = 4 * 2 * built.config.batch_size * built.objective.projection_width
  assert set(collectives) <= {"all-gather", "all-reduce", "reduce-scatter"}
  assert 0 < collectives["all-gather"].bytes <= size
  parameters = 4 * tree.count(built.targets["state"].params)
  assert collectives["all-reduce"].bytes <= 1.02 * parameters + size


# The objective


def both(dropout=0.1, **fields):
  """MAGE-C, and MAGE of the same sizes."""
  section = tiny.stage("mage")["objective"] | {"dropout": dropout}
  section.pop("name")
  return (
    objectives.build(section | {"name": "mage_c", "projection_hidden": 32, "projection_width": 8} | fields),
    objectives.build(section | {"name": "mage"}),
  )


def setting(objective, b=6):
  tokens = {"tokens": jax.ShapeDtypeStruct((b, 16), jnp.uint8)}
  shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())
  variables = jax.tree.map(
    lambda leaf: 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), shapes["params"]
  )
  keys = jax.random.split(jax.random.key(3), b)
  draw = {
    name: jax.random.randint(jax.random.key(i), tokens["tokens"].shape, 0, tiny.CODES)
    for i, name in enumerate(("tokens", "tokens2"))
  }
  return variables, draw | {"key": keys}


def test_without_weight_it_is_mage_on_both_views():
  contrastive, plain = both(contrastive_weight=0.0)
  params, batch = setting(contrastive)

  def losses(objective, batch):
    compute = jax.jit(functools.partial(objective.losses, train=True))
    return compute(params, {}, {}, batch, jax.random.key(5), 0)

  values, metrics, _ = losses(contrastive, batch)
  expected, means, _ = losses(plain, mage_c._both_views(batch))
  np.testing.assert_allclose(values["main"], expected["main"], rtol=1e-6)
  for name, value in means.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-6)
  assert set(metrics) == {*means, "reconstructive_loss"}
  weighted, _ = both(contrastive_weight=0.5)
  more, metrics, _ = losses(weighted, batch)
  np.testing.assert_allclose(more["main"] - values["main"], 0.5 * metrics["contrastive_loss"], rtol=1e-4)


def test_both_views_are_masked_and_each_in_its_own_way():
  _, batch = setting(both()[0], b=64)
  keys = mage_c._both_views(batch)["key"]
  mask, _ = masking.random_mask(keys, 16, masking.MaskRatio())
  first, second = mask[::2], mask[1::2]
  np.testing.assert_array_equal(first, masking.random_mask(batch["key"], 16, masking.MaskRatio())[0])
  assert (first != second).any(axis=1).mean() > 0.9
  share = np.corrcoef(first.mean(axis=1), second.mean(axis=1))[0, 1]
  assert abs(share) < 0.4  # ratios are drawn apart, too


def test_the_second_view_matters_and_the_head_learns():
  objective, _ = both()
  params, batch = setting(objective)

  @jax.jit
  def loss(params, batch):
    return objective.losses(params, {}, {}, batch, jax.random.key(0), jnp.int32(0), train=False)[0]["main"]

  gradients = jax.jit(jax.grad(loss))(params, batch)["main"]
  assert all(abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients["projection"]))
  assert loss(params, batch) != loss(params, batch | {"tokens2": batch["tokens"]})


def test_predictions_are_those_of_mage():
  objective, plain = both()
  params, batch = setting(objective)
  variables = {"params": params, "frozen": {}}
  theirs = plain.predict_fns()
  assert objective.predict_fns().keys() == theirs.keys()
  batch |= {"token_mask": batch["tokens"] > 9}
  del params["main"]["projection"]  # which nothing asks for
  for name in ("loss", "logits"):
    found = jax.jit(objective.predict_fns()[name])(variables, batch, jax.random.key(0))
    expected = jax.jit(theirs[name])(variables, batch, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_it_is_a_mage():
  assert issubclass(mage_c.Objective, mage.Objective)


# Runs


@pytest.mark.parametrize("source", ["synthetic", "tokens"])
def test_it_can_be_measured_without_data(source):
  config = plain_config()
  config["objective"]["name"] = "mage_c"
  built = dataless.build(config, source)
  batch = dataless.random_batch(built, source)
  assert len(batch) == 2
  state, frozen = dataless.random_state(built)
  _, metrics = built.update(state, frozen, batch)
  assert np.isfinite(metrics["loss/main"])


def test_one_view_is_refused():
  config = plain_config()
  config["objective"]["name"] = "mage_c"
  config["data"]["preprocess"] = config["data"]["preprocess"].removeprefix("two_views|")
  with pytest.raises(UserError, match=r"one view .* put 'two_views\|' in front of config.data.preprocess"):
    Experiment(config)


def test_accumulation_is_refused():
  with pytest.raises(UserError, match=r"config.accumulation=2 .* 'mage_c' compares all .* set it to 1"):
    experiment(accumulation="2")


@pytest.mark.parametrize("field", ["contrastive_weight", "temperature", "projection_width"])
def test_wrong_values_are_refused(field):
  with pytest.raises(UserError, match=field):
    both(**{field: -1})
  with pytest.raises(UserError, match="temperature is 0"):
    both(temperature=0.0)
