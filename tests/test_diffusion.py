"""Text-to-image models from scratch: what is trained, users' prompts, how captions are measured."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import maskgen
from maskgen import config as config_lib
from maskgen import evaluators, main, objectives, tree
from maskgen.benchmarks.dataless import NoData
from maskgen.data import digit_scenes as scenes
from maskgen.data.pipeline import Data
from maskgen.errors import UserError
from maskgen.models.patches import Patches
from maskgen.numerics import diffusion
from maskgen.tools import bench, generate, sweep
from maskgen.training.experiment import Experiment

CONFIG = "configs/diffusion_digits.py:debug"
WORDS = "a red blue three five on background"


def plain(**overrides):
  return config_lib.to_dict(
    config_lib.load(CONFIG, {key.replace("__", "."): v for key, v in overrides.items()})
  )


def build(**changes):
  section = plain()["objective"]
  unet = dict(channels=(4,), layers=1, depths=(0,), heads=(1,), groups=2, layout=2)
  encoder = dict(width=8, depth=1, heads=2, hidden=8)
  given = dict(
    image_size=(8, 8),
    patch=2,
    captions=dict(text_tokenizer=f"list:{WORDS}", length=6),
    unet=unet,
    text_encoder=encoder,
    sampling=dict(steps=2, sampler="ddim", guidance=2.0),
  )
  return objectives.build({**section, **given, **changes})


@pytest.fixture(scope="module")
def objective():
  return build()


@pytest.fixture(scope="module")
def params(objective):
  """Random values for every parameter, so that no zero hides another."""
  shapes = jax.eval_shape(objective.init, jax.random.key(0), {})["params"]["main"]
  rng = np.random.default_rng(0)

  def draw_leaf(path, leaf):
    fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 10
    return np.float32(rng.normal(size=leaf.shape) / np.sqrt(fan_in) + tree.path_name(path).endswith("scale"))

  return jax.tree_util.tree_map_with_path(draw_leaf, shapes)


def example(objective, batch=4, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "image": rng.integers(0, 256, (batch, *objective.image_shape)).astype(np.uint8),
    "caption": objective.captions.read(["a red three", "a blue five", "", "five on red"][:batch]),
    "key": jax.random.split(jax.random.key(seed), batch),
  }


@functools.partial(jax.jit, static_argnums=(0, 3))
def train_loss(objective, params, batch, train=True):
  variables = ({"main": params}, {}, {}, batch, jax.random.key(0), jnp.int32(0))
  losses, _, _ = objective.losses(*variables, train=train)
  return losses["main"]


# What is trained


def test_every_parameter_is_trained(objective, params):
  gradient = jax.grad(train_loss, argnums=1)(objective, params, example(objective), False)
  assert set(params) == {"text_encoder", "unet", "vae"} and not params["vae"]
  for name, value in tree.flatten(gradient).items():
    assert np.abs(value).max() > 0, name


def test_the_share_without_captions(objective, params):
  batch = example(objective)
  empty = {**batch, "caption": objective.captions.read([""] * 4)}
  never, mostly = (dataclasses.replace(objective, caption_dropout=share) for share in (0.0, 0.999))
  with_captions, without = (
    train_loss(objective, params, batch, False),
    train_loss(objective, params, empty, False),
  )
  assert abs(with_captions - without) > 1e-4
  np.testing.assert_allclose(train_loss(never, params, batch), with_captions, rtol=1e-5)
  np.testing.assert_allclose(train_loss(mostly, params, batch), without, rtol=1e-5)


def test_losses_are_means_over_examples(objective, params):
  batch = example(objective)
  halves = [jax.tree.map(lambda x, at=at: x[at : at + 2], batch) for at in (0, 2)]
  parts = [train_loss(objective, params, half) for half in halves]
  np.testing.assert_allclose(np.mean(parts), train_loss(objective, params, batch), rtol=1e-4)


def test_a_perfect_prediction_costs_nothing(objective, params, monkeypatch):
  batch = example(objective)
  clean = Patches(2).encode(jnp.asarray(batch["image"]) / 255.0).mean

  def predict(self, params, noisy, t, condition):
    alpha, sigma = (x[:, None, None, None] for x in diffusion.signal_and_noise(objective.schedule, t))
    noise = (noisy - alpha * clean) / sigma
    return diffusion.target(objective.schedule, clean, noise, t)

  monkeypatch.setattr(type(objective.model), "predict", predict)
  with jax.disable_jit():
    assert objective._errors(params, batch, batch["caption"]).max() < 1e-4


def test_squares_of_pixels_round_trip():
  images = np.random.default_rng(0).random((2, 4, 6, 3), np.float32)
  latents = Patches(2).encode(images)
  assert latents.mean.shape == (2, 2, 3, 12) and not latents.std.any()
  np.testing.assert_allclose(latents.mean[0, 0, 1], 2 * images[0, :2, 2:4].reshape(-1) - 1, atol=1e-6)
  np.testing.assert_allclose(Patches(2).decode(latents.mean), images, atol=1e-6)


def test_the_layout_of_a_text_reaches_its_place(objective, params):
  """A corner of the coarse image changes that corner of the prediction more than the opposite one."""
  model, side = objective.model, objective.unet.layout
  condition = objective._condition(params, objective.captions.read(["a red three"]))
  noisy, t = jnp.zeros((1, 8, 8, 12)), jnp.array([500])
  layout = params["unet"]["layout_in"]
  kernel = layout["linear_2"]["kernel"]
  louder = np.array(kernel).reshape(-1, side, side, 4)
  louder[:, 0, 0] *= 5.0
  changed = {
    **params,
    "unet": {
      **params["unet"],
      "layout_in": {**layout, "linear_2": {**layout["linear_2"], "kernel": louder.reshape(kernel.shape)}},
    },
  }
  before, after = (model.predict(p, noisy, t, condition) for p in (params, changed))
  change = np.abs(before - after)[0]
  assert change[:2, :2].mean() > 1.5 * change[-2:, -2:].mean()


# Generation


@pytest.fixture(scope="module")
def draw(objective, params):
  fns = objectives.compile_predict_fns(objective)

  def run(caption=("a red three", "five on blue"), seed=0, **options):
    batch = {"key": jax.random.split(jax.random.key(seed), 2)}
    if caption is not None:
      batch["caption"] = objective.captions.read(caption)
    return np.asarray(fns["generate"]({"params": {"main": params}}, batch, jax.random.key(0), **options))

  return run


def test_guidance(draw):
  one = draw(guidance=1.0)
  assert one.shape == (2, 8, 8, 3) and one.min() >= 0 and one.max() <= 1
  np.testing.assert_allclose(draw(guidance=jnp.float32(1.0)), one, atol=1e-5)
  np.testing.assert_allclose(draw(guidance=0.0), draw(None), atol=1e-5)
  np.testing.assert_allclose(draw(("", "")), draw(None), atol=1e-5)
  assert np.abs(draw(guidance=4.0) - one).max() > 1e-3
  np.testing.assert_allclose(draw(), draw(guidance=2.0), atol=1e-5)


def test_images_depend_on_their_own_key_and_caption(draw):
  base = draw()
  other = draw(("a red three", "a red five"))
  np.testing.assert_allclose(other[0], base[0], atol=1e-5)
  assert np.abs(other[1] - base[1]).max() > 1e-3
  assert np.abs(draw(seed=1) - base).max() > 1e-3


# Configs


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(caption_dropout=1.0), "caption_dropout is 1.0"),
    (dict(patch=0), "patch is 0"),
    (dict(image_size=(9, 8)), "must be multiples of 2"),
    (dict(captions=dict(text_tokenizer="list:a", length=1)), "length is 1"),
    (dict(captions=dict(text_tokenizer="lsit:a", length=4)), "did you mean 'list'"),
    (dict(sampling=dict(sampler="dmp")), "did you mean 'dpm'"),
    (dict(sampling=dict(steps=0)), "steps is 0"),
    (dict(sampling=dict(steps=2000)), "give a whole number from 1 to 999"),
  ],
)
def test_wrong_fields_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    _ = build(**changes).model


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(data__preprocess="decode(3)"), "provides no captions, but objective 'diffusion' reads Captions"),
    (dict(data__eval_preprocess="decode(3)|tokenize('list:a b', 16)"), "provides no captions"),
    (dict(objective__captions__length="12"), "provides Captions.*length=16.*reads Captions.*length=12"),
  ],
)
def test_data_with_other_captions_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    Experiment({**plain(**changes), "evals": {}})


def test_no_data_are_needed_to_time_it():
  config = {**plain(), "evals": {}}
  data = NoData(objectives.build(config["objective"]))
  assert Experiment(config, data=data).data.spec["caption"].shape == (1, 16)


# A run, and the model that it gives


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("diffusion") / "run"
  main.main([f"--config={CONFIG}", f"--workdir={workdir}", "--config.objective.sampling.steps=2"])
  return workdir


@pytest.fixture(scope="module")
def model(run):
  return maskgen.load(run)


def test_a_run_measures_captions(run):
  results = json.loads((run / "results.json").read_text())
  wanted = {f"captions/{kind}{end}" for kind in scenes.KINDS for end in ("", "_real", "_matters")}
  assert wanted | {"captions/all", "captions/all_real", "validation/loss"} <= results.keys()
  assert any(path.name.startswith("captions_captions") for path in (run / "samples").iterdir())


def test_prompts(model):
  one = model.generate(prompt="a red three on a blue background", batch=2, guidance=8.0)
  assert one.shape == (2, 16, 16, 3)
  assert np.abs(one[0] - one[1]).max() > 1e-3
  two = model.generate(prompt=["a red three on a blue background", "a Small pink five"], guidance=8.0)
  np.testing.assert_allclose(two[0], one[0], atol=1e-4)
  assert np.abs(two[1] - one[1]).max() > 1e-3
  assert len(model.generate()) == 16


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(prompt="a rad three"), "has the out-of-vocabulary word 'rad'; did you mean 'red'"),
    (dict(prompt="a three " * 8), "has 16 words .*: shorten it, this model reads 14"),
    (dict(prompt=["a three", "a five"], batch=3), "prompt has 2 entries for 3 images"),
    (dict(prompt=[3]), "give a text, or one per image"),
    (dict(prompt=["a three", ["a five"]]), r"prompt is \['a three', \['a five'\]\]: give a text, or one per"),
    (dict(label=3), "sampling has no option 'label'"),
    (dict(guidance_schedule="linear"), "sampling has no option 'guidance_schedule'"),
    (dict(sampler="euler"), "sampler 'euler' does not exist"),
    (dict(guidance=-1.0), "guidance is -1.0"),
  ],
)
def test_wrong_prompts_and_options(model, options, message):
  with pytest.raises(UserError, match=message):
    model.generate(**options)


def test_what_it_cannot_do(model):
  for call in (lambda: model.decode(np.zeros((1, 4), int)), lambda: model.trajectory(batch=1)):
    with pytest.raises(UserError, match="a model of objective 'diffusion' has no '"):
      call()


def test_the_generate_tool_shows_a_row_per_prompt(run, tmp_path, capsys):
  out = tmp_path / "prompts.png"
  prompts = ["--prompt=a red three", "--prompt=a large five at the top"]
  generate.main([f"--model={run}", f"--out={out}", *prompts, "--count=4", "--guidance=2", "--steps=2"])
  assert out.exists() and "wrote 4 images" in capsys.readouterr().out


def test_it_can_be_swept_and_timed(run, tmp_path, capsys):
  flags = [f"--model={run}", f"--out={tmp_path}", "--num_images=4"]
  few = [f"--config={CONFIG}", "--config.data.split=test"]  # 1,440 real pictures instead of 91,968
  sweep.main([*flags, *few, "--steps=1", "--guidance=1,3", "--sampler=ddim"])
  assert "| guidance |" in capsys.readouterr().out and len(list((tmp_path / "pictures").iterdir())) == 2
  bench.main(["sample", f"--config={CONFIG}", "--batch_size=8", "--sampling_steps=1", "--repeats=1"])
  assert json.loads(capsys.readouterr().out)["sampling_steps"] == 1
  with pytest.raises(UserError, match="sampling has no option 'reuse'"):
    bench.main(["sample", f"--config={CONFIG}", "--batch_size=8", "--reuse=2"])


# What is measured


@functools.cache
def captioned():
  """Real data."""
  return Data(**plain()["data"], batch_size=64)


def make_context(generated, loss, captions=None):
  """A context of real data whose model generates the output of a function of a real batch."""
  captions = captions or objectives.build(plain()["objective"]).captions

  def batches(split):
    for batch in captioned().eval_batches(split, 64):
      current.update(batch)
      yield {key: jnp.asarray(value) for key, value in batch.items()}

  current = {}
  predict = {
    "generate": lambda variables, batch, rng, **options: jnp.asarray(generated(current)),
    "loss": lambda variables, batch, rng: {"loss": jnp.asarray(loss(captions, np.asarray(batch["caption"])))},
  }
  objective = tiny.FakeObjective(captions=captions, sampling=diffusion.DiffusionSampling())
  return evaluators.Context(objective, predict, batches, lambda seed, frozen: None, None)


def make_evaluator(context, **options):
  return evaluators.build("it", {"type": "captioned_digits", "every_steps": 1, **options}, context)


def evaluate(evaluator):
  return evaluator.run(None, jax.random.key(0))


def test_numbers_of_pictures_as_asked_for_and_not():
  def loss(captions, ids):  # heeds the background alone
    texts = [captions.opened.decode(row) for row in ids]
    return np.array([float("red background" in text) for text in texts], np.float32)

  rows = [1]
  context = make_context(lambda batch: batch["image"][:, :: rows[0]] / np.float32(255), loss)
  evaluator = make_evaluator(context, num_images=100)
  report = evaluate(evaluator)
  numbers = report.numbers
  for kind in (*scenes.KINDS, "all"):
    assert numbers[kind] == numbers[f"{kind}_real"] > 0.9
  matters = {kind: abs(numbers[f"{kind}_matters"]) for kind in scenes.KINDS}
  assert matters.pop("background") > 0.01 and not any(matters.values())
  assert report.pictures["captions"].shape[2] == 3

  # Upside down the colours stay, and other places and classes are seen.
  rows[0] = -1
  flipped = evaluate(evaluator).numbers
  assert flipped["colour"] == numbers["colour"] and flipped["background"] == numbers["background"]
  assert flipped["place"] < 0.6 and flipped["class"] < 0.8
  assert flipped["all"] <= min(flipped[kind] for kind in scenes.KINDS)


def test_other_captions_cannot_be_measured():
  with pytest.raises(UserError, match="is not a caption of the evaluation split of captioned_digits"):
    captions = objectives.build(plain()["objective"]).captions
    others = " ".join(reversed(scenes.WORDS))
    captions = dataclasses.replace(captions, text_tokenizer=f"list:{others}")
    evaluate(make_evaluator(make_context(lambda batch: batch["image"], lambda *args: 0, captions)))
  for options, message in (
    (dict(num_images=0), "num_images is 0"),
    (dict(sampling=dict(sampler="x")), "sampler 'x'"),
  ):
    with pytest.raises(UserError, match=message):
      make_evaluator(make_context(None, None), **options)
