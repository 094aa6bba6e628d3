"""SigLIP's image encoder: the same numbers as transformers', from files of two projects.

PyTorch computes them in a separate process (siglip_reference.py), which needs the extra `parity`.
"""

import functools
import importlib.util
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import maskgen
from maskgen import objectives, storage, tree
from maskgen.errors import UserError
from maskgen.importers import siglip
from maskgen.models.vit import ViT
from maskgen.tools import convert, export

PROGRAM = pathlib.Path(__file__).parent / "siglip_reference.py"
FIELDS = dict(image_size=(8, 8), patch=4, width=12, depth=2, heads=3, hidden=20)
MODEL = ViT(**FIELDS)
IMAGES = np.random.default_rng(1).random((2, 8, 8, 3), np.float32)
KEY = jax.random.key(0)


@functools.cache
def params():
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def write(path, *, stacked=False, prefix="", bfloat16=False):
  """Writes the parameters as big_vision would or, for another suffix, as transformers would."""
  if path.suffix != ".npz":
    found = siglip.to_transformers(params(), MODEL)
    found = {f"{prefix}{name}": np.ascontiguousarray(value) for name, value in found.items()}
    extra = {
      "vision_model.head.probe": np.ones((1, 1, 12), np.float32),
      "logit_scale": np.ones(1, np.float32),
    }
    save_file(found | (extra if prefix else {}), path)
    return
  found = {f"params/img/{name}": value for name, value in siglip.to_big_vision(params(), MODEL).items()}
  found |= {"params/img/MAPHead_0/probe": np.ones((1, 1, 12)), "params/txt/head/bias": np.ones(3)}
  if stacked:
    blocks = [name for name in found if "encoderblock_0/" in name]
    for name in blocks:
      both = [found.pop(name.replace("block_0/", f"block_{i}/")) for i in range(2)]
      found[name.replace("block_0/", "block/")] = np.stack(both)
  if bfloat16:
    found = {name: np.asarray(value).astype(ml_dtypes.bfloat16) for name, value in found.items()}
  np.savez(path, **found)


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("a.safetensors", dict(prefix="vision_model.")),
    ("a.safetensors", {}),
    ("a.npz", {}),
    ("a.npz", dict(stacked=True)),
  ],
)
def test_files_of_both_projects(tmp_path, name, options):
  path = tmp_path / name
  write(path, **options)
  heads = 3 if path.suffix != ".npz" else None
  converted = siglip.convert(path, heads)
  assert converted.config == {"network": "vit", "vit": FIELDS}
  jax.tree.map(np.testing.assert_array_equal, converted.variables["params"]["main"], params())
  assert not converted.unknown


def test_bfloat16_npz(tmp_path):
  write(tmp_path / "a.npz", bfloat16=True)
  found = siglip.convert(tmp_path / "a.npz").variables["params"]["main"]
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-2), found, params())


def test_a_converted_encoder_can_be_pretrained(tmp_path):
  write(tmp_path / "a.npz")
  convert.main(["--format=siglip", f"--weights={tmp_path / 'a.npz'}", f"--out={tmp_path / 'out'}"])
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params())
  found = storage.load_variables(tmp_path / "out", {"params": {"main": shapes}})
  jax.tree.map(np.testing.assert_array_equal, found["params"]["main"], params())


def test_what_a_file_may_lack(tmp_path):
  path = tmp_path / "a.safetensors"
  write(path)
  with pytest.raises(UserError, match="has no head count"):
    siglip.convert(path)
  with pytest.raises(UserError, match="5 does not divide the width of 12"):
    siglip.convert(path, 5)
  tensors = load_file(path)
  save_file({name: value for name, value in tensors.items() if "layers.1.mlp.fc2.bias" not in name}, path)
  with pytest.raises(UserError, match=r"has no tensor 'encoder.layers.1.mlp.fc2.bias'"):
    siglip.convert(path, 3)
  save_file(tensors | {"encoder.layers.1.gate": np.ones(2, np.float32)}, path)
  with pytest.raises(UserError, match=r"has a tensor 'encoder.layers.1.gate' for which"):
    siglip.convert(path, 3)
  tensors["embeddings.position_embedding.weight"] = np.ones((5, 12), np.float32)
  save_file(tensors, path)
  with pytest.raises(UserError, match="5 positions do not form a square"):
    siglip.convert(path, 3)
  (tmp_path / "b.npz").write_bytes(b"nothing")
  with pytest.raises(UserError, match="is not an intact npz file"):
    siglip.convert(tmp_path / "b.npz")


def test_images_of_any_size_and_scan():
  large = IMAGES.repeat(2, axis=1).repeat(2, axis=2)
  run = [jax.jit(MODEL.clone(scan=scan).apply) for scan in (False, True)]
  first = run[0]({"params": params()}, IMAGES)
  assert first.shape == (2, MODEL.num_patches, 12)
  np.testing.assert_allclose(run[1]({"params": params()}, IMAGES), first, rtol=1e-5, atol=1e-5)
  assert run[0]({"params": params()}, large).shape == first.shape


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(image_size=(8, 6)), "multiples of 4"),
    (dict(heads=5), "does not divide into 5 heads"),
    (dict(depth=0), "depth is 0"),
    (dict(remat="some"), "remat 'some'"),
  ],
)
def test_wrong_fields(fields, message):
  with pytest.raises(UserError, match=message):
    MODEL.clone(**fields)


def test_published_sizes():
  sizes = {"B/16": {}, "So400m/14": dict(patch=14, width=1152, depth=27, heads=16, hidden=4304)}
  counts = {}
  for name, fields in sizes.items():
    model = ViT(**fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))
    counts[name] = tree.count(shapes["params"])
  # Those of transformers' SiglipVisionModel without its head.
  assert counts == {"B/16": 85_797_120, "So400m/14": 412_442_352}


@pytest.mark.parametrize("name", ["out", "out.npz"])
@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_an_encoder_that_was_trained_here_leaves(tmp_path, name, pooling):
  """That of a classifier, whose head stays; what SigLIP's code would not compute is refused."""
  encoder = dict(name="vit", pooling=pooling, **FIELDS)
  section = dict(name="classify", encoder=encoder, classes=3)
  shapes = jax.eval_shape(lambda key: MODEL.clone(pooling=pooling).init(key, IMAGES, method="pool"), KEY)
  source = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.25, np.float32), shapes["params"])
  parts = jax.jit(objectives.build(section).init)(KEY, {"encoder": {"params": {"main": source | params()}}})
  run, out = tmp_path / "run", tmp_path / name
  storage.write_export(run, {"objective": section}, parts)
  export.main(["--format=siglip", f"--model={run}", f"--out={out}"])
  heads = None if name == "out.npz" else 3
  converted = siglip.convert(out, heads)
  assert converted.config == {"network": "vit", "vit": FIELDS} and not converted.unknown
  jax.tree.map(np.testing.assert_array_equal, converted.variables["params"]["main"], params())
  if name == "out":
    tower = siglip.load(out)
    assert tower.model == MODEL.clone(pooling=pooling)
    jax.tree.map(np.testing.assert_array_equal, tower.params, source | params())
  model = maskgen.load(run)
  patches = jax.jit(MODEL.apply)({"params": converted.variables["params"]["main"]}, IMAGES)
  np.testing.assert_allclose(model.features(IMAGES, patches=True), patches, atol=1e-5)
  with pytest.raises(UserError, match=r"exists: give the name of a new file|not an empty folder"):
    export.main(["--format=siglip", f"--model={run}", f"--out={out}"])


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(activation="gelu"), "SigLIP has no encoder with activation='gelu': export with --format=maskgen"),
    (dict(fixed_positions=True), "SigLIP has no encoder with fixed_positions=True"),
    (dict(pooling="class"), "SigLIP has no encoder with pooling='class'"),
    (dict(image_size=(8, 4)), r"SigLIP takes square images, not \(8, 4\)"),
  ],
)
def test_what_siglip_cannot_compute_does_not_leave(tmp_path, fields, message):
  with pytest.raises(UserError, match=message):
    siglip.write(tmp_path / "out.npz", MODEL.clone(**fields), params())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  for package in ("torch", "transformers"):
    if importlib.util.find_spec(package) is None:
      pytest.skip(f"{package} is not installed: pip install 'maskgen[parity]'")
  folder = tmp_path_factory.mktemp("siglip")
  siglip.write(folder / "exported", MODEL, params())
  done = subprocess.run([sys.executable, str(PROGRAM), str(folder)], capture_output=True, text=True)
  assert not done.returncode, done.stderr[-3000:]
  return folder


@pytest.mark.parametrize("name", ["whole", "vision"])
def test_same_numbers_as_transformers(reference, name):
  converted = siglip.convert(reference / name / "model.safetensors", 3)
  arrays = load_file(reference / "reference.safetensors")
  model = ViT(**converted.config["vit"])
  found = jax.jit(model.apply)({"params": converted.variables["params"]["main"]}, arrays["images"])
  assert np.abs(found - arrays["patches"]).max() <= 1e-4 * np.abs(arrays["patches"]).max()


def test_transformers_loads_what_is_exported(reference):
  arrays = load_file(reference / "reference.safetensors")
  found = jax.jit(MODEL.apply)({"params": params()}, arrays["resized"])
  assert np.abs(found - arrays["exported"]).max() <= 1e-5 * np.abs(arrays["exported"]).max()
