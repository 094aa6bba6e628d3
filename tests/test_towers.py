"""Feature networks for evaluations: DINO, CLIP and SigLIP from transformers, and trained models.

Transformers computes in a separate process (towers_reference.py), which needs the extra `parity`; without it,
we compare with what that process once wrote.
"""

import functools
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import towers_reference as reference
from PIL import Image
from safetensors.numpy import load_file, save_file

import maskgen
from maskgen import tree
from maskgen.errors import UserError
from maskgen.evaluators import feature_spaces
from maskgen.importers import clip, dinov2, dinov3, siglip, siglip2
from maskgen.models.image_encoder import VitEncoder
from maskgen.models.vit import ViT
from maskgen.numerics import resizing
from maskgen.tools import convert, evaluate

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
  path = HERE / "golden" / "towers.npz"
  if all(importlib.util.find_spec(package) for package in ("torch", "transformers")):
    path = tmp_path_factory.mktemp("towers") / "towers.npz"
    program = [sys.executable, str(HERE / "towers_reference.py"), str(path)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
  with np.load(path) as archive:
    return dict(archive)


@pytest.fixture(scope="module")
def folders(expected, tmp_path_factory):
  """A folder of transformers for each tower."""
  root = tmp_path_factory.mktemp("folders")
  for name in reference.TOWERS:
    reference.write(root / name, *json.loads(str(expected[f"{name}/stored"])))
  return root


@pytest.mark.parametrize("name", reference.TOWERS)
def test_same_numbers_as_transformers(expected, folders, name):
  """From pictures to features: resizing, cropping, standardising, interpolated positions, the network."""
  space = feature_spaces.open_space(f"{name.split('_')[0]}:{folders / name}", None)
  found, wanted = np.asarray(space(jax.numpy.asarray(reference.pictures()))), expected[f"{name}/features"]
  assert found.shape == wanted.shape
  assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_encoders_of_rotary_positions_see_the_same(expected, folders):
  """Patches, and what the class position looks at, at a size that is not that of config.json."""
  converted = dinov3.convert(folders / "dinov3", image_size=(12, 16))
  encoder = VitEncoder.from_section(converted.config["vit"], "it")
  batch = {"image": dinov3.load(folders / "dinov3").preparation(reference.pictures())}

  @jax.jit
  def look(params):
    return encoder.encode(params, {}, batch), encoder.states(params, {}, batch).attention

  found = look(converted.variables["params"]["main"])
  for value, name in zip(found, ("patches", "attention"), strict=True):
    wanted = expected[f"dinov3/{name}"]
    assert np.abs(value - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["dinov3", "dinov3_gated"])
def test_names_of_two_projects(folders, tmp_path, name):
  """The reference stores masks of biases, periods of positions, and what only training uses."""
  model, params, *_ = dinov3.load(folders / name)
  renamed = dinov3.rename(params, model, dinov3.REFERENCE)
  found = {key: np.ascontiguousarray(value) for key, value in renamed.items()}
  periods = np.float32([1, 10])
  found |= {"mask_token": np.ones((1, 24), np.float32), "local_cls_norm.bias": np.ones(24, np.float32)}
  found |= {"rope_embed.periods": periods}
  for i in range(2):
    bias = f"blocks.{i}.attn.qkv.bias"
    if bias in found:
      mask = np.repeat(np.float32([1, 0, 1]), 24)
      found |= {bias: np.where(mask, found[bias], np.nan), f"{bias}_mask": mask}
  path = tmp_path / "reference.safetensors"
  save_file(found, path)
  size = model.image_size
  converted, wanted = dinov3.convert(path, 3, size), dinov3.convert(folders / name, image_size=size)
  assert converted.config == wanted.config and not converted.unknown
  jax.tree.map(np.testing.assert_array_equal, converted.variables, wanted.variables)
  for more, message in (
    ({"cls_norm.bias": periods}, "has a tensor 'cls_norm.bias' for which this network has no layer"),
    ({"rope_embed.periods": periods**2}, "has rope_embed.periods of a base that is not 100"),
  ):
    save_file(found | more, path)
    with pytest.raises(UserError, match=message):
      dinov3.convert(path, 3)


def test_a_picture_of_any_shape_has_its_own_grid(expected, folders):
  """The converted encoder of one size computes what the feature network does, which adapts to pictures."""
  converted = siglip2.convert(folders / "siglip2", image_size=(20, 16))
  tower = siglip2.load(folders / "siglip2")
  model = tower.model.clone(image_size=converted.config["vit"]["image_size"])
  params = converted.variables["params"]["main"] | {"attention_head": tower.params["attention_head"]}
  prepared = tower.preparation(reference.pictures())
  assert prepared.shape[1:3] == (20, 16)
  embed = jax.jit(functools.partial(model.apply, method="embed"))
  found, wanted = embed({"params": params}, prepared), expected["siglip2/features"]
  assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
  with pytest.raises(UserError, match="is a NaFlex variant of SigLIP 2: give --format=siglip2"):
    siglip.convert(folders / "siglip2")
  with pytest.raises(UserError, match="is of SigLIP 2's fixed size, or SigLIP's: give --format=siglip"):
    siglip2.convert(folders / "siglip_2")


def test_same_embeddings_of_texts_as_transformers(expected, tmp_path):
  reference.write_clip(tmp_path / "clip", *json.loads(str(expected["text/stored"])))
  found, wanted = clip.load_text(tmp_path / "clip").embed(reference.TEXTS), expected["text/features"]
  assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
  assert np.abs(found[0] - found[1]).max() > 0.1 * np.abs(wanted).max()


def test_a_size_of_one_number_is_a_square_for_dino(expected, folders, tmp_path):
  folder = edited(folders, tmp_path, "dino", preprocessor_config=dict(size=12))
  space, pictures = feature_spaces.open_space(f"dino:{folder}", None), jax.numpy.asarray(reference.pictures())
  np.testing.assert_allclose(space(pictures), expected["dino/features"], rtol=1e-4, atol=1e-5)


def test_generated_images_are_compared_as_they_would_be_saved(folders):
  space = feature_spaces.open_space(f"siglip:{folders / 'siglip'}", None)
  floats = reference.pictures() / np.float32(255) + np.float32(1e-3)
  np.testing.assert_array_equal(*map(space, map(jax.numpy.asarray, (floats, reference.pictures()))))


def test_published_sizes():
  """The numbers of transformers' models, without DINOv2's mask token."""
  common = dict(image_size=(518, 518), patch=14, pooling="class", layer_scale=True)
  rotary = dict(rotary_base=100.0, registers=4, pooling="class", layer_scale=True)
  sizes = {
    22_056_192: common | dict(width=384, heads=6, activation="gelu"),  # S
    1_136_479_232: common | dict(width=1536, depth=40, heads=24, hidden=4096, activation="swiglu"),  # g
    6_716_030_976: rotary  # DINOv3's 7B
    | dict(width=4096, depth=40, heads=32, hidden=8192, activation="swiglu", qkv_bias=""),
    21_596_160: rotary | dict(width=384, heads=6, qkv_bias="qv"),  # DINOv3's S
    87_849_216: dict(patch=32, pooling="class", embedding_norm=True, patch_bias=False, projection=512),
    92_884_224: dict(pooling="attention"),  # SigLIP's B/16
  }
  for count, fields in sizes.items():
    model = ViT(**fields)
    image = jax.ShapeDtypeStruct((1, *model.image_size, 3), np.float32)

    def count_of(depth, model=model, image=image):
      init = functools.partial(model.clone(depth=depth).init, method="embed")
      return tree.count(jax.eval_shape(init, jax.random.key(0), image)["params"])

    one = count_of(1)
    assert one + (model.depth - 1) * (count_of(2) - one) == count


def edited(folders, tmp_path, name, **changes):
  """A copy of a folder with other values in its JSON files, or without keys that are None."""
  folder = tmp_path / name
  folder.mkdir(exist_ok=True)
  for file in (folders / name).iterdir():
    data = file.read_bytes()
    if file.suffix == ".json":
      content = json.loads(data) | changes.get(file.stem, {})
      data = json.dumps({key: value for key, value in content.items() if value is not None}).encode()
    (folder / file.name).write_bytes(data)
  return folder


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("clip", dict(config=dict(hidden_size=16)), "hidden_size=16 in config.json, but 24 by its tensors"),
    ("clip", dict(config=dict(hidden_act="relu")), "has the activation 'relu'"),
    ("clip", dict(config=dict(num_attention_heads=None)), "no head count, and none is known for width 24"),
    ("clip", dict(preprocessor_config=dict(resample=0)), r"resample=0: give 2 \(bilinear\) or 3"),
    ("clip", dict(preprocessor_config=dict(do_center_crop=False)), "must set a crop_size, or a size with"),
    ("clip", dict(preprocessor_config=dict(do_rescale=False)), "does not divide pixels by 255"),
    ("clip", dict(preprocessor_config=dict(size={"longest_edge": 9})), "has the size {'longest_edge': 9}"),
    ("clip", dict(preprocessor_config=dict(image_mean=[0.5])), r"image_mean=\[0.5\]: give 3 numbers"),
    ("dinov2", dict(preprocessor_config=dict(crop_size=18)), r"\(18, 18\): give .* multiples of 4"),
    ("dinov3_gated", dict(config=dict(hidden_act="gelu")), "has gates of gelu: this network has those of"),
    ("siglip2", dict(preprocessor_config=dict(patch_size=8)), "does not resize to .* patches of 4 pixels"),
    ("siglip2", dict(preprocessor_config=dict(do_resize=False)), "does not resize to a number of patches"),
    ("siglip2", dict(preprocessor_config=dict(max_num_patches="9")), "patches .*: use the published one"),
  ],
)
def test_folders_that_do_not_fit_are_one_sentence(folders, tmp_path, name, changes, message):
  with pytest.raises(UserError, match=message):
    feature_spaces.open_space(f"{name.split('_')[0]}:{edited(folders, tmp_path, name, **changes)}", None)


@pytest.mark.parametrize(
  ("module", "name", "tensor"),
  [
    (dinov2, "dinov2_registers", "encoder.layer.1.norm2.bias"),
    (dinov3, "dinov3", "layer.1.norm2.bias"),
    (clip, "clip", "vision_model.encoder.layers.1.mlp.fc2.bias"),
    (siglip, "siglip", "head.attention.in_proj_bias"),
    (siglip2, "siglip2", "embeddings.position_embedding.weight"),
  ],
)
def test_tensors_are_neither_missing_nor_left_over(folders, tmp_path, module, name, tensor):
  folder = edited(folders, tmp_path, name)
  stored = load_file(folder / "model.safetensors")
  save_file({key: value for key, value in stored.items() if key != tensor}, folder / "model.safetensors")
  with pytest.raises(UserError, match=f"has no tensor '{tensor.removeprefix('vision_model.')}'"):
    module.load(folder)
  save_file(stored | {f"{tensor}_too": np.ones(2, np.float32)}, folder / "model.safetensors")
  with pytest.raises(UserError, match=f"has a tensor '{tensor.removeprefix('vision_model.')}_too' for which"):
    module.load(folder)
  (folder / "model.safetensors").unlink()
  (folder / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, which can run code"):
    module.load(folder)


def test_a_file_alone_has_the_published_settings(folders, tmp_path):
  """Those of OpenAI's CLIP, and the centre of what its positions fit."""
  alone = tmp_path / "clip.safetensors"
  alone.write_bytes((folders / "clip" / "model.safetensors").read_bytes())
  with pytest.raises(UserError, match="has no head count"):
    clip.load(alone)
  converted = clip.convert(alone, encoder_heads=3)
  assert converted.config["vit"] == clip.convert(folders / "clip").config["vit"]
  assert "embedding" not in converted.variables["params"]["main"] and not converted.unknown


@pytest.mark.parametrize(("name", "size"), [("dinov2", 16), ("dinov3", "12x16"), ("clip", None)])
def test_converted_towers_are_encoders(folders, tmp_path, name, size):
  flags = [f"--format={name}", f"--weights={folders / name}", f"--out={tmp_path / name}"]
  convert.main([*flags, *([f"--image_size={size}"] if size else [])])
  encoder, tower = maskgen.load(tmp_path / name), getattr(sys.modules[__name__], name).load(folders / name)
  images = np.random.default_rng(0).random((2, *encoder.objective.image_shape), np.float32)
  pooled = tower.model.apply({"params": tower.params}, images, method="pool")
  wanted = (pooled - pooled.mean(axis=1, keepdims=True)) / pooled.std(axis=1, keepdims=True)
  np.testing.assert_allclose(encoder.features(images), wanted, atol=1e-4)
  with pytest.raises(UserError, match="a model of objective 'vit' has no 'generate': call one of features"):
    encoder.generate()


def test_comparisons_in_these_spaces_have_their_names(folders, tmp_path):
  rng = np.random.default_rng(1)
  for name, high in (("made", 200), ("real", 256)):
    np.savez(tmp_path / f"{name}.npz", arr_0=rng.integers(high, size=(30, 16, 16, 3), dtype=np.uint8))
  dinov2_folder, encoder = folders / "dinov2", tmp_path / "tiny_encoder"
  convert.main(["--format=clip", f"--weights={folders / 'clip'}", f"--out={encoder}"])
  for flags, name in (
    (["--features=dinov2", f"--weights={dinov2_folder}"], "frechet_dinov2"),
    ([f"--features=model:{encoder}"], "frechet_tiny_encoder"),
  ):
    out = tmp_path / "out.json"
    pictures = [f"--generated={tmp_path}/made.npz", f"--reference={tmp_path}/real.npz"]
    evaluate.main([*pictures, *flags, "--metrics=fid", "--batch_size=16", f"--json={out}"])
    found = json.loads(out.read_text())
    assert found["metrics"].keys() == {name} and len(found["weights"]) == 64


def test_features_of_a_trained_model():
  space = feature_spaces.open_space("model:digits", None)
  grey = np.random.default_rng(2).random((3, 16, 16, 1), np.float32)
  expected = maskgen.load("digits").features(grey.repeat(3, axis=-1))
  np.testing.assert_allclose(space(jax.numpy.asarray(grey)), expected, rtol=1e-5, atol=1e-5)
  assert space.name == feature_spaces.name_of("model:digits/") == "digits"


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("clip", "'clip' needs weights: write it as 'clip:PATH'"),
    ("siglip:nowhere", "'siglip': nowhere does not exist"),
    ("model:nowhere", "nowhere does not exist"),
    ("siglip3:x", "'siglip3:x' does not exist; did you mean 'siglip"),
  ],
)
def test_spaces_without_weights_are_refused(spec, message):
  with pytest.raises(UserError, match=message):
    feature_spaces.check_space(spec)


def test_a_model_cannot_take_the_name_of_a_space(tmp_path):
  (tmp_path / "pixels").mkdir()
  (tmp_path / "pixels" / "config.json").write_text("{}")
  with pytest.raises(UserError, match="would have the name of another: rename the folder"):
    feature_spaces.check_space(f"model:{tmp_path}/pixels")


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@pytest.mark.parametrize("sides", [(30, 21, 14, 10), (17, 19, 40, 19), (60, 45, 9, 7)])
def test_pillow_is_pillow(sides, filter):  # noqa: A002
  height, width, *wanted = sides
  image = np.random.default_rng(3).integers(256, size=(height, width, 3), dtype=np.uint8)
  image[: height // 2] = (image[: height // 2] > 128) * 255
  resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[filter]
  expected = np.asarray(Image.fromarray(image).resize(tuple(wanted[::-1]), resample))
  np.testing.assert_array_equal(resizing.pillow(image[None], *wanted, filter)[0], expected)
