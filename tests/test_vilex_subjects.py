"""Scores of subjects in new contexts, with random networks."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import towers_reference as reference
from PIL import Image
from test_vilex import SECTION, SIZE, setup

import maskgen
from maskgen import images, storage
from maskgen.errors import UserError
from maskgen.evaluators import subjects
from maskgen.tools import verify, vilex

GOLDEN = pathlib.Path(__file__).parent / "golden" / "towers.npz"
PROMPTS = ["a {} on blue", "{} on red background"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A model, CLIP and DINO with random weights, and two subjects of which one has its own prompt."""
  root = tmp_path_factory.mktemp("subjects")
  storage.write_export(root / "model", {"objective": SECTION}, setup()[1])
  with np.load(GOLDEN) as archive:
    reference.write_clip(root / "clip", *json.loads(str(archive["text/stored"])))
    reference.write(root / "dino", *json.loads(str(archive["dino/stored"])))
  rng = np.random.default_rng(0)
  for name, sizes in {"cat2": [(20, 30), (SIZE, SIZE), (9, 5)], "red_cat": [(SIZE, SIZE)]}.items():
    (root / "all" / name).mkdir(parents=True)
    for i, size in enumerate(sizes):
      picture = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
      picture.save(root / "all" / name / f"{i}.png")
  (root / "all" / "red_cat" / "prompts.txt").write_text("{} on a background\n")
  (root / "prompts.txt").write_text("\n".join([PROMPTS[0], "", PROMPTS[1]]))
  (root / "classes.csv").write_text("cat2,cat\nred_cat,red cat\n")
  (root / "empty").mkdir()
  (root / "holes" / "cat").mkdir(parents=True)
  (root / "damaged" / "cat").mkdir(parents=True)
  (root / "damaged" / "cat" / "a.png").write_text("no picture")
  (root / "none.txt").write_text("\n")
  (root / "plain.txt").write_text("a {} on blue\na cat\n")
  (root / "twice.txt").write_text("{} on {}\n")
  (root / "unknown.txt").write_text("a {} on the beach\n")
  (root / "long.txt").write_text("a {} a a a a a a a\n")
  (root / "others.csv").write_text("cat3,cat\nred_cat,cat\n")
  (root / "columns.csv").write_text("cat2\n")
  return root


def run(folder, *changes):
  given = dict(model="model", subjects="all", prompts="prompts.txt", clip="clip", dino="dino")
  for change in changes:
    name, _, value = change.removeprefix("--").partition("=")
    given[name] = value
  flags = [f"--{name}={folder / value}" for name, value in given.items() if name in PATHS and value]
  vilex.main(["subjects", *flags, *(change for change in changes if change[2:].split("=")[0] not in PATHS)])


PATHS = ("model", "subjects", "prompts", "classes", "clip", "dino")


def test_scores(folder, tmp_path, capsys):
  """They are cosines of what the model generates with real pictures and texts, and can be computed again."""
  out = [f"--out={tmp_path / 'out.png'}", f"--json={tmp_path / 'out.json'}"]
  run(folder, "--classes=classes.csv", "--count=2", "--num_tokens=3", "--seed=5", "--steps=2", *out)
  found = json.loads((tmp_path / "out.json").read_text())
  numbers, cat = found["metrics"], folder / "all" / "cat2"
  assert f"clip_t/cat2 = {numbers['clip_t/cat2']:.4f}" in capsys.readouterr().out
  assert Image.open(tmp_path / "out.png").size[0] >= 3 * 192  # a picture and two prompts

  model, networks = maskgen.load(folder / "model"), subjects.open_networks(folder / "clip", folder / "dino")
  real = subjects.Subject("", "", (), tuple(sorted(cat.iterdir()))).pictures((SIZE, SIZE))
  np.testing.assert_array_equal(real[1], np.asarray(Image.open(cat / "1.png")))
  tokens = model.encode(real, 3)
  made = [model.generate(5 + i, prompt=PROMPTS, images=[tokens[i]], num_tokens=3, steps=2) for i in range(2)]
  made = images.to_uint8(np.concatenate(made))

  def unit(features):
    return np.asarray(features) / np.linalg.norm(features, axis=-1, keepdims=True)

  for name, space in (("clip_i", networks.clip), ("dino", networks.dino)):
    ours, theirs = (unit(space(jnp.asarray(x))) for x in (made, real))
    np.testing.assert_allclose(numbers[f"{name}/cat2"], (ours @ theirs.T).mean(), atol=1e-5)
    pairs = (theirs @ theirs.T)[np.triu_indices(3, 1)]
    np.testing.assert_allclose(numbers[f"{name}_real/cat2"], pairs.mean(), atol=1e-5)
    assert f"{name}_real/red_cat" not in numbers  # it has one picture
  texts = unit(networks.text.embed(["a cat on blue", "cat on red background"] * 2))
  expected = (unit(networks.clip(jnp.asarray(made))) * texts).sum(-1)
  np.testing.assert_allclose(numbers["clip_t/cat2"], expected.mean(), atol=1e-5)
  # Each of the 4 and 2 generated pictures counts as much.
  whole = (4 * numbers["dino/cat2"] + 2 * numbers["dino/red_cat"]) / 6
  np.testing.assert_allclose(numbers["dino"], whole, atol=1e-9)
  assert found["subjects"]["red_cat"]["prompts"] == ["{} on a background"]

  verify.main([str(tmp_path / "out.json")])
  assert "numbers computed again are equal" in capsys.readouterr().out
  (tmp_path / "out.json").write_text(json.dumps(found | {"networks": found["networks"] | {"dino": "0" * 64}}))
  with pytest.raises(UserError, match=r"networks\.dino is 000000000000\.\.\., but now"):
    verify.main([str(tmp_path / "out.json")])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("--subjects=missing", r"--subjects=.*missing: give a folder with a folder of pictures for each subject"),
    ("--subjects=empty", r"--subjects=.*empty: give a folder with a folder of pictures for each subject"),
    ("--subjects=holes", r"the folder cat has no pictures, put \.jpg"),
    ("--subjects=damaged", r"a\.png cannot be read as a picture"),
    ("--prompts=missing.txt", r"--prompts=.*missing\.txt cannot be read"),
    ("--prompts=none.txt", r"none\.txt has no prompts: write one on each line"),
    ("--prompts=plain.txt", r"plain\.txt: the prompt 'a cat' needs \{\} once, in place of the image"),
    ("--prompts=twice.txt", r"the prompt '\{\} on \{\}' needs \{\} once"),
    ("--prompts=unknown.txt", r"out-of-vocabulary word 'the'"),
    ("--prompts=long.txt", r"leaves no room for 1 image: shorten it"),
    ("--classes=missing.csv", r"--classes=.*missing\.csv cannot be read"),
    ("--classes=others.csv", r"no class of the subject 'cat2'; did you mean 'cat3'"),
    ("--classes=columns.csv", r"'cat2' is not NAME,CLASS, such as 'dog6,dog'"),
    ("--clip=dino", r"dino has no text tower: give the folder of a whole CLIP model"),
    ("--clip=dino/model.safetensors", r"has no text tower: give the folder of a whole CLIP model"),
    ("--clip=missing", r"missing cannot be read"),
    ("--dino=clip", r"clip has no tensor 'embeddings\.patch_embeddings\.projection\.weight'"),
    ("--num_tokens=9", r"num_tokens is 9: this model has 1 to 4"),
    ("--count=0", r"--count=0: give at least 1"),
    ("--out=sheet.jpg", r"--out=sheet\.jpg: give the name of a \.png file"),
    ("--json=nowhere/a.json", r"--json=nowhere/a\.json: the folder nowhere does not exist"),
  ],
)
def test_wrong_arguments(folder, change, message):
  with pytest.raises(UserError, match=message) as error:
    run(folder, change)
  assert "\n" not in str(error.value)


def test_a_network_is_needed(folder):
  with pytest.raises(UserError, match=r"give --clip=DIR, --dino=DIR, or both"):
    run(folder, "--clip=", "--dino=")
