"""Classification on top of a MAGE encoder: the objective, its optimizers, its evaluator, its configs."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import tiny
from etils import epath

import maskgen
from maskgen import config as config_lib
from maskgen import main, objectives, sharding, storage, tree
from maskgen.benchmarks import dataless
from maskgen.errors import UserError
from maskgen.evaluators.accuracy import Evaluator
from maskgen.models.transformer import Transformer
from maskgen.numerics import losses
from maskgen.objectives import classify
from maskgen.training import optim
from maskgen.training.experiment import Experiment
from maskgen.training.pretrained import complete, stored_first
from maskgen.training.sections import find_type
from maskgen.training.state import TrainState
from maskgen.training.step import make_update

trained = tiny.trained

BATCH, CLASSES, WIDTH = 16, 10, 16
ENCODER = tiny.stage("mage")["objective"]
# As configs were written when classifiers were for MAGE alone.
RESTATED = {key: ENCODER[key] for key in ("image_size", "tokenizer", "width", "depth", "heads")}


def build(**changes) -> objectives.Objective:
  return objectives.build(dict(name="classify", encoder=ENCODER, classes=CLASSES) | changes)


PROBE = dict(trained="head", norm="batch")


def make_parts(objective, seed: int = 0):
  """The result of `init` with a random encoder."""
  rng = np.random.default_rng(seed)
  pretrained = jax.tree.map(
    lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), objective.pretrained_shapes()
  )
  return objective.init(jax.random.key(seed), pretrained)


def make_batch(seed: int = 3):
  rng = np.random.default_rng(seed)
  return {
    "image": rng.integers(0, 256, (BATCH, 16, 16, 3), dtype=np.uint8),
    "label": rng.integers(0, CLASSES, BATCH, dtype=np.int32),
    "key": jax.random.split(jax.random.key(seed), BATCH),
  }


def compute(objective, parts, batch, *, train: bool, extra=None):
  fn = jax.jit(lambda *args: objective.losses(*args, jnp.int32(0), train=train))
  extra = parts["extra"] if extra is None else extra
  return fn(parts["params"], parts["frozen"], extra, batch, jax.random.key(5))


# What is trained


def test_a_probe_trains_only_the_head():
  parts = make_parts(build(**PROBE))
  assert set(tree.flatten(parts["params"])) == {"main/head/logits/kernel", "main/head/logits/bias"}
  assert set(parts["frozen"]) == {"tokenizer", "encoder"}
  assert set(tree.flatten(parts["extra"])) == {"batch_norm/mean", "batch_norm/var"}


def test_fine_tuning_trains_all_but_the_tokenizer():
  parts = make_parts(build())
  assert set(parts["params"]["main"]) == {"embedding", "position", "embedding_norm", "encoder", "head"}
  assert set(parts["frozen"]) == {"tokenizer"} and not parts["extra"]


def test_both_agree_on_the_features():
  batch = make_batch()
  features = []
  for changes in ({}, PROBE):
    objective = build(**changes)
    variables = make_parts(objective)
    features.append(objective.predict_fns()["features"](variables, batch, jax.random.key(0)))
  np.testing.assert_array_equal(*features)


def test_labels_are_smoothed_in_training_alone():
  objective = build(label_smoothing=0.1)
  parts = make_parts(objective)
  kernel = parts["params"]["main"]["head"]["logits"]["kernel"]
  parts["params"]["main"]["head"]["logits"]["kernel"] = kernel + jax.random.normal(
    jax.random.key(1), kernel.shape
  )
  batch = make_batch()
  p = objective.predict_fns()["classify"](parts, batch, jax.random.key(0))
  assert p.dtype == jnp.float32 and p.shape == (BATCH, CLASSES)
  np.testing.assert_allclose(p.sum(axis=1), 1.0, rtol=1e-5)
  plain = losses.cross_entropy(jnp.log(p), batch["label"])
  for train, expected in ((True, losses.cross_entropy(jnp.log(p), batch["label"], 0.1)), (False, plain)):
    values, metrics, _ = compute(objective, parts, batch, train=train)
    np.testing.assert_allclose(values["main"], expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (p.argmax(axis=1) == batch["label"]).mean())
  scores = objective.predict_fns()["loss"](parts, batch, jax.random.key(0))
  np.testing.assert_allclose(scores["loss"], plain, rtol=1e-4)


@pytest.mark.parametrize(("norm", "std"), [("layer", 2e-5), ("batch", 0.01)])
def test_heads_start_from_a_plain_normal(norm, std):
  """As timm's truncated normal, whose limits of -2 and 2 cut nothing off."""
  head = classify.Head(1000, norm, std)
  params = head.init(jax.random.key(0), jnp.zeros((1, 64)), train=False)["params"]
  kernel = np.asarray(params["logits"]["kernel"]).ravel() / std
  assert scipy.stats.kstest(kernel, "norm").pvalue > 0.01
  assert np.abs(kernel).max() > 3.5


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)], ids=str)
def test_mixed_targets_are_probabilities(alphas):
  objective = build(mixup=alphas[0], cutmix=alphas[1])
  batch = make_batch()
  mixed, targets = objective._mix(batch, jax.nn.one_hot(batch["label"], CLASSES))
  np.testing.assert_allclose(targets.sum(axis=1), 1.0, rtol=1e-5)
  assert (targets >= 0).all() and ((targets > 0).sum(axis=1) == 2).any()
  assert mixed["image"].dtype == jnp.float32 and float(mixed["image"].max()) <= 1.0
  assert objective.batch_spec().inputs.keys() == {"image"}  # codes cannot be mixed


def test_codes_replace_images():
  objective = build(**PROBE)
  parts, batch = make_parts(objective), make_batch()
  tokens = objective.predict_fns()["encode"](parts, batch, None)
  codes = {"tokens": tokens.astype(jnp.uint8), "label": batch["label"], "key": batch["key"]}
  expected, found = (compute(objective, parts, given, train=True)[0]["main"] for given in (batch, codes))
  np.testing.assert_allclose(found, expected, rtol=1e-6)


# Batch normalisation


@pytest.mark.slow
def test_running_statistics_converge_and_are_what_evaluation_uses():
  objective = build(**PROBE)
  parts, batch = make_parts(objective), make_batch()
  features = objective.predict_fns()["features"](parts, batch, None)
  extra = parts["extra"]
  for _ in range(130):
    *_, extra = compute(objective, parts, batch, train=True, extra=extra)
  np.testing.assert_allclose(extra["batch_norm"]["mean"], features.mean(axis=0), atol=2e-4)
  np.testing.assert_allclose(extra["batch_norm"]["var"], features.var(axis=0), atol=2e-4)
  # With the running statistics an example's result is its own.
  variables = {**parts, "extra": extra}
  whole = objective.predict_fns()["classify"](variables, batch, None)
  half = objective.predict_fns()["classify"](variables, {"image": batch["image"][:4]}, None)
  np.testing.assert_allclose(whole[:4], half, atol=1e-6)
  training, evaluation = (
    compute(objective, variables, batch, train=train)[0]["main"] for train in (True, False)
  )
  np.testing.assert_allclose(training, evaluation, rtol=1e-4)


def test_statistics_are_those_of_the_global_batch_on_any_mesh():
  objective = build(**PROBE)
  parts, batch = make_parts(objective), make_batch()
  expected = compute(objective, parts, batch, train=True)
  mesh = sharding.make_mesh(config_lib.Mesh())
  assert mesh.size == 8
  where = sharding.batch_sharding(mesh)
  parts = jax.device_put(parts, sharding.replicated(mesh))
  found = compute(objective, parts, jax.device_put(batch, where), train=True)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_accumulation_follows_the_statistics_of_each_micro_batch():
  objective = build(**PROBE)
  parts = make_parts(objective)
  batch = {key: value for key, value in make_batch().items() if key != "key"}
  section = optim.Optimizer(learning_rate=0.1, schedule="constant")
  schedule = section.make_schedule(10, BATCH, 100)
  transform = section.make_transform(schedule, parts["params"]["main"])
  state = TrainState(
    jnp.int32(0), parts["params"], {"main": transform.init(parts["params"]["main"])}, {}, parts["extra"]
  )
  update = make_update(objective, {"main": transform}, {"main": schedule}, seed=0, ema={}, accumulation=2)
  after, _ = jax.jit(update)(state, parts["frozen"], batch)
  features = objective.predict_fns()["features"](parts, batch, None)
  mean = jnp.zeros(WIDTH)
  for half in (features[0::2], features[1::2]):
    mean = 0.9 * mean + 0.1 * half.mean(axis=0)
  np.testing.assert_allclose(after.model_state["batch_norm"]["mean"], mean, atol=1e-6)
  # No state of an optimizer for what is frozen.
  assert tree.count(after.opt_state) <= 2 * tree.count(parts["params"]) + 2


# Drop path


def transformer(**options):
  model = Transformer(depth=3, heads=2, **options)
  x = jax.random.normal(jax.random.key(1), (64, 5, 8))
  return model, model.init(jax.random.key(0), x, train=False), x


def apply(model, variables, x, seed: int = 0, train: bool = True):
  return model.apply(variables, x, train=train, rngs={"dropout": jax.random.key(seed)})


def test_drop_path_is_off_at_evaluation_and_by_default():
  plain, variables, x = transformer()
  model, _, _ = transformer(drop_path=0.5)
  expected = apply(plain, variables, x)
  np.testing.assert_array_equal(apply(model, variables, x, train=False), expected)
  assert np.abs(apply(model, variables, x) - expected).max() > 0.01


@pytest.mark.parametrize("remat", ["none", "full"])
def test_drop_path_is_the_same_in_a_scan(remat):
  model, variables, x = transformer(drop_path=0.5)
  scanned, _, _ = transformer(drop_path=0.5, scan=True, remat=remat)

  def gradient(model):
    return jax.jit(jax.grad(lambda x: jnp.square(apply(model, variables, x)).sum()))(x)

  np.testing.assert_allclose(apply(scanned, variables, x), apply(model, variables, x), atol=1e-5)
  np.testing.assert_allclose(gradient(scanned), gradient(model), atol=1e-3)


def test_drop_path_skips_whole_examples_and_keeps_the_mean():
  model = Transformer(depth=2, heads=2, drop_path=0.5)  # the first block always runs
  x = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (1, 5, 8)), (4096, 5, 8))
  variables = model.init(jax.random.key(0), x[:1], train=False)
  one = Transformer(depth=1, heads=2)
  first = one.apply({"params": {"block_0": variables["params"]["block_0"]}}, x[:1], train=False)
  y = apply(model, variables, x) - first
  skipped = (np.abs(y) < 1e-6).all(axis=(1, 2))
  assert abs(skipped.mean() - 0.25) < 0.03  # both branches of the second block
  # The mean over draws of the attention branch alone is the branch.
  second = {"params": {"block_0": jax.tree.map(jnp.copy, variables["params"]["block_1"])}}
  second["params"]["block_0"]["mlp"]["down"] = jax.tree.map(
    jnp.zeros_like, second["params"]["block_0"]["mlp"]["down"]
  )
  silent = {"params": {**variables["params"], "block_1": second["params"]["block_0"]}}
  expected = one.apply(second, first, train=False)
  np.testing.assert_allclose(apply(model, silent, x).mean(axis=0), expected[0], atol=0.1)


# Optimizers


@pytest.mark.parametrize("decay,depth", [(0.65, 12), (0.75, 24)])
def test_layer_decay(decay, depth):
  names = ["embedding", "position", "embedding_norm/scale", "head/logits/kernel", "head/norm/scale"]
  names += [f"encoder/block_{i}/mlp/up/kernel" for i in range(depth)]
  factors = tree.first_match(dict.fromkeys(names, 0.0), optim.layer_decay(decay, depth), 1.0)
  assert factors["head/logits/kernel"] == factors["head/norm/scale"] == 1.0
  for layer in range(1, depth + 1):
    name = f"encoder/block_{layer - 1}/mlp/up/kernel"
    assert factors[name] == pytest.approx(decay ** (depth + 1 - layer))
  for name in names[:3]:
    assert factors[name] == pytest.approx(decay ** (depth + 1))


def test_layer_decay_names_the_parameters_of_the_objective():
  objective = build(encoder=ENCODER | dict(depth=2))
  groups, layers = make_parts(objective)["params"], objective.image_encoder.layers("main")
  factors = tree.first_match(groups["main"], optim.layer_decay(0.5, layers), 1.0)
  assert factors == tree.first_match(groups["main"], optim.layer_decay(0.5, 2), 1.0)
  assert set(factors.values()) == {0.125, 0.25, 0.5, 1.0}


def test_layer_decay_needs_a_trained_encoder():
  objective = build(**PROBE)
  section = optim.Optimizer(learning_rate=1e-3, layer_decay=0.5)
  shapes, layers = make_parts(objective)["params"]["main"], objective.image_encoder.layers("main")
  with pytest.raises(UserError, match="layer_decay is for a trained image encoder"):
    section.make_transform(section.make_schedule(10, 8, 100), shapes, layers)
  with pytest.raises(UserError, match="layer_decay is 2"):
    optim.Optimizer(learning_rate=1e-3, layer_decay=2.0)


def test_lars_against_the_formula():
  rng = np.random.default_rng(0)
  params = {"kernel": rng.normal(size=(4, 3)), "zero": np.zeros((2, 2)), "bias": rng.normal(size=3)}
  gradients = [{name: rng.normal(size=value.shape) for name, value in params.items()} for _ in range(3)]
  section = optim.Optimizer(
    name="lars", learning_rate=2.0, schedule="constant", warmup_steps=2, b1=0.9, weight_decay=0.1
  )
  schedule = section.make_schedule(10, 8, 100)
  found = jax.tree.map(jnp.float32, params)
  transform = section.make_transform(schedule, found)
  state = transform.init(found)
  momentum = dict.fromkeys(params, 0.0)
  for step, gradient in enumerate(gradients):
    updates, state = transform.update(jax.tree.map(jnp.float32, gradient), state, found)
    found = optax.apply_updates(found, updates)
    for name, w in params.items():
      g = gradient[name]
      if name != "bias":
        g = g + 0.1 * w
        if np.linalg.norm(w) > 0:
          g = g * 0.001 * np.linalg.norm(w) / np.linalg.norm(g)
      momentum[name] = 0.9 * momentum[name] + g
      params[name] = w - min(step, 2) * momentum[name]
  for name, value in params.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


# Errors before training


def section(**changes) -> dict:
  return (
    dict(
      objective=dict(name="classify", encoder=ENCODER, classes=10),
      data=dict(source="synthetic"),
      optimizer=dict(main=dict(learning_rate=1e-3)),
      batch_size=8,
      total_steps=2,
      pretrained=dict(encoder="nowhere"),
    )
    | changes
  )


def test_data_must_have_the_classes():
  unlabelled = objectives.build(tiny.stage("mage")["objective"])
  with pytest.raises(UserError, match="provides no labels, but objective 'classify' needs them"):
    Experiment(section(), data=dataless.NoData(unlabelled))
  seven = objectives.build(section()["objective"] | {"classes": 7})
  with pytest.raises(UserError, match=r"has 7 classes, but config\.objective\.classes is 10"):
    Experiment(section(), data=dataless.NoData(seven))


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(trained="haed"), "trained 'haed' does not exist; did you mean 'head'"),
    (dict(norm="group"), "norm 'group' does not exist"),
    (dict(trained="head", drop_path=0.1), "frozen encoder"),
    (dict(drop_path=1.0), "drop_path is 1"),
    (dict(mixup=-1.0), "mixup is -1.0"),
    (dict(classes=1), "classes is 1"),
  ],
)
def test_wrong_objectives_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    build(**changes)


def test_pretrained_must_be_the_encoder(trained):
  config = json.loads((trained / "mage" / "config.json").read_text())
  build().check_pretrained("encoder", config)
  with pytest.raises(UserError, match=r"it has encoder.network.width=16, config\.objective has 32"):
    build(encoder=ENCODER | dict(width=32)).check_pretrained("encoder", config)
  with pytest.raises(UserError, match="is 'tokenizer', which has no image encoder"):
    build().check_pretrained("encoder", json.loads((trained / "tokenizer" / "config.json").read_text()))


def test_restated_fields_are_the_encoders_section(caplog):
  old = objectives.build(dict(name="classify", classes=CLASSES, dtype="bfloat16", **RESTATED))
  assert caplog.text.count("now belong in config.objective.encoder") <= 1  # one warning in a process
  new = build(encoder=ENCODER | dict(dtype="bfloat16"))
  assert old.image_encoder == new.image_encoder
  assert tree.flatten(old.pretrained_shapes()) == tree.flatten(new.pretrained_shapes())


def test_a_section_is_taken_from_the_pretrained_model_once(trained, tmp_path):
  path = str(trained / "mage")
  encoder = dict(name="pretrained", remat="full")
  config = section(objective=dict(name="classify", encoder=encoder, classes=10), pretrained={"encoder": path})
  whole = complete(config, epath.Path(tmp_path))
  described = json.loads((trained / "mage" / "config.json").read_text())["objective"]
  assert whole["objective"]["encoder"] == described | dict(remat="full")
  encoder["tokenizer"] = dict(dtype="bfloat16")
  merged = complete(config, epath.Path(tmp_path))["objective"]["encoder"]
  assert merged == described | dict(remat="full", tokenizer=described["tokenizer"] | dict(dtype="bfloat16"))
  encoder["tokenizer"] = dict(dtpe="bfloat16")
  with pytest.raises(UserError, match=r"encoder\.tokenizer has no key 'dtpe'; did you mean 'dtype'\?$"):
    objectives.build(complete(config, epath.Path(tmp_path))["objective"])
  del encoder["tokenizer"]
  stages = dict(stages=("mage", "probe"), mage=dict(objective=described), probe=config)
  stages["probe"]["pretrained"] = {"encoder": "stage:mage"}
  assert complete(stages)["probe"]["objective"] == whole["objective"]
  # A run that continues needs the pretrained model no longer.
  config["pretrained"] = {"encoder": "gone"}
  with pytest.raises(UserError, match=r"config\.pretrained\.encoder=gone: model gone does not exist"):
    complete(config, epath.Path(tmp_path))
  (tmp_path / "config.json").write_text(json.dumps(whole | {"pretrained": {"encoder": "gone"}}))
  assert complete(config, epath.Path(tmp_path))["objective"] == whole["objective"]
  with pytest.raises(UserError, match=r"config\.pretrained\.encoder is missing"):
    complete(config | {"pretrained": {}}, epath.Path(tmp_path))


def test_an_export_with_restated_fields_loads_with_one_warning(tmp_path, caplog):
  parts = make_parts(build())
  section = dict(name="classify", classes=CLASSES, **RESTATED)
  storage.write_export(tmp_path / "old", {"objective": section}, parts)
  model = maskgen.load(tmp_path / "old")
  assert [record.getMessage() for record in caplog.records] == [
    f"config.objective: {', '.join(RESTATED)} now belong in config.objective.encoder: move them there"
  ]
  assert model.objective.image_encoder == build().image_encoder
  tiny.assert_same_bits(model.variables, parts)


@pytest.mark.parametrize("name", ["probe_mage", "finetune_mage", "fewshot_mage"])
def test_a_large_model_is_known_after_it_is_gone(tmp_path, name):
  model, root = tmp_path / "model", tmp_path / "run"
  for folder in (model, root):
    folder.mkdir()
  (model / "config.json").write_text(json.dumps({"objective": ENCODER | dict(width=1024, heads=16)}))

  def load() -> dict:
    with stored_first(epath.Path(root)):
      config = config_lib.to_dict(config_lib.load(f"configs/{name}.py:model={model}"))
    return complete(config, epath.Path(root))

  first = load()
  assert [first["objective"]["encoder"]["tokenizer"]["dtype"], first["objective"]["encoder"]["dtype"]] == [
    "bfloat16", "bfloat16",
  ]  # fmt: skip
  large = dict(base_learning_rate=0.05) if name == "probe_mage" else dict(layer_decay=0.75)
  assert large.items() <= first["optimizer"]["main"].items()
  (root / "config.json").write_text(json.dumps(first))
  (model / "config.json").unlink()
  assert load() == first


@pytest.mark.parametrize("name", ["probe_mage", "finetune_mage", "fewshot_mage"])
def test_recipes_follow_the_image_size_of_their_model(tmp_path, name):
  """Also at `tiny`, if data is given; crops keep their proportions."""
  (tmp_path / "config.json").write_text(json.dumps({"objective": ENCODER | dict(image_size=(32, 32))}))
  data = "path=/pictures,eval_split=test,classes=5"
  for form in ("", "tiny,"):
    config = config_lib.load(f"configs/{name}.py:{form}model={tmp_path},{data}")
    assert config.data.source == "folder:/pictures" and config.data.eval_split == "test"
    assert "random_resized_crop(32, (0.2, 1.0), 'bicubic'" in config.data.preprocess
    assert config.data.eval_preprocess == "decode(3)|resize_small(36, 'bicubic')|center_crop(32)"
    assert ("clamp" in config.data.preprocess) == (name == "probe_mage")
    assert config.objective.classes == 5


def test_recipes_take_an_encoder_without_a_tokenizer(tmp_path):
  vit = dict(image_size=(8, 8), patch=4, width=16, depth=1, heads=2)
  (tmp_path / "config.json").write_text(json.dumps({"network": "vit", "vit": vit}))
  config = complete(config_lib.to_dict(config_lib.load(f"configs/finetune_mage.py:model={tmp_path}")))
  assert config["objective"]["encoder"] == dict(
    name="vit", dtype="bfloat16", scan=True, **vit | dict(image_size=[8, 8])
  )


def test_an_old_run_describes_its_encoder(tmp_path):
  """Its config restates the fields of an encoder that is gone."""
  stored = dict(objective=dict(name="classify", classes=10, **RESTATED), pretrained=dict(mage="gone"))
  (tmp_path / "config.json").write_text(json.dumps(stored))
  encoder = dict(name="pretrained", tokenizer=dict(dtype="float32"))
  config = dict(objective=dict(name="classify", classes=10, encoder=encoder), pretrained=dict(encoder="gone"))
  completed = complete(config, epath.Path(tmp_path))
  assert objectives.build(completed["objective"]).image_encoder == build().image_encoder
  assert not config_lib.difference(stored, completed, find_type)


def test_random_batches_have_labels():
  experiment = dataless.build(section())
  for source in ("synthetic", "tokens"):
    batch = dataless.random_batch(experiment, source)
    assert batch["label"].shape == (8,) and int(batch["label"].max()) < 10


# The evaluator


@pytest.mark.parametrize("classes,numbers", [(3, {"top1": 0.5}), (8, {"top1": 0.5, "top5": 0.75})])
def test_accuracy_counts_valid_examples(classes, numbers):
  # The right class is the likeliest, the likeliest, the second or third, the last; then padding.
  ranks = np.array([0, 0, 2, classes - 1, 0, 0])
  labels = np.array([1, 0, 2, 1, 1, 1])
  scores = np.zeros((6, classes), np.float32)
  for row, (rank, label) in enumerate(zip(ranks, labels, strict=True)):
    others = [c for c in range(classes) if c != label]
    order = [*others[:rank], label, *others[rank:]]
    scores[row, order] = np.linspace(1, 0, classes)
  batch = {"label": jnp.asarray(labels), "valid": jnp.arange(6) < 4, "image": jnp.zeros(6)}
  context = SimpleNamespace(
    predict={"classify": lambda v, b, r: jnp.asarray(scores)},
    batches=lambda split: iter([batch]),
    class_names=tuple(map(str, range(classes))),
  )
  assert Evaluator(context).run(None, jax.random.key(0)).numbers == pytest.approx(numbers)
  with pytest.raises(UserError, match="no labels"):
    Evaluator(SimpleNamespace(class_names=None, lacks={}))


# Whole runs


@pytest.mark.parametrize(
  ("changes", "encoder", "name"),
  [(PROBE, dict(encoder=dict(name="pretrained")), "encoder"), ({}, RESTATED, "mage")],
  ids=["probe", "fine-tuning with restated fields"],
)
def test_a_run_starts_from_the_trained_encoder(trained, tmp_path, changes, encoder, name):
  stage = tiny.stage("mage")
  config = {key: stage[key] for key in ("seed", "batch_size", "data", "mesh")} | dict(
    objective=dict(name="classify", classes=10, **encoder, **changes),
    pretrained={name: str(trained / "mage")},
    optimizer=dict(main=dict(name="lars", learning_rate=1.0, schedule="constant")),
    total_steps=3,
    log_every_steps=1,
    evals=dict(accuracy=dict(type="accuracy", every_steps=3), loss=dict(type="loss", every_steps=3)),
  )
  file = tmp_path / "config.py"
  file.write_text(
    f"import ml_collections\ndef get_config(arg=None):\n  return ml_collections.ConfigDict({config!r})\n"
  )
  main.main([f"--config={file}", f"--workdir={tmp_path / 'run'}"])
  results = json.loads((tmp_path / "run" / "results.json").read_text())
  assert set(results) == {"accuracy/top1", "accuracy/top5", "loss/loss", "loss/accuracy"}
  assert results["loss/accuracy"] == pytest.approx(results["accuracy/top1"])

  model, source = maskgen.load(tmp_path / "run"), maskgen.load(trained / "mage")
  where = model.variables["frozen"]["encoder"] if changes else model.variables["params"]["main"]
  same = [
    np.array_equal(leaf, tree.flatten(source.variables["params"]["main"])[name])
    for name, leaf in tree.flatten(where).items()
    if not name.startswith("head/")
  ]
  assert all(same) if changes else not any(same)
  p = model.classify(np.zeros((2, 16, 16, 3), np.uint8))
  assert p.shape == (2, 10) and p.dtype == np.float32
  np.testing.assert_allclose(p.sum(axis=1), 1.0, rtol=1e-5)
  with pytest.raises(UserError, match="of objective 'classify' has no patch tokens: leave patches out"):
    model.features(np.zeros((2, 16, 16, 3), np.uint8), patches=True)
