"""MAE: the reference's numbers from its weights, and what holds of any masked autoencoder.

tests/golden/mae.npz holds random weights of facebookresearch/mae's network, and what its code computed from
them in float64, with the random numbers of its masks stored.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import maskgen
from maskgen import objectives, tree
from maskgen.errors import UserError
from maskgen.importers import mae
from maskgen.models.patches import patchify
from maskgen.tools import convert

GOLDEN = pathlib.Path(__file__).parent / "golden" / "mae.npz"
ENCODER = dict(
  image_size=(16, 16), patch=4, width=16, depth=1, heads=2, pooling="class", fixed_positions=True
)
SECTION = dict(name="masked_pixels", encoder=ENCODER, decoder_width=16, decoder_depth=1, decoder_heads=2)


@pytest.fixture(scope="module")
def golden():
  with np.load(GOLDEN) as archive:
    return dict(archive)


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory):
  """Folders of the whole model, and of its encoder alone."""
  folder = tmp_path_factory.mktemp("mae")
  weights = {name.removeprefix("weights/"): value for name, value in golden.items() if "weights/" in name}
  encoder = {name: value for name, value in weights.items() if "decoder" not in name and name != "mask_token"}
  for name, found in (("whole", weights), ("encoder", encoder)):
    save_file(found, folder / f"{name}.safetensors")
    heads = ["--encoder_heads=4", *(["--decoder_heads=4"] if name == "whole" else [])]
    convert.main(["--format=mae", f"--weights={folder / name}.safetensors", f"--out={folder / name}", *heads])
  return folder


def test_loss_and_gradients_are_those_of_the_reference(golden, converted):
  model = maskgen.load(converted / "whole")
  section = model.config["objective"]
  plain = dict(mean=(0.0,) * 3, std=(1.0,) * 3)  # its images were standardised before they were stored
  objective = objectives.build({**section, "encoder": {**section["encoder"], **plain}})
  images, mask = golden["images_nchw"].transpose(0, 2, 3, 1), golden["mask"].astype(bool)
  kept = np.stack([np.flatnonzero(~row) for row in mask]).astype(np.int32)
  params = model.variables["params"]

  predicted = jax.jit(objective.predict)(params, images, kept)
  np.testing.assert_allclose(predicted, golden["pred"], atol=1e-5)

  def mean_error(params, objective):
    return objective.errors(params, images, mask, kept).mean()

  loss, grads = jax.jit(jax.value_and_grad(mean_error), static_argnums=1)(params, objective)
  np.testing.assert_allclose(loss, golden["loss"], rtol=1e-6)
  raw = objectives.build({**section, "encoder": {**section["encoder"], **plain}, "normalize_targets": False})
  errors = jax.jit(mean_error, static_argnums=1)(params, raw)
  np.testing.assert_allclose(errors, golden["loss_raw_pixels"], rtol=1e-6)

  back = mae.whole_to_reference(grads["main"], objective.encoder, objective.decoder)
  numbers = zip(*(golden[f"grad_{kind}"] for kind in ("names", "norm", "dotcos")), strict=True)
  for name, norm, dotcos in numbers:
    found = np.asarray(back.pop(str(name)), np.float64).ravel()
    assert abs(np.linalg.norm(found) - norm) <= 1e-5 * norm + 1e-8, name
    assert abs(found @ np.cos(0.37 * np.arange(found.size) + 0.1) - dotcos) <= 1e-5 * norm + 1e-8, name
  assert not back


def test_an_encoder_alone_has_the_same_features(golden, converted):
  images = np.clip(golden["images_nchw"].transpose(0, 2, 3, 1), 0.0, 1.0)
  whole, encoder = (maskgen.load(converted / name) for name in ("whole", "encoder"))
  np.testing.assert_array_equal(whole.features(images), encoder.features(images))
  np.testing.assert_array_equal(whole.features(images, patches=True), encoder.features(images, patches=True))


def test_an_encoder_whose_positions_were_trained_keeps_them(golden, converted, tmp_path):
  weights = {name.removeprefix("weights/"): value for name, value in golden.items() if "weights/" in name}
  weights["pos_embed"] = weights["pos_embed"] + 0.1
  save_file(weights, tmp_path / "trained.safetensors")
  found = mae.convert(tmp_path / "trained.safetensors", encoder_heads=4, decoder_heads=4)
  assert not found.config["objective"]["encoder"]["fixed_positions"]
  position = found.variables["params"]["main"]["encoder"]["position"]
  np.testing.assert_array_equal(position, weights["pos_embed"][0])


def test_reconstructions_keep_what_is_visible():
  objective = objectives.build(SECTION)
  variables = objective.init(jax.random.key(0), {})
  images = jax.random.uniform(jax.random.key(1), (3, 16, 16, 3))
  key = jax.random.key(2)
  fns = objectives.compile_predict_fns(objective)
  found = fns["reconstruct"](variables, {"image": images}, key)
  mask = fns["mask"](variables, {"key": jax.random.split(key, 3)}, key)
  assert mask.shape == (3, 4, 4)
  assert (mask.sum(axis=(1, 2)) == 12).all()
  same = jnp.abs(patchify(found, 4) - patchify(images, 4)).max(axis=-1) < 1e-5
  np.testing.assert_array_equal(same, ~mask)


def test_the_loss_is_that_of_masked_patches_and_comes_from_visible_ones():
  objective = objectives.build(SECTION | {"normalize_targets": False})
  params = objective.init(jax.random.key(0), {})["params"]
  images = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3))
  mask, kept = objective.mask(jax.random.split(jax.random.key(2), 2))

  def change(where):
    pixels = jnp.repeat(jnp.repeat(where.reshape(2, 4, 4), 4, 1), 4, 2)[..., None]
    return jnp.where(pixels, 1.0 - images, images)

  predict = jax.jit(objective.predict)
  predicted = predict(params, images, kept)
  np.testing.assert_array_equal(predict(params, change(mask), kept), predicted)
  assert (predict(params, change(~mask), kept) != predicted).any()
  errors = jnp.square(predicted - objective.targets(images)[0]).mean(axis=-1)
  expected = [float(errors[i][mask[i]].mean()) for i in range(2)]
  np.testing.assert_allclose(objective.errors(params, images, mask, kept), expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (dict(mask_ratio=0.0), "masks 0 of 16 patches"),
    (dict(mask_ratio=0.99), "masks 16 of 16 patches"),
    (dict(encoder={**ENCODER, "pooling": "attention"}), "a head that no loss trains"),
    (dict(decoder_width=18), "a multiple of 4"),
    (dict(encoder={**ENCODER, "width": 18, "heads": 2}), "fixed positions need a multiple of 4"),
    (dict(encoder={**ENCODER, "image_size": (18, 16)}), "multiples of 4"),
  ],
)
def test_wrong_settings(change, words):
  with pytest.raises(UserError, match=words):
    objectives.build(SECTION | change)


def test_a_classifier_takes_the_encoder(converted):
  section = maskgen.load(converted / "whole").config["objective"]
  part = objectives.encoder_part(section, "config.objective.encoder")
  names = tree.flatten(maskgen.load(converted / "whole").variables["params"]["main"]["encoder"])
  assert names.keys() == tree.flatten(part.encoder.init(jax.random.key(0))).keys()
  objective = objectives.build(dict(name="classify", classes=3, encoder=section, drop_path=0.1))
  assert objective.image_shape == (32, 32, 3)
