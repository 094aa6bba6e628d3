"""Feature reuse, trajectories and sweeps, with networks and trained models."""

import argparse
import csv
import dataclasses
import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

import maskgen
from maskgen.errors import UserError
from maskgen.models.mage import Mage
from maskgen.numerics.vocab import Vocab
from maskgen.serving import loading
from maskgen.tools import generate, sweep

trained = tiny.trained

TOKENS, CODES, BATCH = 12, 7, 3
OPTIONS = dict(width=16, depth=2, heads=2, decoder_width=8, decoder_depth=2, decoder_heads=2, dropout=0.1)


@functools.partial(jax.jit, static_argnames=("scan", "options"))
def apply(variables, *arguments, scan, options):
  model = Mage(Vocab(CODES), TOKENS, **OPTIONS, scan=scan)
  return model.apply(variables, *arguments, method="code_logits", **dict(options))


@functools.cache
def network(scan: bool):
  """A network with random parameters, tokens, a mask, and the logits of all positions with their cache."""
  model = Mage(Vocab(CODES), TOKENS, **OPTIONS, scan=scan)
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, CODES, (BATCH, TOKENS)), jnp.int32)
  mask = jnp.asarray(rng.random((BATCH, TOKENS)) < 0.6)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, mask)["params"]
  params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, 0.3, leaf.shape), jnp.float32), shapes)
  logits, cache = apply({"params": params}, tokens, mask, scan=scan, options=(("mutable", ("cache",)),))
  return params, tokens, mask, logits, cache


def partial(scan, tokens, mask, where):
  params, *_, cache = network(scan)
  arguments = (tokens, mask, jnp.asarray(where, jnp.int32))
  return apply({"params": params, **cache}, *arguments, scan=scan, options=(("cached", True),))


def places(count):
  """Distinct positions for each example, in random order."""
  rng = np.random.default_rng(1)
  return np.stack([rng.permutation(TOKENS)[:count] for _ in range(BATCH)])


def at(logits, where):
  return np.take_along_axis(np.asarray(logits), where[..., None], axis=1)


@pytest.mark.parametrize("scan", [False, True])
def test_leaving_a_cache_changes_no_logits(scan):
  params, tokens, mask, logits, _ = network(scan)
  plain = apply({"params": params}, tokens, mask, scan=scan, options=())
  np.testing.assert_allclose(logits, plain, atol=1e-5)
  assert np.std(plain) > 0.1


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("count", [5, TOKENS])
def test_where_nothing_is_new_a_partial_evaluation_is_exact(scan, count):
  _, tokens, mask, logits, _ = network(scan)
  where = places(count)
  np.testing.assert_allclose(partial(scan, tokens, mask, where), at(logits, where), atol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
def test_a_partial_evaluation_of_all_positions_is_a_full_one(scan):
  params, tokens, mask, _, _ = network(scan)
  tokens, mask, where = (tokens + 1) % CODES, mask & (jnp.arange(TOKENS) % 2 == 0)[None], places(TOKENS)
  full = apply({"params": params}, tokens, mask, scan=scan, options=())
  np.testing.assert_allclose(partial(scan, tokens, mask, where), at(full, where), atol=1e-4)


def test_a_partial_evaluation_sees_what_is_new_at_its_positions_alone():
  _, tokens, mask, logits, _ = network(False)
  where = places(5)
  known = np.zeros((BATCH, TOKENS), bool)
  np.put_along_axis(known, where[:, :2], True, axis=1)
  seen = partial(False, tokens, mask & ~known, where)
  changed = np.asarray(mask)[known].any()
  assert changed and np.abs(seen - at(logits, where)).max() > 1e-3
  others = np.ones_like(known)
  np.put_along_axis(others, where, False, axis=1)
  np.testing.assert_array_equal(
    seen, partial(False, jnp.where(others, (tokens + 1) % CODES, tokens), mask & ~known, where)
  )


@functools.cache
def model(folder):
  return maskgen.load(folder / "mage")


@pytest.mark.parametrize("options", [{}, dict(reuse=3), dict(order="halton", steps=4, reuse=2)], ids=str)
def test_a_trajectory_ends_with_the_generated_images(trained, options):
  images, unknown = model(trained).trajectory(seed=3, batch=2, **options)
  steps = options.get("steps", 3)
  assert images.shape == (2, steps, *tiny.SIZE, 3) and unknown.shape == (2, steps, 4, 4)
  assert (np.diff(unknown.sum(axis=(2, 3)), axis=1) < 0).all() and not unknown[:, -1].any()
  generated = model(trained).generate(seed=3, batch=2, **options)
  np.testing.assert_allclose(images[:, -1], generated, atol=1e-5)


def test_inpainting_with_reuse_keeps_what_is_known(trained):
  images = np.random.default_rng(0).random((2, *tiny.SIZE, 3)).astype(np.float32)
  hole = np.zeros((2, *tiny.SIZE), bool)
  hole[0, :8], hole[1, 4:, 4:] = True, True
  for order in ("confidence", "halton"):
    filled = model(trained).inpaint(images, hole, order=order, reuse=3)
    np.testing.assert_array_equal(filled[~hole], images[~hole])
    assert np.isfinite(filled).all()


def test_options_that_do_not_go_together_are_refused(trained):
  with pytest.raises(UserError, match="reuse is 2: it must divide the number of steps, 3"):
    model(trained).generate(reuse=2)


def test_the_picture_of_a_trajectory(trained, tmp_path):
  out, picture = tmp_path / "out.png", tmp_path / "how.png"
  arguments = [f"--model={trained / 'mage'}", "--count=2", f"--out={out}", f"--trajectory={picture}"]
  generate.main(arguments)
  assert out.exists() and np.asarray(Image.open(picture)).ndim == 3
  with pytest.raises(UserError, match=r"--trajectory=how\.jpg: give the name of a .png file"):
    generate.main([*arguments[:-1], "--trajectory=how.jpg"])


def test_unknown_tokens_are_grey_and_known_ones_are_not():
  pictures, unknown = np.ones((1, 12, 4, 4, 1)), np.zeros((1, 12, 2, 2), bool)
  unknown[:, :-1, 0, 0] = True
  drawn = generate.draw_trajectory(pictures, unknown)
  first, last = drawn[2:6, 2:6, 0], drawn[2:6, -6:-2, 0]
  assert drawn.shape == (8, 2 + 10 * 6, 3)
  assert (first[:2, :2] < 200).all() and (first[2:] == 255).all() and (last == 255).all()


def read(out):
  return list(csv.DictReader((out / sweep.TABLE).open()))


def test_a_sweep_leaves_out_combinations_but_no_value(trained, caplog):
  _, objective = loading.load_objective(trained / "mage")
  names = [field.name for field in dataclasses.fields(objective.sampling)]

  def settings(**given):
    return sweep.settings(objective, argparse.Namespace(**dict.fromkeys(names) | given))

  with caplog.at_level(logging.WARNING, "maskgen"):
    found = settings(steps="2,3", reuse="1,3")
  assert [(one.steps, one.reuse) for one in found] == [(2, 1), (3, 1), (3, 3)]
  assert "left out 1 combination: reuse is 3: it must divide the number of steps, 2" in caplog.text
  with pytest.raises(UserError, match=r"reuse is 3: it must divide the number of steps, 2"):
    settings(steps="2,4", reuse="1,3")
  with pytest.raises(UserError, match=r"order 'haltn' does not exist; did you mean 'halton'"):
    settings(order="confidence,haltn")


def test_a_sweep_measures_each_setting_once_and_goes_on(trained, tmp_path, capsys):
  out = tmp_path / "sweep"
  arguments = [f"--model={trained / 'mage'}", f"--out={out}", "--num_images=8", "--steps=2"]
  sweep.main([*arguments, "--temperature=0,4"])
  before = read(out)
  assert {row["temperature"] for row in before} == {"0.0", "4.0"}
  older = (out / sweep.TABLE).read_text().replace(f"jax {jax.__version__}, ", "jax 0.1, ")
  (out / sweep.TABLE).write_text(older)
  before = read(out)
  # The temperature does nothing to a fixed order: one more setting, not two.
  sweep.main([*arguments, "--temperature=0,4", "--order=confidence,halton"])
  rows = read(out)
  assert len(rows) == 3 and all(row in rows for row in before)
  described = json.loads((out / "receipts.json").read_text())["evaluations"]
  versions = {name: one.get("versions", {}).get("jax") for name, one in described.items()}
  assert versions == {name: None if "halton" in name else "0.1" for name in described}
  distances = [float(row["frechet_pixels"]) for row in rows]
  assert distances == sorted(distances)
  assert all(float(row["seconds_per_image"]) > 0 for row in rows)
  assert np.asarray(Image.open(out / sweep.SHEET)).shape[1] > 1000
  table = capsys.readouterr().out
  assert "| temperature | order |" in table and "halton" in table and "weights" not in table
  with pytest.raises(UserError, match="num_images 8, this sweep has 16: give another --out"):
    sweep.main([*arguments[:2], "--num_images=16"])


def test_a_sweep_says_what_the_evaluation_says(trained, tmp_path):
  from maskgen import storage
  from maskgen.training.experiment import Experiment

  sweep.main([f"--model={trained / 'mage'}", f"--out={tmp_path}", "--num_images=8"])
  (row,) = read(tmp_path)
  section = dict(type="generation", every_steps=1, num_images=8)
  experiment = Experiment(tiny.stage("mage") | {"evals": {"generation": section}})
  targets = experiment.targets["state"].variables(experiment.targets["frozen"])
  variables = storage.load_variables(trained / "mage", targets)
  report = experiment.evaluators["generation"][1].run(variables, jax.random.key(0))
  assert float(row["frechet_pixels"]) == pytest.approx(report.numbers["frechet_pixels"], rel=1e-3)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--steps=2,x"], "--steps=2,x: give whole numbers, separated by commas"),
    (["--temperature=hot"], "--temperature=hot: give numbers, separated by commas"),
    (["--order=haltn"], "'haltn'.*did you mean 'halton'"),
    (["--steps=6,10", "--reuse=4"], "reuse is 4: it must divide the number of steps, 6"),
    (["--num_images=1"], "--num_images=1: give at least 2"),
    (["--guidance=2"], r"guidance is 2\.0: guidance needs a model with classes or captions"),
    (["--model=nowhere"], "nowhere does not exist"),
  ],
)
def test_wrong_sweeps_are_refused_at_once(trained, tmp_path, flags, message):
  out = tmp_path / "sweep"
  with pytest.raises(UserError, match=message):
    sweep.main([f"--model={trained / 'mage'}", f"--out={out}", *flags])
  assert not out.exists()


def test_a_tokenizer_cannot_be_swept(trained, tmp_path):
  with pytest.raises(UserError, match="tokenizer does not generate"):
    sweep.main([f"--model={trained / 'tokenizer'}", f"--out={tmp_path}"])
