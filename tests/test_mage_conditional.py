"""Class-conditional MAGE: the decoder's condition, what is trained, guidance, users' labels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

import maskgen
from maskgen import main, objectives, storage, tree
from maskgen.benchmarks.dataless import NoData
from maskgen.costs import flops
from maskgen.errors import UserError
from maskgen.models.mage import Mage
from maskgen.numerics import sampling
from maskgen.numerics.vocab import Vocab
from maskgen.tools import edit, export, generate, sampling_flags
from maskgen.training.experiment import Experiment

trained = tiny.trained

CLASSES = 10
WIDTH = 8
OPTIONS = dict(steps=2, temperature=1.0)


def section(**changes) -> dict:
  """The plain config of a conditional stage to go with those of `tiny`."""
  config = tiny.stage("mage")
  objective = {"name": "mage_conditional", "classes": CLASSES, "condition_width": WIDTH, **changes}
  config["objective"] = {**config["objective"], **objective}
  evals = dict(
    generation=dict(type="generation", every_steps=100, num_images=20, classifier="svc", num_pictures=20),
    samples=dict(type="samples", every_steps=100, num_generated=20, num_examples=4),
  )
  return {**config, "pretrained": {"mage": "stage:mage"}, "evals": evals}


def build(**changes):
  return objectives.build(section(**changes)["objective"])


def random_variables(objective, seed=0):
  """Variables with random values for every parameter, so that no zero hides another."""
  shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())
  leaves, structure = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return jax.tree.unflatten(
    structure, [0.5 * jax.random.normal(*pair) for pair in zip(keys, [x.shape for x in leaves], strict=True)]
  )


@pytest.fixture(scope="module")
def objective():
  return build(dropout=0.0, layout=4)


@pytest.fixture(scope="module")
def variables(objective):
  return random_variables(objective)


def example(objective, batch=4, seed=0):
  """Keys, labels, codes, and a mask that hides about half of them."""
  rng = np.random.default_rng(seed)
  shape = (batch, objective.num_tokens)
  return {
    "key": jax.random.split(jax.random.key(seed), batch),
    "label": rng.integers(0, CLASSES, batch).astype(np.int32),
    "tokens": rng.integers(0, objective.codebook_size, shape).astype(np.int32),
    "token_mask": rng.random(shape) < 0.5,
  }


# The slot


@pytest.fixture(scope="module")
def networks():
  """A network without a condition, one with it, and parameters of the latter."""
  sizes = dict(width=16, depth=1, heads=2, decoder_width=16, decoder_depth=2, decoder_heads=2)
  plain = Mage(Vocab(32), 16, **sizes)
  slotted = plain.clone(condition_width=WIDTH)
  tokens = jnp.zeros((1, 16), jnp.int32)
  return plain, slotted, slotted.init(jax.random.key(0), tokens, tokens > 0)["params"]


def inputs():
  rng = np.random.default_rng(0)
  return rng.integers(0, 32, (3, 16)), rng.random((3, 16)) < 0.5


def test_an_embedding_table_can_start_from_the_codes():
  plain = tiny.stage("mage")["objective"]
  random, embedded = objectives.build(plain), objectives.build({**plain, "embed_codes": True})
  rng = np.random.default_rng(0)
  tokenizer = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), random.pretrained_shapes())
  codes = np.array(tokenizer["tokenizer"]["params"]["generator"]["codebook"])
  codes[1] = codes[0]
  tokenizer["tokenizer"]["params"]["generator"]["codebook"] = codes
  theirs, ours = (made.init(jax.random.key(0), tokenizer)["params"]["main"] for made in (random, embedded))
  table = np.asarray(ours["embedding"])
  np.testing.assert_array_equal(table[len(codes) :], theirs["embedding"][len(codes) :])
  np.testing.assert_allclose(table[0], table[1], rtol=1e-5)
  assert np.square(table[: len(codes)]).sum(axis=1).mean() == pytest.approx(4.0, rel=0.3)
  # A projection is linear.
  rows, centred = table[: len(codes)], codes - codes.mean(axis=0)
  projection, *_ = np.linalg.lstsq(centred, rows, rcond=None)
  np.testing.assert_allclose(centred @ projection, rows, atol=1e-4)
  nothing = jax.tree.map(jnp.zeros_like, tokenizer)
  tiny.assert_same_bits(embedded.init(jax.random.key(0), nothing), random.init(jax.random.key(0), nothing))
  with pytest.raises(UserError, match="embed_codes has no effect here: set it in the MAGE"):
    build(embed_codes=True)
  tiny.assert_same_bits({**ours, "embedding": table[-1:]}, {**theirs, "embedding": table[-1:]})


def test_a_slot_that_is_not_used_changes_no_number(networks):
  plain, slotted, params = networks
  without = {name: value for name, value in params.items() if name != "condition_input"}
  fresh = plain.init(jax.random.key(0), *inputs())["params"]
  assert tree.flatten(fresh).keys() == tree.flatten(without).keys()
  tiny.assert_same_bits(fresh, without)
  expected = plain.apply({"params": without}, *inputs())
  found = slotted.apply({"params": params}, *inputs(), method="code_logits")
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("length", [1, 5])
def test_a_condition_of_any_length_reaches_every_position(networks, length):
  _, slotted, params = networks
  condition = np.random.default_rng(1).normal(size=(3, length, WIDTH)).astype(np.float32)

  def logits(condition):
    return slotted.apply({"params": params}, *inputs(), None, condition, method="code_logits")

  found = logits(condition)
  assert found.shape == (3, 16, 32)
  changed = logits(condition * np.array([1, -1, 1])[:, None, None])
  assert (np.abs(found - changed)[1] > 1e-6).any(axis=-1).all()
  np.testing.assert_array_equal(np.delete(changed, 1, axis=0), np.delete(found, 1, axis=0))
  # It has no position of its own.
  np.testing.assert_allclose(logits(condition[:, ::-1]), found, atol=1e-5)


# Training


def test_only_the_decoder_and_the_classes_are_trained(objective):
  parts = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())
  main_names = {name.split("/")[0] for name in tree.flatten(parts["params"]["main"])}
  assert main_names == {
    *("decoder", "decoder_input", "decoder_norm", "decoder_position"),
    *("head", "head_bias", "head_norm"),
    *("condition_input", "class_embedding", "layout_hidden", "layout_output"),
  }
  assert parts["frozen"]["encoder"].keys() == {
    *("embedding", "position", "embedding_norm", "encoder", "encoder_norm")
  }
  assert parts["params"]["main"]["class_embedding"].shape == (CLASSES + 1, WIDTH)


def test_the_decoder_starts_where_the_pretrained_one_ended(objective):
  shapes = objective.pretrained_shapes()
  given = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.25, leaf.dtype), shapes)
  parts = objective.init(jax.random.key(0), given)
  network = {**parts["frozen"]["encoder"], **parts["params"]["main"]}
  names = ("condition_input", "class_embedding", "layout_hidden", "layout_output")
  new = {name: network.pop(name) for name in names}
  tiny.assert_same_bits(network, given["mage"]["params"]["main"])
  assert all(np.std(leaf) > 0 for leaf in (new["class_embedding"], new["condition_input"]["kernel"]))


def dropped(objective, keys):
  return np.asarray(jax.vmap(objective._drops)(keys))


def test_the_share_of_examples_without_a_class():
  keys = jax.random.split(jax.random.key(0), 4000)
  assert not dropped(build(condition_dropout=0.0), keys).any()
  assert dropped(build(condition_dropout=0.25), keys).mean() == pytest.approx(0.25, abs=0.03)


def test_without_its_class_an_example_is_the_last_row(variables):
  """With nearly all classes dropped, the training loss is that without a class and ignores classes."""
  objective = build(dropout=0.0, condition_dropout=0.999999)

  def loss(label, train):
    batch = {**example(objective), "label": np.full(4, label)}
    params, frozen = variables["params"], variables["frozen"]
    return objective.losses(params, frozen, {}, batch, jax.random.key(0), 0, train=train)[0]["main"]

  assert loss(3, train=True) == loss(7, train=True) == loss(CLASSES, train=False)
  assert loss(3, train=False) != loss(7, train=False)


def test_whether_a_class_is_dropped_does_not_depend_on_the_batch(variables):
  objective = build(dropout=0.0, condition_dropout=0.5)
  batch = example(objective, batch=8)

  @jax.jit
  def loss(part):
    params, frozen = variables["params"], variables["frozen"]
    return objective.losses(params, frozen, {}, part, jax.random.key(0), 0, train=True)[0]["main"]

  halves = [loss({name: value[rows] for name, value in batch.items()}) for rows in (np.s_[:4], np.s_[4:])]
  np.testing.assert_allclose(np.mean(halves), loss(batch), rtol=1e-5)


# Guidance


def test_guide_weighs_the_two_answers():
  conditional, unconditional = jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0])

  def guided(scale, schedule="constant", t=0.5):
    return sampling.guide(
      conditional, unconditional, jnp.float32(t), guidance=scale, guidance_schedule=schedule
    )

  np.testing.assert_array_equal(guided(1.0), conditional)
  np.testing.assert_array_equal(guided(0.0), unconditional)
  np.testing.assert_allclose(guided(3.0), unconditional + 3 * (conditional - unconditional))
  np.testing.assert_allclose(guided(3.0, "linear", 0.25), guided(1.5))
  for schedule in sampling.GUIDANCE_SCHEDULES.values():
    shares = np.array([schedule(jnp.float32(t)) for t in np.linspace(0, 1, 20)])
    assert shares[-1] == pytest.approx(1) and (np.diff(shares) >= 0).all() and shares[0] >= 0
  for schedule in ("linear", "cosine"):
    np.testing.assert_array_equal(guided(5.0, schedule, 0.0), conditional)


@pytest.fixture(scope="module")
def guided(objective, variables):
  """Logits at a guidance scale; `label` is None for a batch without labels."""

  def run(scale, label="of the batch"):
    batch = example(objective)
    batch = {"key": batch["key"]} if label is None else batch
    given = example(objective)
    logits_fn = objective.logits_fn(variables, batch, scale, "constant")
    return np.asarray(logits_fn(given["tokens"], given["token_mask"], jnp.float32(0.0)))

  return run


def test_guidance_of_1_is_the_class_and_of_0_no_class(guided):
  conditional, unconditional = guided(1.0), guided(1.0, label=None)
  assert np.abs(conditional - unconditional).max() > 1e-3
  np.testing.assert_allclose(guided(jnp.float32(1.0)), conditional, atol=1e-4)
  np.testing.assert_array_equal(guided(0.0), unconditional)
  np.testing.assert_allclose(guided(jnp.float32(0.0)), unconditional, atol=1e-4)
  expected = unconditional + 3 * (conditional - unconditional)
  np.testing.assert_allclose(guided(3.0), expected, atol=1e-3)


@pytest.mark.parametrize("reuse", [1, 2])
def test_scales_of_0_and_1_decode_once(objective, variables, reuse):
  generate = objectives.compile_predict_fns(objective)["generate"]
  batch = {"key": example(objective)["key"], "label": jnp.zeros(len(example(objective)["key"]), jnp.int32)}

  def cost(**options):
    return flops.count(functools.partial(generate, steps=2, reuse=reuse, **options), variables, batch, None)

  assert cost() == cost(guidance=1) == cost(guidance=np.float32(1.0), guidance_schedule="linear")
  # The embedding of a class is a product; that of no class is not.
  assert cost(guidance=0.0) == pytest.approx(cost(), rel=0.02)
  both = cost(guidance=3.0)
  assert both > 1.2 * cost() and both == cost(guidance=0.0, guidance_schedule="linear")


def test_without_a_label_there_is_nothing_to_be_guided_by(guided):
  np.testing.assert_array_equal(guided(3.0, label=None), guided(1.0, label=None))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_features_are_reused_with_guidance(objective, variables, scale):
  given = example(objective)
  tokens, mask = given["tokens"], given["token_mask"]
  everything = jnp.tile(jnp.arange(tokens.shape[1])[None], (len(tokens), 1))
  reusing = objective.reusing_fn(variables, given, scale, "linear")
  full = objective.logits_fn(variables, given, scale, "linear")
  first, again = reusing(tokens, mask, jnp.float32(0.5))
  np.testing.assert_array_equal(first, full(tokens, mask, jnp.float32(0.5)))
  # With one block, what the condition adds to the cache does not depend on the tokens.
  after = again(tokens, ~mask, everything, jnp.float32(0.75))
  np.testing.assert_allclose(after, full(tokens, ~mask, jnp.float32(0.75)), atol=2e-3)
  some = again(tokens, ~mask, everything[:, 1:4], jnp.float32(0.75))
  assert some.shape == (len(tokens), 3, objective.codebook_size)
  assert np.abs(some - after[:, 1:4]).max() > 1e-3


# A run, and the model that it gives


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
  """A trained conditional stage, with its experiment's starting point: (workdir, frozen at the start)."""
  root = tmp_path_factory.mktemp("conditional")
  for stage in tiny.STAGES:
    (root / stage).symlink_to(trained / stage)
  path = root / "config.py"
  path.write_text(
    f"import ml_collections\n\ndef get_config(arg=None):\n  return ml_collections.ConfigDict({section()!r})\n"
  )
  workdir = root / "conditional"
  main.main([f"--config={path}", f"--workdir={workdir}"])
  return workdir


@pytest.fixture(scope="module")
def model(run):
  return maskgen.load(run)


@pytest.fixture(scope="module")
def mage(trained):
  return maskgen.load(trained / "mage")


def test_the_encoder_stays_what_it_was(model, mage):
  before = mage.variables["params"]["main"]
  frozen = model.variables["frozen"]
  tiny.assert_same_bits(frozen["encoder"], {name: before[name] for name in frozen["encoder"]})
  tiny.assert_same_bits(frozen["tokenizer"], mage.variables["frozen"]["tokenizer"])
  images = np.random.default_rng(0).integers(0, 256, (2, *tiny.SIZE, 3), np.uint8)
  np.testing.assert_array_equal(model.features(images), mage.features(images))
  after = model.variables["params"]["main"]
  for name in ("head", "decoder", "decoder_position"):
    assert all(
      (np.asarray(a) != np.asarray(b)).any()
      for a, b in zip(jax.tree.leaves(after[name]), jax.tree.leaves(before[name]), strict=True)
    )


def test_the_optimizer_knows_the_trained_parameters_alone(run):
  experiment = Experiment(section())
  state = experiment.targets["state"]
  names = {*tree.flatten(state.opt_state), *tree.flatten(state.params), *tree.flatten(state.ema)}
  assert not [name for name in names if "/encoder" in name or "tokenizer" in name]


def test_evaluations_tell_classes_apart(run):
  results = (run / "results.json").read_text()
  assert '"generation/svc_agreement"' in results and '"generation/frechet_pixels"' in results
  made = {path.name.rpartition("_")[0] for path in (run / "samples").iterdir()}
  assert {"generation_generated", "generation_generated_by_class", "samples_generated"} <= made


def test_the_class_matters_and_none_is_no_class(model):
  some = model.generate(batch=2, label=[3, 7], guidance=20.0, **OPTIONS)
  assert np.abs(some - model.generate(batch=2, label=[7, 3], guidance=20.0, **OPTIONS)).max() > 1e-3
  np.testing.assert_array_equal(
    model.generate(batch=2, guidance=20.0, **OPTIONS), model.generate(batch=2, **OPTIONS)
  )


def test_a_run_stores_the_names_of_its_classes(model, mage):
  assert len(model.classes) == CLASSES and "red disc" in model.classes
  assert mage.classes is None and "classes" not in mage.config


def test_classes_have_names(variables, tmp_path):
  names = ["cat", "dog, brown", "2", *map(str, range(7))]
  config = {"objective": section(dropout=0.0)["objective"], "classes": names}
  storage.write_export(tmp_path / "first", config, variables)
  export.main([f"--model={tmp_path / 'first'}", f"--out={tmp_path / 'export'}"])
  model = maskgen.load(tmp_path / "export")
  assert model.classes == tuple(names)
  first, *others = (
    model.generate(label=label, guidance=20.0, **OPTIONS)
    for label in ([0, 2], ["cat", 2], np.array(["cat", "2"]))
  )
  for other in others:
    np.testing.assert_array_equal(other, first)
  for text, numbers in (("cat", [0]), ("dog, brown", [1]), ("2,cat,9", [2, 0, 9]), ("all", list(range(10)))):
    assert sampling_flags.read_labels(text, model) == numbers
  for call in (sampling_flags.read_labels, lambda text, model: model.generate(label=["dog, brown", text])):
    with pytest.raises(UserError, match=r"label is 'cta': .* did you mean 'cat'"):
      call("cta", model)
  files = [f"--model={tmp_path / 'export'}", f"--out={tmp_path / 'out.png'}"]
  Image.new("RGB", tiny.SIZE).save(tmp_path / "in.png")
  with pytest.raises(UserError, match="--label=all: give one class"):
    edit.main([*files, f"--image={tmp_path / 'in.png'}", "--box=0,0,4,4", "--label=all"])
  nameless = type(model)({"objective": config["objective"]}, model.objective, model.variables)
  with pytest.raises(UserError, match="does not store the names of its classes, give numbers"):
    nameless.generate(label="cat")


def test_an_image_depends_on_seed_number_and_label_alone(model):
  many = model.generate(seed=3, label=[5, 1, 2], guidance=2.0, **OPTIONS)
  assert len(many) == 3
  np.testing.assert_array_equal(many, model.generate(seed=3, label=[5, 1, 2], guidance=2.0, **OPTIONS))
  few = model.generate(seed=3, batch=2, label=[5, 1], guidance=2.0, **OPTIONS)
  np.testing.assert_allclose(few, many[:2], atol=1e-4)
  one = model.generate(seed=3, batch=1, label=5, guidance=2.0, **OPTIONS)
  np.testing.assert_allclose(one, many[:1], atol=1e-4)
  options = dict(seed=3, guidance=20.0, reuse=2, **OPTIONS)
  reused = [model.generate(label=label, **options) for label in ([5, 1], [5, 9])]
  np.testing.assert_array_equal(reused[0][0], reused[1][0])
  assert np.abs(reused[0][1] - reused[1][1]).max() > 1e-3


def test_inpaint_takes_a_label_and_keeps_known_pixels(model):
  images = np.random.default_rng(0).random((2, *tiny.SIZE, 3), np.float32)
  hole = np.zeros(tiny.SIZE, bool)
  hole[12:, 12:] = True
  filled = [model.inpaint(images, hole, label=label, guidance=20.0, **OPTIONS) for label in (3, [7, 7])]
  for result in filled:
    np.testing.assert_array_equal(result[:, ~hole], images[:, ~hole])
  assert np.abs(filled[0] - filled[1]).max() > 1e-3


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(label=10), r"ranges over 10\.\.10: classes are 0\.\.9"),
    (dict(label=[0, -1]), r"-1\.\.0"),
    (dict(label=[1, 2, 3], batch=2), "3 entries for 2 images"),
    (dict(label=1.5), "give an integer"),
    (dict(label=[1, [2]]), "label is ragged: give a number or a name"),
    (dict(guidance=-1.0), "guidance"),
    (dict(guidance_schedule="linea"), "did you mean 'linear'"),
  ],
)
def test_wrong_labels_and_guidance_are_refused(model, options, message):
  with pytest.raises(UserError, match=message):
    model.generate(**options)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(label=1), "label is given: this model was trained without classes"),
    (dict(guidance=2.0), "guidance is 2.0: guidance needs a model with classes or captions"),
  ],
)
def test_a_model_without_classes_refuses_them(mage, options, message):
  with pytest.raises(UserError, match=message):
    mage.generate(**options)


def test_the_generate_tool_shows_a_row_per_class(run, trained, tmp_path, capsys):
  out = tmp_path / "classes.png"
  generate.main([f"--model={run}", f"--out={out}", "--label=all", "--count=20", "--guidance=2", "--steps=2"])
  assert out.exists() and "wrote 20 images" in capsys.readouterr().out
  tall = Image.open(out).size
  assert tall[0] < tall[1] / 3
  generate.main([f"--model={run}", f"--out={out}", "--label=all", "--count=10", "--guidance=2", "--steps=2"])
  square = Image.open(out).size  # one image of each
  assert square[0] > square[1] / 2
  generate.main([f"--model={run}", f"--out={out}", "--label=3", "--count=2", "--steps=2"])
  assert "wrote 2 images" in capsys.readouterr().out.splitlines()[-1]
  for model, label, message in (
    (run, "a", "no class of this name"),
    (trained / "mage", "1", "without classes"),
  ):
    with pytest.raises(UserError, match=message):
      generate.main([f"--model={model}", f"--out={out}", f"--label={label}"])


# Configs


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(classes=0), "classes"),
    (dict(condition_width=0), "condition_width"),
    (dict(condition_dropout=1.0), "condition_dropout is 1.0"),
  ],
)
def test_wrong_fields_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    build(**changes)


def test_guidance_needs_classes():
  config = tiny.stage("mage")["objective"]
  with pytest.raises(UserError, match=r"sampling\.guidance is 2\.0: guidance needs a model with classes"):
    objectives.build({**config, "sampling": {"guidance": 2.0}})
  assert build(sampling={"guidance": 2.0}).sampling.guidance == 2.0


def test_another_number_of_classes_is_refused():
  with pytest.raises(UserError, match=r"config\.data has 10 classes, but config\.objective\.classes is 7"):
    Experiment(section(classes=7))


def test_data_without_labels_is_refused():
  with pytest.raises(UserError, match="provides no labels, but objective 'mage_conditional' needs them"):
    Experiment({**section(), "evals": {}}, data=NoData(objectives.build(tiny.stage("mage")["objective"])))


def test_what_is_pretrained_must_be_the_same_network(objective, trained):
  found = maskgen.load(trained / "mage").config
  objective.check_pretrained("mage", found)
  with pytest.raises(UserError, match=r"its objective has depth=1, .* has 2"):
    dataclasses.replace(objective, depth=2).check_pretrained("mage", found)
  with pytest.raises(UserError, match="it is not an unconditional MAGE"):
    objective.check_pretrained("mage", maskgen.load(trained / "tokenizer").config)
