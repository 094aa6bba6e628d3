"""Classifiers that are trained on generated pictures: the evaluator, and folders of pictures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from test_evaluators import make_context

from maskgen import evaluators
from maskgen.errors import UserError
from maskgen.evaluators import batches, classifier_scores, picture_classifier, picture_sets
from maskgen.images import to_float
from maskgen.tools import evaluate

RED, BLUE, GREEN, YELLOW = (200, 60, 60), (60, 60, 200), (60, 200, 60), (200, 200, 60)


def pictures(count, seed, *colours):
  """Noisy pictures whose label is that of their colour, which alternates; uint8 [n, 8, 8, 3], int32 [n]."""
  labels = np.arange(count, dtype=np.int32) % len(colours)
  noise = np.random.default_rng(seed).integers(-60, 56, (count, 8, 8, 3))
  return (np.array(colours)[labels][:, None, None] + noise).astype(np.uint8), labels


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
  monkeypatch.setattr(picture_classifier, "_BATCH", 16)


def run(*colours, num_classes=2, **options):
  """Evaluates a model of red and blue pictures that generates these colours."""
  made = to_float(jnp.asarray(pictures(64, 2, *colours)[0]))

  def generate(variables, batch, rng):
    pick = jax.vmap(lambda key: jax.random.randint(key, (), 0, 32))(batch["key"])
    return made[2 * pick + batch.get("label", pick % 2)]

  sets = pictures(120, 0, RED, BLUE), pictures(30, 1, RED, BLUE)
  context = make_context({"generate": generate}, *sets, devices=2)
  context = dataclasses.replace(context, objective=tiny.FakeObjective(num_classes=num_classes))
  section = dict(type="classifier_scores", every_steps=1, steps=20, **options)
  evaluator = evaluators.build("it", section, context)
  calls = tiny.record_calls(context.predict)
  numbers = evaluator.run(None, jax.random.key(0)).numbers
  called = set(calls)
  calls.clear()
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), next(iter(context.batches("eval"))))

  def call(name, batch):
    return jax.eval_shape(context.predict[name], None, batch, jax.random.key(0))

  evaluators.trace(evaluator, call, shapes)
  assert calls == called  # what a check of the config traces is what is called
  return numbers


def test_a_good_model_teaches_its_classes_and_passes_for_real():
  good, mixed_up = run(RED, BLUE), run(BLUE, RED)
  assert good.keys() == {"two_sample", "two_sample_floor", "cas", "cas_real"}
  assert (good["cas"], mixed_up["cas"], good["cas_real"]) == (1.0, 0.0, 1.0)
  for numbers in (good, mixed_up):
    assert 0.3 < numbers["two_sample"] < 0.7
  assert 0.3 < good["two_sample_floor"] < 0.7
  bounds = ("two_sample_floor", "cas_real")
  assert [good[name] for name in bounds] == [mixed_up[name] for name in bounds]


def test_a_model_of_other_colours_is_told_from_real_pictures():
  numbers = run(YELLOW, GREEN, num_classes=0, num_images=100)
  assert numbers.keys() == {"two_sample", "two_sample_floor"}
  assert numbers["two_sample"] > 0.9 and numbers["two_sample_floor"] < 0.7


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(num_images=7), "num_images"),
    (dict(steps=0), "steps"),
    (dict(sampling=dict(step=3)), "did you mean 'steps'"),
  ],
)
def test_options(changes, message):
  with pytest.raises(UserError, match=message):
    context = make_context({"generate": lambda variables, batch, rng: None}, (), ())
    evaluators.build("it", dict(type="classifier_scores", **changes), context)


def test_rows_are_drawn_alike_whatever_the_parts():
  numbers = np.arange(100)

  def draw(size, count, seed=0):
    parts = ({"number": numbers[i : i + size]} for i in range(0, 100, size))
    return batches.draw(parts, count, seed)["number"].tolist()

  drawn = draw(7, 30)
  assert len({*drawn}) == 30 and drawn == draw(100, 30) != draw(7, 30, seed=1)
  assert sorted(draw(9, 100)) == sorted(draw(9, 1000)) == numbers.tolist() != draw(9, 100)
  means = [np.mean(draw(9, 10, seed)) for seed in range(200)]
  assert abs(np.mean(means) - 49.5) < 3  # the last rows are as likely as the first ones


# Pictures on disk


@pytest.fixture
def folders(tmp_path):
  """Folders of real pictures and of generated ones, whose classes have other colours."""
  for name, count, *colours in (("real", 80, RED, BLUE), ("made", 60, YELLOW, GREEN)):
    for i, image in enumerate(pictures(count, count, *colours)[0]):
      path = tmp_path / name / ("red", "blue")[i % 2] / f"{i}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(image).save(path)
  return tmp_path


def test_classes_are_sub_folders_or_labels():
  def classes(names, labels):
    return picture_sets.PictureSet("it", names, (8, 8), None, labels=labels)

  folder = classes(("b/0", "a/1", "b/2"), None)
  npz = classes(("arr_0[0]", "arr_0[1]"), np.array([1, 0]))
  for made, real, expected in (
    (folder, folder, ([1, 0, 1], [1, 0, 1])),
    (folder, npz, ([1, 0, 1], [1, 0])),
    (npz, npz, ([1, 0], [1, 0])),
  ):
    *labels, count = classifier_scores.label(made, real)
    assert [found.tolist() for found in labels] == [*expected] and count == 2
  with pytest.raises(UserError, match=r"it has no picture of class '7', unlike the other set"):
    classifier_scores.label(folder, classes(("arr_0[0]", "arr_0[1]", "arr_0[2]"), np.array([1, 0, 7])))
  with pytest.raises(UserError, match=r"'arr_0\[0\]' of it has none: .* save the classes of an npz file"):
    classifier_scores.label(folder, classes(("arr_0[0]",), None))


def evaluate_folders(folders, metrics):
  evaluate.main([f"--generated={folders}/made", f"--reference={folders}/real", f"--metrics={metrics}"])


def test_folders(folders, monkeypatch, capsys):
  monkeypatch.setattr(classifier_scores, "STEPS", 20)
  evaluate_folders(folders, "two_sample,cas")
  lines = (line.split(" = ") for line in capsys.readouterr().out.splitlines())
  numbers = {name: float(value) for name, value in lines}
  assert numbers.keys() == {"two_sample", "two_sample_floor", "cas", "cas_real"}
  assert numbers["two_sample"] > 0.9 and numbers["two_sample_floor"] < 0.7 and numbers["cas_real"] == 1.0
  (folders / "made" / "blue").rename(folders / "made" / "green")
  with pytest.raises(UserError, match="made has no picture of class 'blue', unlike the other set"):
    evaluate_folders(folders, "cas")
  (folders / "made" / "red" / "0.png").rename(folders / "made" / "0.png")
  with pytest.raises(UserError, match=r"the class of each picture, but '0\.png' of .*made has none"):
    evaluate_folders(folders, "cas")
