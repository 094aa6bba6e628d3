"""Warm starts: what is taken, interpolated, left fresh or rejected; the source is needed only once."""

import json
import logging
import re
import shutil

import jax
import numpy as np
import pytest
import test_diffusion
import test_importers
import test_vilex
import tiny
from etils import epath
from flax import traverse_util
from PIL import Image
from test_errors import assert_clear

import maskgen
from maskgen import config as config_lib
from maskgen import main, objectives, sharding, storage, tree
from maskgen.config import Mesh
from maskgen.errors import UserError
from maskgen.numerics.positions import Positions, interpolate
from maskgen.training.experiment import Experiment
from maskgen.training.warm_start import WarmStart, adapt_channels

trained = tiny.trained
tiny_mage = test_importers.tiny_mage


# Interpolation


@pytest.mark.parametrize("grid", [(4, 3), (8, 8), (7, 3), (3, 11), (1, 2)])
def test_constants_and_ramps_are_kept(grid):
  old, new = Positions((4, 3), leading=1), Positions(grid, leading=1)

  def ramp(height, width):
    rows, columns = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    return np.stack([rows, columns, rows + 2 * columns, np.full((height, width), 5.0)], axis=-1)

  apart = np.float32([[9, 8, 7, 6]])
  table = np.concatenate([apart, ramp(4, 3).reshape(-1, 4).astype(np.float32)])
  found = interpolate(table, old, new)
  expected = ramp(*grid)
  if grid[0] == 1:  # the middle of the ramp
    expected = ramp(3, grid[1])[1:2]
  np.testing.assert_array_equal(found[:1], apart)
  np.testing.assert_allclose(found[1:].reshape(*grid, 4), expected, atol=1e-6)


def test_an_unchanged_grid_keeps_every_bit():
  table = np.random.default_rng(0).normal(size=(13, 4)).astype(np.float32)
  tiny.assert_same_bits(interpolate(table, Positions((4, 3), 1), Positions((4, 3), 1)), table)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_grey_pictures_keep_their_embedding_in_other_channels(channels):
  kernel = np.random.default_rng(0).normal(size=(2, 2, 3, 4)).astype(np.float32)
  found = adapt_channels(kernel, channels)
  assert found.shape == (2, 2, channels, 4) and found.dtype == np.float32
  np.testing.assert_allclose(found.sum(axis=2), kernel.sum(axis=2), rtol=1e-5, atol=1e-6)
  if channels == 6:
    tiny.assert_same_bits(found[:, :, :3], kernel / 2)


# Whole runs


def experiment(stage, trained, **changes):
  """A stage of `tiny` without evaluations; `changes` are keys of its config."""
  config = tiny.stage(stage) | {"evals": {}} | changes
  if stage == "mage":
    config["pretrained"] = {"tokenizer": str(trained / "tokenizer")} | changes.get("pretrained", {})
  return Experiment(config)


@pytest.mark.parametrize("exported", [False, True])
def test_parameters_are_taken_and_nothing_else(exported, trained, tmp_path):
  source = trained / "mage"
  model = maskgen.load(source)
  if exported:
    source = tmp_path / "export"
    storage.write_export(source, {"objective": model.config["objective"]}, model.variables)
  warm = experiment("mage", trained, init_from=str(source))
  state, frozen = warm.init(epath.Path(tmp_path / "run"))
  fresh, _ = experiment("mage", trained).init(epath.Path(tmp_path / "run"))
  # The averages, bit for bit, which are also where the run's own averages begin.
  tiny.assert_same_bits(state.params, model.variables["params"])
  tiny.assert_same_bits(state.ema, state.params)
  tiny.assert_same_bits(state.opt_state, fresh.opt_state)
  assert state.step == 0
  shardings = jax.tree.map(lambda x: x.sharding, (state, frozen))
  targets = warm.targets["state"], warm.targets["frozen"]
  assert shardings == jax.tree.map(lambda x: x.sharding, targets)


def test_another_tokenizer_is_legal_and_said(trained, tmp_path, caplog):
  variables = maskgen.load(trained / "tokenizer").variables
  other = jax.tree.map(lambda x: x + 1e-3, variables)
  config = {"objective": tiny.stage("tokenizer")["objective"]}
  storage.write_export(tmp_path / "other", config, other)
  for tokenizer, said in ((trained / "tokenizer", "as in"), (tmp_path / "other", "another than")):
    run = experiment(
      "mage", trained, init_from=str(trained / "mage"), pretrained={"tokenizer": str(tokenizer)}
    )
    caplog.clear()
    with caplog.at_level(logging.INFO, "maskgen"):
      run.init(epath.Path(tmp_path / "run"))
    assert f"{said} the source" in caplog.text


@pytest.fixture(scope="module")
def converted(tiny_mage, tmp_path_factory):
  """A run of 2 steps, at twice the image size, from the parameters of a converted reference model."""
  root = tmp_path_factory.mktemp("converted")
  shutil.copytree(tiny_mage / "converted", root / "weights")
  tokenizer = test_importers.draw(test_importers.tokenizer_shapes())
  test_importers.save_file(tokenizer, root / "tokenizer.safetensors")
  test_importers.run_convert(
    "vqgan_pytorch", root / "tokenizer.safetensors", root / "tokenizer", "--image_size=8"
  )
  objective = json.loads((root / "weights" / "config.json").read_text())["objective"]
  (root / "config.py").write_text(f"""
import json, ml_collections
from maskgen import config as config_lib

def get_config(arg=None):
  config = config_lib.load({tiny.FILE!r} + ":only=mage,steps=3,save_steps=3").to_dict()
  objective = json.loads({json.dumps(objective)!r}) | dict(image_size=(16, 16))
  config |= dict(objective=objective, evals={{}}, pretrained=dict(tokenizer={str(root / "tokenizer")!r}))
  return ml_collections.ConfigDict(config | dict(init_from={str(root / "weights")!r}))
""")
  main.main([f"--config={root / 'config.py'}", f"--workdir={root / 'run'}"])
  return root


def test_a_converted_mage_continues_on_larger_pictures(converted):
  run = Experiment(config_lib.to_dict(config_lib.load(str(converted / "config.py"))))
  state, _ = run.init(epath.Path(converted / "run"))
  source = tree.flatten(maskgen.load(converted / "weights").variables["params"])
  taken = tree.flatten(state.params)
  old, new = Positions((4, 4), leading=1), Positions((8, 8), leading=1)
  for name in ("main/position", "main/decoder_position"):
    tiny.assert_same_bits(taken.pop(name), interpolate(source.pop(name), old, new))
  tiny.assert_same_bits(taken, source)
  rows = [line.split("  ") for line in run.warm_start.report().splitlines()]
  rows = {row[1].strip(): row[-1].strip() for row in rows if len(row) > 2}
  assert rows["main/position"] == rows["main/decoder_position"] == "interpolated from 4x4 to 8x8"
  assert rows["main/encoder"] == "taken"
  assert "its image_size is (8, 8), here it is (16, 16)" in run.warm_start.report()


def test_the_source_is_not_needed_after_the_first_save(converted, tmp_path):
  root = tmp_path / "moved"
  shutil.copytree(converted / "run", root)
  (root / "results.json").unlink()
  config = f"--config={converted / 'config.py'}"
  for change in ("--config.init_from=/nowhere", "--config.init_from=None"):
    for mode in ("check", "train"):
      main.main([config, f"--workdir={root}", f"--mode={mode}", change])
  with pytest.raises(UserError, match=r"config\.init_from=/nowhere: model /nowhere does not exist"):
    main.main([config, f"--workdir={tmp_path / 'new'}", "--mode=check", "--config.init_from=/nowhere"])


def test_both_stages_continue_on_ones_own_pictures_and_one_at_another_size(trained, tmp_path, caplog):
  (tmp_path / "pictures").mkdir()
  rng = np.random.default_rng(0)
  for i in range(20):
    Image.fromarray(rng.integers(0, 256, (40, 32, 3), np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
  (tmp_path / "config.py").write_text(f"""
from maskgen import config as config_lib

def get_config(arg=None):
  config = config_lib.load({tiny.FILE!r} + ":steps=3,save_steps=3").unlock()
  for stage, size in (("tokenizer", 16), ("mage", 32)):
    resize = f"decode(3)|resize_small({{size}})|center_crop({{size}})"
    config[stage].data = dict(preprocess=resize, eval_preprocess=resize)
    config[stage].data.source = "folder:{tmp_path / "pictures"}"
    config[stage].objective.image_size = (size, size)
    config[stage].evals = dict()
    config[stage].init_from = "{trained}/" + stage
  return config
""")
  with caplog.at_level(logging.INFO, "maskgen"):
    main.main([f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"])
  assert "another than the source was trained with" in caplog.text
  assert re.search(r"main/decoder_position +\S+ +interpolated from 4x4 to 8x8", caplog.text)
  assert re.search(r"generator/encoder +\S+ +taken", caplog.text)
  old, new = Positions((4, 4), leading=1), Positions((8, 8), leading=1)
  for stage in tiny.STAGES:
    before, after = (
      tree.flatten(maskgen.load(root / stage).variables["params"]) for root in (trained, tmp_path / "run")
    )
    for name, array in before.items():
      source = interpolate(array, old, new) if name.endswith("position") else array
      np.testing.assert_allclose(after[name], source, atol=4e-3)  # three small steps of Adam
    assert any((after[name] != before[name]).any() for name in before if not name.endswith("position"))


# Every objective


def shapes(objective):
  """The run's parameters, as `Experiment.targets` has them."""
  params = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())["params"]
  everywhere = sharding.replicated(sharding.make_mesh(Mesh()))
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), params)


def write(path, objective, section):
  """An export with random parameters, which are returned by path name."""
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes(objective))
  storage.write_export(path, {"objective": section}, {"params": params})
  return tree.flatten(params)


def take(path, objective, fresh=""):
  """The taken parameters, and the outcomes of the rows of the report."""
  warm_start = WarmStart(epath.Path(path), objective, shapes(objective), fresh)
  rows = [line.strip().split(maxsplit=2) for line in warm_start.report().splitlines()[1:]]
  return warm_start.take(), {row[0]: row[2] for row in rows if row[0] != "its"}


MAGE = tiny.stage("mage")["objective"]
CLASSIFY = dict(name="classify", encoder=MAGE, classes=10)


def test_a_classifier_of_other_classes(tmp_path):
  source = write(tmp_path / "source", objectives.build(CLASSIFY), CLASSIFY)
  objective = objectives.build(CLASSIFY | dict(classes=7))
  with pytest.raises(UserError, match=r"does not fit this config in 2 places .*config\.init_fresh") as error:
    take(tmp_path / "source", objective)
  assert "main/head/logits/kernel" in assert_clear(error)
  taken, rows = take(tmp_path / "source", objective, "/head/logits/")
  tiny.assert_same_bits(taken, {name: source[name] for name in source if "logits" not in name})
  assert rows["main/encoder"] == rows["main/head/norm"] == "taken"
  assert rows["main/head/logits"] == "fresh"


def test_a_classifier_from_a_mage_leaves_the_decoder(tmp_path):
  section = tiny.stage("mage")["objective"]
  write(tmp_path / "source", objectives.build(section), section)
  objective = objectives.build(CLASSIFY | dict(encoder=MAGE | dict(image_size=(24, 16))))
  taken, rows = take(tmp_path / "source", objective, "^main/head/")
  assert rows["main/decoder"] == rows["main/encoder_norm"] == "not used"
  assert rows["main/position"] == "interpolated from 4x4 to 6x4" and taken["main/position"].shape == (25, 16)


def test_an_encoder_continues_on_pictures_of_other_sizes_and_channels(tmp_path):
  """One alone, as importers write it, and that of a whole model, whose decoder predicts other pixels."""
  encoder = dict(image_size=(8, 8), patch=4, width=8, depth=1, heads=2, pooling="class")
  section = dict(name="masked_pixels", encoder=encoder, decoder_width=8, decoder_depth=1, decoder_heads=2)
  source = write(tmp_path / "whole", objectives.build(section), section)
  prefix = "main/encoder/"
  alone = {name.removeprefix(prefix): value for name, value in source.items() if name.startswith(prefix)}
  storage.write_export(
    tmp_path / "alone",
    {"network": "vit", "vit": encoder},
    {"params": {"main": traverse_util.unflatten_dict(alone, sep="/")}},
  )
  other = encoder | dict(image_size=(8, 16), mean=(0.5,) * 4, std=(0.5,) * 4)
  objective = objectives.build(section | dict(encoder=other))
  with pytest.raises(UserError, match="does not fit this config in 2 places") as error:
    take(tmp_path / "whole", objective)
  assert "main/decoder/head/kernel" in assert_clear(error)
  for name, fresh in (("whole", "decoder/head"), ("alone", "")):
    taken, rows = take(tmp_path / name, objective, fresh)
    assert rows["main/encoder/position"] == "interpolated from 2x2 to 2x4"
    assert taken["main/encoder/position"].shape == (1 + 2 * 4, 8)
    assert rows["main/encoder/patch_embedding/kernel"] == "adapted from 3 to 4 channels"
    kernel = "main/encoder/patch_embedding/kernel"
    tiny.assert_same_bits(taken[kernel], adapt_channels(source[kernel], 4))
    block = "main/encoder/encoder/block_0/mlp/up/kernel"
    tiny.assert_same_bits(taken[block], source[block])
    assert ("main/decoder/input/kernel" in taken) == (name == "whole")
  assert rows["main/decoder"] == "fresh: the source has none"
  changed = objectives.build(section | dict(encoder=encoder | dict(heads=4, activation="gelu")))
  report = WarmStart(epath.Path(tmp_path / "alone"), changed, shapes(changed)).report()
  said = [line.strip() for line in report.splitlines() if line.strip().startswith("its ")]
  assert said == [
    "its activation is gelu_tanh, here it is gelu", "its heads is 2, here it is 4",
  ]  # fmt: skip
  deeper = objectives.build(section | dict(encoder=other | dict(depth=2)))
  with pytest.raises(UserError, match="does not fit this config") as error:
    take(tmp_path / "alone", deeper)
  assert "main/encoder/encoder/block_1" in assert_clear(error)


def test_equal_shapes_of_other_grids_are_interpolated(tmp_path):
  section = tiny.stage("mage")["objective"] | dict(image_size=(8, 32))
  source = write(tmp_path / "source", objectives.build(section), section)["main/position"]
  taken, rows = take(tmp_path / "source", objectives.build(section | dict(image_size=(32, 8))))
  assert rows["main/position"] == "interpolated from 2x8 to 8x2"
  tiny.assert_same_bits(
    taken["main/position"], interpolate(source, Positions((2, 8), 1), Positions((8, 2), 1))
  )


def test_a_tokenizer_without_discriminator(tmp_path):
  section = tiny.stage("tokenizer")["objective"]
  alone = section | dict(adversarial_weight=0.0)
  source = write(tmp_path / "source", objectives.build(alone), alone)
  taken, rows = take(tmp_path / "source", objectives.build(section))
  tiny.assert_same_bits(taken, source)
  assert rows["discriminator/conv_in"] == "fresh: the source has none"


def test_an_image_to_words_model(tmp_path):
  section = test_vilex.SECTION
  source = write(tmp_path / "source", objectives.build(section), section)
  larger = section | dict(encoder=section["encoder"] | dict(image_size=(12, 8)))
  taken, rows = take(tmp_path / "source", objectives.build(larger))
  assert rows["main/encoder/position"] == "interpolated from 2x2 to 3x2" and rows["main/pool"] == "taken"
  tiny.assert_same_bits(taken | {"main/encoder/position": source["main/encoder/position"]}, source)


def test_a_text_to_image_model(tmp_path):
  objective = test_diffusion.build()
  source = write(tmp_path / "source", objective, test_vilex.DECODER | dict(image_size=(16, 16)))
  tiny.assert_same_bits(take(tmp_path / "source", objective)[0], source)


# What is refused


@pytest.mark.parametrize(
  ("source", "fresh", "message"),
  [
    ("missing", "", "missing: model .* does not exist"),
    ("mage_vit_base", "", r"is not on this machine: fetch https.* --format=mage"),
    ("empty", "", "is not a model"),
    ("untrained", "", "holds no checkpoint yet"),
    ("stages", "", "holds several stages"),
    ("tokenizer", "", "none of the parameters of this objective"),
    ("mage", "decodr", r"init_fresh='decodr' matches no parameter"),
    ("mage", "(", r"init_fresh is '\(', which is not a regular expression"),
    (None, "decoder", r"init_fresh='decoder' is given without config\.init_from"),
  ],
)
def test_refused(source, fresh, message, trained, tmp_path):
  (tmp_path / "empty").mkdir()
  (tmp_path / "untrained").mkdir()
  shutil.copy(trained / "mage" / "config.json", tmp_path / "untrained")
  folders = {"stages": trained, "tokenizer": trained / "tokenizer", "mage": trained / "mage"}
  folders |= {"mage_vit_base": "mage_vit_base", None: None}
  given = folders.get(source, tmp_path / source if source else None)
  with pytest.raises(UserError, match=message) as error:
    run = experiment("mage", trained, init_from=given and str(given), init_fresh=fresh)
    run.check_pretrained(epath.Path(tmp_path / "run"))
  assert_clear(error)


def test_other_shapes_are_a_table(tmp_path):
  section = tiny.stage("mage")["objective"]
  write(tmp_path / "source", objectives.build(section), section)
  with pytest.raises(UserError, match="does not fit this config in 1 places") as error:
    take(tmp_path / "source", objectives.build(section | dict(class_ids=3)), "^main/embedding$")
  assert assert_clear(error).splitlines()[-1].split() == [
    "main/head_bias", "float32[34]", "float32[36]",
  ]  # fmt: skip
