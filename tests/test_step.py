"""The update, for every objective of the package: a new one needs an entry in TINY.

It also needs one in PER_EXAMPLE if its losses are not means over examples, in RULES if its blocks differ.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maskgen import config as config_lib
from maskgen import objectives, plugins, sharding, tree
from maskgen.errors import UserError
from maskgen.models import perceptual
from maskgen.numerics.text import Captions
from maskgen.training import optim
from maskgen.training.state import TrainState
from maskgen.training.step import gradient_dtypes, make_update

NETWORK = dict(
  channels=8, multipliers=(1, 2), strides=(4,), blocks=1, norm_groups=2, codebook_size=8, code_width=8
)
MAGE = dict(
  image_size=(16, 16),
  tokenizer=NETWORK,
  width=16,
  depth=1,
  heads=4,
  decoder_width=8,
  decoder_depth=1,
  decoder_heads=2,
  dropout=0.0,
)
VIT = dict(name="vit", image_size=(16, 16), patch=4, width=16, depth=1, heads=4)
WORDS = Captions(text_tokenizer="list:a red blue cat", length=6)
READER = dict(width=8, depth=1, heads=2, hidden=8)
DIFFUSION = dict(
  image_size=(16, 16),
  patch=4,
  captions=dataclasses.asdict(WORDS),
  text_encoder=READER,
  unet=dict(channels=(8, 8), layers=1, depths=(1, 0), heads=(2, 2), groups=2),
)
TINY = {
  "diffusion": DIFFUSION,
  "mage_text": MAGE | dict(captions=dataclasses.asdict(WORDS), condition_width=8, text_encoder=READER),
  "vilex": dict(
    decoder=DIFFUSION | dict(name="diffusion"),
    encoder=VIT,
    tokens=3,
    pool_width=16,
    pool_depth=1,
    pool_heads=4,
    words=dict(share=0.5),
  ),
  "contrastive": dict(
    encoder=dict(name="vit", image_size=(16, 16), patch=4, width=16, depth=1, heads=4, pooling="attention"),
    captions=dataclasses.asdict(WORDS),
    text_encoder=READER,
    embedding_width=8,
    chunk=4,
  ),
  "tokenizer": dict(
    image_size=(16, 16),
    tokenizer=NETWORK,
    discriminator=dict(channels=4, max_channels=8, blocks=1),
    l1_weight=0.5,
    adversarial_weight=0.3,
    r1_weight=2.0,
    entropy_weight=0.1,
    entropy_temperature=1.0,
    revive_weight=1.0,
  ),
  "mage": MAGE,
  "mage_c": MAGE | dict(projection_hidden=16, projection_width=8, contrastive_weight=1.0),
  "lease": MAGE | dict(teacher=VIT, clusters=12, neighbours=2, contrastive_weight=1.0),
  "sorcen": MAGE
  | dict(
    projection_hidden=16, projection_width=8, predictor_hidden=16, echo_choices=3, contrastive_weight=1.0
  ),
  "mage_conditional": MAGE | dict(classes=10, condition_width=8),
  "maskgit": dict(
    image_size=(16, 16), tokenizer=NETWORK, classes=10, width=16, depth=1, heads=4, hidden=8, dropout=0.0
  ),
  "masked_pixels": dict(
    encoder=dict(
      image_size=(16, 16), patch=4, width=16, depth=1, heads=4, pooling="class", fixed_positions=True
    ),
    decoder_width=16,
    decoder_depth=1,
    decoder_heads=4,
  ),
  "dmjd": dict(
    encoder=dict(image_size=(16, 16), patch=4, width=16, depth=1, heads=4, pooling="class"),
    decoder_width=16,
    decoder_depth=1,
    decoder_heads=4,
  ),
  "mask_align": dict(
    encoder=dict(image_size=(16, 16), patch=4, width=16, depth=2, heads=4, pooling="class"),
    teacher=VIT | dict(pooling="class"),
    blocks=1,
  ),
  "mr_mae": dict(
    encoder=dict(image_size=(16, 16), patch=4, width=16, depth=1, heads=4, pooling="class"),
    decoder_width=16,
    decoder_depth=1,
    decoder_heads=4,
    teacher=VIT,
  ),
  "lmd": dict(
    image_size=(16, 16),
    autoencoder=dict(name="tokenizer", image_size=(16, 16), tokenizer=NETWORK),
    encoder=dict(patch=1, width=16, depth=1, heads=4, pooling="class"),
    decoder_width=16,
    decoder_depth=1,
    decoder_heads=4,
    first_ratio=0.5,
    rise_steps=4,
  ),
  "selfie": dict(
    encoder=dict(image_size=(16, 16), patch=4, width=16, depth=1, heads=4, pooling="class"),
    decoder_width=16,
    decoder_depth=1,
    decoder_heads=4,
  ),
  "two_view": dict(
    encoder=dict(
      image_size=(16, 16), patch=4, width=16, depth=1, heads=4, pooling="class", fixed_positions=True
    ),
    decoder_width=16,
    decoder_depth=1,
    decoder_heads=4,
    decoder_hidden=16,
    decoder_dropout=0.0,
    mask_ratio=0.75,
  ),
  "umd": dict(
    encoder=dict(image_size=(16, 16), patch=4, width=16, depth=1, heads=4), decoder_depth=1, classes=10
  ),
  "classify": dict(
    image_size=(16, 16),
    classes=10,
    tokenizer=NETWORK,
    width=16,
    depth=1,
    heads=4,
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
  ),
}
# Makes the losses a mean over examples, for objectives whose losses are not.
PER_EXAMPLE = {
  "tokenizer": dict(entropy_weight=0.0, revive_weight=0.0),
  "lease": dict(contrastive_weight=0.0),
  "classify": dict(mixup=0.0, cutmix=0.0),
  "umd": dict(clean_share=0.0),  # which are clean depends on micro-batches
}
BLOCK_RULES = (("mlp/up/kernel", ("fsdp", "tensor")), ("query/kernel", (None, ("fsdp", "tensor"))))
# The rules for a mesh with tensor parallelism, of objectives with other blocks than those of our transformer.
RULES = {
  "diffusion": (("mlp/fc1/kernel", ("fsdp", "tensor")), ("to_q/kernel", (None, ("fsdp", "tensor")))),
  "vilex": (*BLOCK_RULES, ("to_q/kernel", (None, ("fsdp", "tensor")))),
  "tokenizer": (("conv_0/kernel", (None, None, "fsdp", "tensor")), ("codebook", ("tensor", None))),
}
KEYS = ("attention/key/bias", "attn/k_proj/bias")
# Parameters without gradients in one objective: nothing follows but a batch norm, all keys have them in
# common, or they are not used.
WITHOUT = {
  "sorcen": ("projection/down/bias",),
  "selfie": ("keys/out/bias",),
  "mask_align": ("encoder_norm/scale", "encoder_norm/bias"),
}
# One of each kind of network: the others are made of the same blocks, and one mesh is enough for them.
NETWORKS = ("classify", "contrastive", "diffusion", "mage", "tokenizer", "vilex")
MESHES = ((2, 4, 1), (2, 2, 2))  # test_meshes.py: data parallelism alone
BATCH = 8
every_objective = pytest.mark.parametrize("name", sorted(TINY))


def build(name: str, **changes) -> objectives.Objective:
  return objectives.build({"name": name, **TINY[name], **changes})


def randomize(shapes, seed: int = 0):
  """Random values that keep activations of order one."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 100
    value = rng.normal(size=leaf.shape) / np.sqrt(fan_in) + tree.path_name(path).endswith("scale")
    return jnp.asarray(value, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def make_batch():
  rng = np.random.default_rng(3)
  return {
    "image": rng.integers(0, 256, (BATCH, 16, 16, 3), dtype=np.uint8),
    "image2": rng.integers(0, 256, (BATCH, 16, 16, 3), dtype=np.uint8),
    "label": rng.integers(0, 10, BATCH, dtype=np.int32),
    "caption": np.tile(WORDS.read(["a red cat", "blue", "", "a blue cat"]), (BATCH // 4, 1)),
  }


def keep_gradient() -> optax.GradientTransformation:
  """Gradient descent whose state is the last gradient."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(np.zeros_like, params),
    lambda gradient, _, params: (jax.tree.map(lambda x: -0.1 * x, gradient), gradient),
  )


def make_state(objective):
  """(state, frozen); the optimizers' state is the last gradient."""
  shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())
  params, frozen = randomize(shapes["params"]), randomize(shapes["frozen"], seed=1)
  rng = np.random.default_rng(2)
  extra = jax.tree.map(lambda leaf: rng.uniform(0.005, 0.015, leaf.shape).astype(leaf.dtype), shapes["extra"])
  gradients = {group: keep_gradient().init(leaves) for group, leaves in params.items()}
  averages = {group: randomize(shapes["params"][group], seed=3) for group in averaged(objective)}
  return TrainState(jnp.int32(0), params, gradients, averages, extra), frozen


def averaged(objective) -> tuple[str, ...]:
  """The groups whose moving averages teach."""
  return getattr(objective, "averages", ())


def make(objective, groups, **changes):
  transforms = {group: keep_gradient() for group in groups}
  schedules = {group: optax.constant_schedule(0.1) for group in groups}
  ema = dict.fromkeys(averaged(objective), 0.5)
  return make_update(objective, transforms, schedules, **dict(seed=0, ema=ema, accumulation=1) | changes)


@functools.cache
def one_step(name: str):
  """(state before, frozen, state after, metrics) of one step on one device, as NumPy arrays."""
  objective = build(name)
  state, frozen = make_state(objective)
  after, metrics = jax.jit(make(objective, state.params))(state, frozen, make_batch())
  return jax.device_get((state, frozen, after, metrics))


def assert_close(found, expected, tolerance: float):
  """Compares relative to the largest entry of each array."""
  found, expected = (tree.flatten(jax.device_get(x)) for x in (found, expected))
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    scale = max(np.abs(value).max(), 1e-2)
    np.testing.assert_allclose(found[name] / scale, value / scale, atol=tolerance, rtol=0, err_msg=name)


def test_every_objective_is_tested():
  assert set(plugins.short_names("maskgen.objectives", "Objective")) == set(TINY)


@every_objective
def test_gradient_reaches_every_parameter(name):
  state, _, after, metrics = one_step(name)
  assert set(after.params) == {key.removeprefix("loss/") for key in metrics if key.startswith("loss/")}
  for path, leaf in tree.flatten(after.opt_state).items():
    # Adding the same vector to all keys changes no attention weight.
    shifts = (*KEYS, *WITHOUT.get(name, ()))
    assert np.isfinite(leaf).all() and (path.endswith(shifts) or np.abs(leaf).max() > 1e-7), path
  for path, leaf in tree.flatten(after.params).items():
    expected = tree.flatten(state.params)[path] - 0.1 * tree.flatten(after.opt_state)[path]
    np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-7)
  assert after.step == 1 and after.step.dtype == jnp.int32
  assert all(np.isfinite(value) and value.shape == () for value in metrics.values())


@every_objective
def test_metrics_of_the_update(name):
  _, _, after, metrics = one_step(name)

  def norm(leaves):
    return np.sqrt(sum(np.square(leaf.astype(np.float64)).sum() for leaf in jax.tree.leaves(leaves)))

  for group, gradient in after.opt_state.items():
    assert metrics[f"norm/{group}_gradient"] == pytest.approx(norm(gradient), rel=1e-5)
    assert metrics[f"norm/{group}_update"] == pytest.approx(0.1 * norm(gradient), rel=1e-5)
    assert metrics[f"norm/{group}_parameters"] == pytest.approx(norm(after.params[group]), rel=1e-5)
    assert metrics[f"learning_rate/{group}"] == pytest.approx(0.1)


def test_each_group_follows_the_gradient_of_its_own_loss():
  """Including R1, whose gradient is a second derivative."""
  objective = build("tokenizer")
  state, frozen, after, _ = one_step("tokenizer")
  batch = make_batch()

  @jax.jit
  def separate_gradients(params):
    def loss(own, group):
      every = {**params, group: own}
      values, _, _ = objective.losses(
        every, frozen, state.model_state, batch, jax.random.key(7), jnp.int32(0), train=True
      )
      return values[group]

    return {group: jax.grad(loss)(params[group], group) for group in params}

  assert_close(after.opt_state, separate_gradients(state.params), 3e-5)


def test_the_adversarial_loss_sets_in_at_its_step():
  objective = build("tokenizer", adversarial_start=5, r1_weight=0.0)
  state, frozen, _, _ = one_step("tokenizer")

  @jax.jit
  def losses(params, step):
    values, metrics, _ = objective.losses(
      params, frozen, state.model_state, make_batch(), jax.random.key(0), step, train=True
    )
    return values, metrics["adversarial"]

  (early, adversarial), (late, _) = losses(state.params, 4), losses(state.params, 5)
  assert late["generator"] == pytest.approx(float(early["generator"] + 0.3 * adversarial), rel=1e-5)
  assert early["discriminator"] == late["discriminator"] > 0


class Features(nn.Module):
  """A feature network that costs nothing."""

  @nn.compact
  def __call__(self, images):
    return {"maps": [nn.Conv(4, (3, 3), strides=8)(images)]}


def test_the_perceptual_network_is_asked_for_and_its_distance_teaches(monkeypatch):
  monkeypatch.setitem(perceptual.NETWORKS, "tiny", Features)
  others = dict(l2_weight=0.0, l1_weight=0.0, adversarial_weight=0.0)
  objective = build("tokenizer", perceptual_weight=1.0, perceptual_network="tiny", **others)
  assert set(objective.pretrained_shapes()) == {"perceptual"}
  state, frozen = make_state(objective)
  assert set(state.params) == {"generator"} and set(frozen) == {"perceptual"}
  served = objectives.without_training_only(objective, state.variables(frozen))
  assert not served["frozen"]  # the network is not exported
  jax.eval_shape(objective.predict_fns()["loss"], served, make_batch(), jax.random.key(0))

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def gradient(bias, params, frozen):
    params["generator"]["decoder"]["conv_out"]["bias"] = bias
    values, metrics, _ = objective.losses(
      params, frozen, state.model_state, make_batch(), jax.random.key(0), jnp.int32(0), train=True
    )
    return values["generator"], metrics["perceptual"]

  found, distance = gradient(jnp.zeros(3), state.params, frozen)
  assert distance > 0 and (np.abs(found) > 0).all()


HALF_UNET = DIFFUSION | dict(name="diffusion", unet=DIFFUSION["unet"] | dict(dtype="float16"))


@pytest.mark.parametrize(
  ("name", "changes", "expected"),
  [
    ("mage", dict(dtype="float16"), {"float16", "float32"}),
    ("mage", dict(tokenizer=NETWORK | dict(dtype="float16")), {"float32"}),  # codes have no gradient
    ("vilex", dict(decoder=HALF_UNET), {"float16", "float32"}),  # gradients pass through a frozen decoder
  ],
)
def test_dtypes_of_gradients(name, changes, expected):
  objective = build(name, **changes)
  shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())
  parts = shapes["params"], shapes["frozen"], shapes["extra"], jax.eval_shape(make_batch)
  assert gradient_dtypes(objective, *parts) == expected


@pytest.mark.parametrize(
  ("name", "shape"),
  [(name, shape) for name in sorted(TINY) for shape in MESHES[name not in NETWORKS :]],
  ids=str,
)
def test_one_step_is_the_same_on_every_mesh(name, shape, monkeypatch):
  monkeypatch.setattr(sharding, "SMALL", 16)
  mesh = sharding.make_mesh(config_lib.Mesh(*shape))
  state, frozen, expected, expected_metrics = one_step(name)
  shapes = {"state": state, "frozen": frozen}
  # What does not divide, such as a kernel with 3 output channels, is replicated.
  odd = [
    n for n, leaf in tree.flatten(shapes).items() if all(size % mesh.shape["fsdp"] for size in leaf.shape)
  ]
  rules = (
    *(RULES.get(name, BLOCK_RULES) if mesh.shape["tensor"] > 1 else ()),
    *((f"^{n}$", ()) for n in odd),
  )
  places = sharding.shard(shapes, rules, mesh)
  update = jax.jit(
    make(build(name), state.params),
    in_shardings=(places["state"], places["frozen"], sharding.batch_sharding(mesh)),
    out_shardings=(places["state"], sharding.replicated(mesh)),
  )
  after, metrics = update(state, frozen, make_batch())
  split = [leaf for leaf in jax.tree.leaves(after.params) if not leaf.is_fully_replicated]
  assert (len(split) > len(jax.tree.leaves(after.params)) / 3) == (mesh.shape["fsdp"] > 1)
  assert_close(after.opt_state, expected.opt_state, 3e-5)
  assert_close((after.params, after.model_state), (expected.params, expected.model_state), 1e-5)
  if name == "contrastive":
    # Untrained features are nearly equal: rounding decides which text is the nearest to an image.
    metrics, expected_metrics = ({**found, "accuracy": 0.0} for found in (metrics, expected_metrics))
  assert_close(metrics, expected_metrics, 1e-5)


@pytest.mark.parametrize("name", sorted(TINY.keys() - {"mage_c", "sorcen", "contrastive"}))  # which reject it
def test_accumulation_equals_the_large_batch(name):
  changes = PER_EXAMPLE.get(name, {})
  objective = build(name, **changes)
  state, frozen, large, _ = one_step(name)
  if changes:
    large, _ = jax.jit(make(objective, state.params))(state, frozen, make_batch())
  small, _ = jax.jit(make(objective, state.params, accumulation=4))(state, frozen, make_batch())
  assert_close(small.opt_state, large.opt_state, 1e-5)
  assert_close(small.params, large.params, 1e-6)


class Counting:
  """Two groups, known losses, a running count of the examples, and noise."""

  def losses(self, params, frozen, extra, batch, rng, step, *, train):
    x = batch["x"]
    noise = jax.vmap(jax.random.normal)(batch["key"])
    values = {
      "a": (params["a"]["w"] * x).mean() + (params["b"]["w"] * x).mean(),
      "b": (params["a"]["w"] * params["b"]["w"] * (x + frozen)).mean(),
    }
    metrics = {"noise": noise.mean(), "model_noise": jax.random.normal(rng), "first": x[0]}
    return values, metrics, {"examples": extra["examples"] + len(x)}


def counting_state(step: int = 0, ema=()):
  params = {"a": {"w": jnp.float32(2.0)}, "b": {"w": jnp.float32(3.0)}}
  averages = {group: {"w": jnp.float32(10.0)} for group in ema}
  extra = {"examples": jnp.int32(0)}
  return TrainState(jnp.int32(step), params, params, averages, extra)


COUNTING_BATCH = {"x": jnp.arange(8, dtype=jnp.float32)}


def test_groups_own_their_losses_and_frozen_parts_take_part():
  after, _ = jax.jit(make(Counting(), "ab"))(counting_state(), jnp.float32(1.0), COUNTING_BATCH)
  assert after.opt_state == {"a": {"w": 3.5}, "b": {"w": 2.0 * 4.5}}


def test_randomness_follows_from_seed_and_step_alone():
  def noise(seed=0, step=0):
    update = jax.jit(make(Counting(), "ab", seed=seed))
    _, metrics = update(counting_state(step), jnp.float32(0.0), COUNTING_BATCH)
    return float(metrics["noise"]), float(metrics["model_noise"])

  assert noise() == noise()
  drawn = [value for options in ({}, dict(seed=1), dict(step=1)) for value in noise(**options)]
  assert len(set(drawn)) == 6


def test_accumulation_threads_the_model_state_and_shares_the_examples_out_in_turn():
  update = jax.jit(make(Counting(), "ab", accumulation=2))
  after, metrics = update(counting_state(), jnp.float32(0.0), COUNTING_BATCH)
  assert after.model_state["examples"] == 8
  assert metrics["first"] == 0.5  # micro-batches start with the examples 0 and 1
  _, plain = jax.jit(make(Counting(), "ab"))(counting_state(), jnp.float32(0.0), COUNTING_BATCH)
  assert metrics["noise"] == pytest.approx(float(plain["noise"]))  # an example keeps its key
  assert metrics["model_noise"] != plain["model_noise"]


def test_checkpoints_store_the_model_state_as_extra():
  state = counting_state()
  assert [name.split("/")[0] for name in tree.flatten(state)][-1] == "extra"
  assert tree.flatten(state)["extra/examples"] is state.model_state["examples"]
  assert jax.tree.map(lambda leaf: leaf, state) == state


@pytest.mark.parametrize("step,decay", [(0, 0.1), (8, 0.5), (10_000, 0.98)])
def test_moving_average(step, decay):
  update = jax.jit(make(Counting(), "ab", ema={"b": 0.98}))
  frozen = jnp.float32(0.0)
  after, _ = update(counting_state(step, ema="b"), frozen, COUNTING_BATCH)
  assert set(after.ema) == {"b"}
  expected = decay * 10.0 + (1 - decay) * float(after.params["b"]["w"])
  assert after.ema["b"]["w"] == pytest.approx(expected, rel=1e-5)
  variables = after.variables(frozen)
  assert variables["params"] == {"a": after.params["a"], "b": after.ema["b"]}
  assert variables["frozen"] is frozen and variables["extra"] is after.model_state


# Optimizers


def adam(**options) -> optim.Optimizer:
  return optim.Optimizer(**dict(learning_rate=0.1, schedule="constant") | options)


def apply(optimizer: optim.Optimizer, params, gradient):
  """The parameters after one step."""
  transform = optimizer.make_transform(optimizer.make_schedule(100, 32, 1000), params)

  @jax.jit
  def step(params, gradient):
    updates, _ = transform.update(gradient, transform.init(params), params)
    return optax.apply_updates(params, updates)

  return step(params, gradient)


@every_objective
def test_weight_decay_is_on_matrices_alone(name):
  params = make_state(build(name))[0].params
  nothing = jax.tree.map(jnp.zeros_like, params)
  after = tree.flatten(apply(adam(weight_decay=0.5), params, nothing))
  for path, before in tree.flatten(params).items():
    kept = 1 - 0.1 * 0.5 if before.ndim > 1 else 1.0
    np.testing.assert_allclose(after[path], kept * before, rtol=1e-5, err_msg=path)


def test_multipliers_scale_the_learning_rate_by_their_first_match():
  params = {"encoder": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}, "head": {"kernel": jnp.ones(3)}}
  optimizer = adam(multipliers=(("encoder/bias", 0.0), ("encoder", 0.5)))
  after = apply(optimizer, params, params)
  moved = {name: float(1 - leaf[0]) for name, leaf in tree.flatten(after).items()}
  assert moved == pytest.approx({"encoder/kernel": 0.05, "encoder/bias": 0.0, "head/kernel": 0.1}, rel=1e-4)
  with pytest.raises(UserError, match="'decoder' applies to no parameter"):
    adam(multipliers=(("decoder", 0.5),)).make_transform(optax.constant_schedule(1.0), params)


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_adafactor_is_that_of_optax(b1):
  rng = np.random.default_rng(0)
  params = {"kernel": rng.normal(size=(128, 160)), "bias": rng.normal(size=160)}
  params = jax.tree.map(np.float32, params)
  ours = adam(name="adafactor", b1=b1).make_transform(optax.constant_schedule(0.1), params)
  theirs = optax.adafactor(0.1, multiply_by_parameter_scale=False, momentum=b1 or None)
  found, states = [params, params], [ours.init(params), theirs.init(params)]
  for i in range(3):
    gradient = jax.tree.map(lambda x, i=i: np.sin(x + i), params)
    for j, transform in enumerate((ours, theirs)):
      updates, states[j] = jax.jit(transform.update)(gradient, states[j], found[j])
      found[j] = optax.apply_updates(found[j], updates)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *found)
  # Of a matrix's second moment it keeps rows and columns.
  assert tree.count(states[0]) < (128 * 160 if b1 else 0) + 1000


def test_clipping_is_by_the_norm_of_the_group():
  params = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
  transform = adam(clip_norm=1.0).make_transform(optax.constant_schedule(1.0), params)
  _, opt_state = transform.update(params, transform.init(params), params)
  moment = optax.tree.get(opt_state, "mu")
  assert_close(moment, {"a": np.array([0.06]), "b": np.array([0.08])}, 1e-6)


def test_schedules():
  batch, examples, total = 64, 640, 100
  cosine = optim.Optimizer(base_learning_rate=0.4, warmup_steps=20, end_learning_rate=0.01)
  rate = cosine.make_schedule(total, batch, examples)
  peak = 0.4 * batch / 256
  for step, expected in (
    (0, 0),
    (10, peak / 2),
    (20, peak),
    (60, (peak + 0.01) / 2),
    (100, 0.01),
    (150, 0.01),
  ):
    assert rate(step) == pytest.approx(expected, abs=1e-6), step
  # Two epochs of ten steps are as long.
  epochs = optim.Optimizer(base_learning_rate=0.4, warmup_epochs=2.0, end_learning_rate=0.01)
  assert epochs.make_schedule(total, batch, examples)(15) == pytest.approx(rate(15))
  # The linear-scaling rule.
  assert cosine.make_schedule(total, 4 * batch, examples)(20) == pytest.approx(4 * peak)
  constant = adam(warmup_steps=10).make_schedule(total, batch, examples)
  assert [float(constant(step)) for step in (0, 5, 10, 99)] == pytest.approx([0, 0.05, 0.1, 0.1])
  assert adam().make_schedule(total, batch, examples)(0) == pytest.approx(0.1)
  assert optim.Optimizer(learning_rate=0.1).make_schedule(total, batch, examples)(0) == pytest.approx(0.1)


def test_wrong_optimizers_are_refused():
  for options in ({}, dict(learning_rate=0.1, base_learning_rate=0.1)):
    with pytest.raises(UserError, match="learning_rate, or base_learning_rate"):
      optim.Optimizer(**options)
  with pytest.raises(UserError, match=r"'cosinus'.*did you mean 'cosine'"):
    adam(schedule="cosinus")
  with pytest.raises(UserError, match="warmup_steps is 100: it must be less than the 100 steps of the run"):
    adam(warmup_steps=100).make_schedule(100, 32, 1000)
  with pytest.raises(UserError, match="warmup_epochs is 312 steps: it must be less than the 100 steps"):
    adam(warmup_epochs=10).make_schedule(100, 32, 1000)
  with pytest.raises(UserError, match="warmup_steps and warmup_epochs are both set"):
    adam(warmup_steps=1, warmup_epochs=1.0).make_schedule(100, 32, 1000)
