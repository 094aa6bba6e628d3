"""Encoders that were trained here, for timm and transformers.

Both compute in a separate process (encoders_reference.py), which needs the extra `parity`.
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
from safetensors.numpy import load_file, save_file

import maskgen
from maskgen import objectives, storage
from maskgen.errors import UserError
from maskgen.importers import siglip, timm, vit
from maskgen.models.mage import Encoder
from maskgen.models.vit import ViT
from maskgen.numerics.vocab import Vocab
from maskgen.tools import convert, export

PROGRAM = pathlib.Path(__file__).parent / "encoders_reference.py"
SIZES = dict(image_size=(8, 12), patch=4, width=12, depth=2, heads=3, hidden=20)
PIXELS = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
CLASS = dict(pooling="class", activation="gelu")
# Encoders that timm and, except for the scaled one, transformers have.
ENCODERS = {
  "mae": SIZES | CLASS | PIXELS | dict(fixed_positions=True),
  "learned": SIZES | CLASS,
  "scaled": SIZES | dict(pooling="class", embedding_norm=True, patch_bias=False, layer_scale=True),
  "mean": SIZES | PIXELS | dict(image_size=(8, 8), pooling="mean", activation="gelu"),
  "attention": SIZES | dict(image_size=(8, 8), pooling="attention"),
}
CASES = [
  (name, form)
  for name in ENCODERS
  for form in ("timm", "transformers")
  if (name, form) != ("scaled", "transformers")
]
MAGE = Encoder(Vocab(codebook=10), 6, width=12, depth=2, heads=3)
GRID = (2, 3)


def randomly(shapes):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32), shapes)


@functools.cache
def params(name):
  """Random parameters, and an input: images, or codes."""
  rng = np.random.default_rng(1)
  if name == "mage":
    codes = np.zeros((1, MAGE.num_tokens), np.int32)
    shapes = jax.eval_shape(lambda key: MAGE.init(key, codes, method="pool"), jax.random.key(0))
    return randomly(shapes["params"]), rng.integers(MAGE.vocab.codebook, size=(2, MAGE.num_tokens))
  model = ViT(**ENCODERS[name])
  images = rng.random((2, *model.image_size, 3), np.float32)
  shapes = jax.eval_shape(lambda key: model.init(key, images, method="pool"), jax.random.key(0))
  return randomly(shapes["params"]), images


@pytest.mark.parametrize(("name", "form"), CASES)
def test_encoders_come_back(tmp_path, name, form):
  model = ViT(**ENCODERS[name])
  writer, source = (timm if form == "timm" else vit), params(name)[0]
  writer.write(tmp_path / "out", model, source)
  is_siglip = form == "transformers" and not model.leading
  converted = (siglip if is_siglip else writer).convert(tmp_path / "out")
  # SigLIP's importer drops the head.
  wanted = model.clone(pooling="mean") if is_siglip else model
  assert ViT(**converted.config["vit"]) == wanted and not converted.unknown
  found = converted.variables["params"]["main"]
  jax.tree.map(np.testing.assert_array_equal, found, {key: source[key] for key in found})
  assert source.keys() - found.keys() == ({"attention_head"} if wanted.pooling != model.pooling else set())


def test_codes_enter_by_a_table(tmp_path):
  source, _ = params("mage")
  found = timm.write_mage(tmp_path / "out", MAGE, GRID, source)
  np.testing.assert_array_equal(found["patch_embed.weight"][:10], source["embedding"][:10])
  np.testing.assert_array_equal(found["patch_embed.weight"][10], source["embedding"][MAGE.vocab.mask_id])
  np.testing.assert_array_equal(found["cls_token"][0, 0], source["embedding"][MAGE.vocab.null_class_id])
  assert found.keys() == load_file(tmp_path / "out" / "model.safetensors").keys()
  assert not any(name.startswith(("norm.", "decoder")) for name in found)
  args = json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]
  assert args["img_size"] == [2, 3] and args["patch_size"] == 1 and args["mlp_ratio"] == 4.0


@pytest.mark.parametrize(
  ("writer", "fields", "message"),
  [
    (timm, dict(epsilon=1e-5), "timm has no encoder with epsilon=1e-05: export with --format=maskgen"),
    (timm, dict(activation="swiglu"), "timm has no encoder with activation='swiglu'"),
    (timm, dict(patch_bias=False), "timm has no encoder with patch_bias=False"),
    (timm, dict(rotary_base=100.0), "timm has no encoder with rotary_base=100.0"),
    (vit, dict(qkv_bias="qv"), "ViTModel of transformers has no encoder with qkv_bias='qv'"),
    (vit, dict(layer_scale=True), "ViTModel of transformers has no encoder with layer_scale=True"),
    (vit, dict(pooling="mean"), r"SigLIP takes square images, not \(8, 12\)"),
  ],
)
def test_what_others_cannot_compute_does_not_leave(tmp_path, writer, fields, message):
  with pytest.raises(UserError, match=message):
    writer.write(tmp_path / "out", ViT(**{**SIZES, **CLASS, **fields}), {})


def test_other_networks_do_not_enter(tmp_path):
  source = params("learned")[0]
  timm.write(tmp_path / "out", ViT(**ENCODERS["learned"]), source)
  config, weights = (tmp_path / "out" / name for name in ("config.json", "model.safetensors"))
  config.write_text(config.read_text().replace("vit_base_patch16_224", "vit_base_patch16_siglip_224"))
  with pytest.raises(UserError, match="is timm's vit_base_patch16_siglip_224: this format reads those with"):
    timm.convert(tmp_path / "out")
  config.write_text(config.read_text().replace("siglip_", ""))
  save_file(load_file(weights) | {"reg_token": np.ones((1, 4, 12), np.float32)}, weights)
  with pytest.raises(UserError, match="has a tensor 'reg_token' for which this network has no layer"):
    timm.convert(tmp_path / "out")


def test_trained_models_leave_by_the_command(tmp_path):
  """An MAE without its decoder, and a MAGE without decoder and tokenizer."""
  encoder = ENCODERS["mae"]
  section = dict(name="masked_pixels", encoder=encoder, decoder_width=12, decoder_depth=1, decoder_heads=3)
  variables = jax.eval_shape(objectives.build(section).init, jax.random.key(0), {})
  storage.write_export(tmp_path / "mae", {"objective": section}, randomly(variables))
  model, images = maskgen.load(tmp_path / "mae"), params("mae")[1]
  for form, name in (("timm", "timm"), ("transformers", "vit")):
    out = tmp_path / form
    export.main([f"--format={form}", f"--model={tmp_path / 'mae'}", f"--out={out}"])
    convert.main([f"--format={name}", f"--weights={out}", f"--out={tmp_path / name}_back"])
    back = maskgen.load(tmp_path / f"{name}_back")
    np.testing.assert_array_equal(back.features(images), model.features(images))
  export.main(["--format=timm", "--model=digits", f"--out={tmp_path / 'mage'}"])
  mage, table = (
    maskgen.load("digits"),
    load_file(tmp_path / "mage" / "model.safetensors")["patch_embed.weight"],
  )
  assert len(table) == mage.objective.codebook_size + 1
  np.testing.assert_array_equal(table[:-1], mage.variables["params"]["main"]["embedding"][: len(table) - 1])
  with pytest.raises(UserError, match="'mage' without a ViT on pixels: --format=transformers needs a model"):
    export.main(["--format=transformers", "--model=digits", f"--out={tmp_path / 'no'}"])


def test_encoders_of_latents_do_not_leave_without_their_autoencoder(tmp_path):
  encoder = dict(patch=1, width=12, depth=1, heads=3, pooling="class", fixed_positions=True)
  network = dict(channels=8, multipliers=(1, 2), strides=(4,), blocks=1, norm_groups=2, codebook_size=8)
  autoencoder = dict(name="tokenizer", image_size=(16, 16), tokenizer=network)
  section = dict(name="lmd", image_size=(16, 16), autoencoder=autoencoder, encoder=encoder, rise_steps=8)
  section |= dict(decoder_width=12, decoder_depth=1, decoder_heads=3)
  objective = objectives.build(section)
  variables = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())
  storage.write_export(tmp_path / "lmd", {"objective": section}, randomly(variables))
  for form in export.ENCODERS:
    with pytest.raises(UserError, match=f"'lmd' without a ViT on pixels: --format={form} needs a model"):
      export.main([f"--format={form}", f"--model={tmp_path / 'lmd'}", f"--out={tmp_path / 'no'}"])


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_same_numbers_in_other_libraries(tmp_path, library):
  for package in ("torch", library):
    if importlib.util.find_spec(package) is None:
      pytest.skip(f"{package} is not installed: pip install 'maskgen[parity]'")
  names = [name for name, form in CASES if form == library]
  for name in names:
    (timm if library == "timm" else vit).write(
      tmp_path / library / name, ViT(**ENCODERS[name]), params(name)[0]
    )
  if library == "timm":
    timm.write_mage(tmp_path / library / "mage", MAGE, GRID, params("mage")[0])
    names.append("mage")
  np.savez(tmp_path / "inputs.npz", **{name: params(name)[1] for name in names})
  program = [sys.executable, str(PROGRAM), str(tmp_path), library]
  done = subprocess.run(program, capture_output=True, text=True)
  assert not done.returncode, done.stderr[-3000:]
  with np.load(tmp_path / f"{library}.npz") as found:
    for name in names:
      source, given = params(name)
      model = MAGE if name == "mage" else ViT(**ENCODERS[name])
      pooled = jax.jit(functools.partial(model.apply, method="pool"))({"params": source}, given)
      np.testing.assert_allclose(found[f"{name}/pooled"], pooled, atol=1e-5, err_msg=name)
      if name != "mage":
        tokens = jax.jit(model.apply)({"params": source}, given)
        np.testing.assert_allclose(found[f"{name}/tokens"], tokens, atol=1e-5, err_msg=name)
