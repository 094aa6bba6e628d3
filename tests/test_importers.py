"""Weights of other projects: imports are complete, compute the same, and export unchanged."""

import importlib.util
import json
import os
import pathlib
import pickle
import subprocess
import sys

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath
from flax import traverse_util
from safetensors.numpy import load_file, save_file

import maskgen
from maskgen import config as config_lib
from maskgen import objectives, storage, tree
from maskgen.benchmarks import dataless
from maskgen.errors import UserError
from maskgen.importers import mage, tensors
from maskgen.importers.published import PUBLISHED
from maskgen.models.vqgan import VQGAN
from maskgen.numerics import losses
from maskgen.tools import convert, export
from maskgen.training.pretrained import complete

GOLDEN = pathlib.Path(__file__).parents[2] / "shared" / "golden" / "mage"

# A tiny file of the reference, its names and shapes written down by hand.
CODES, WIDTH, DECODER, SIDE = 8, 8, 12, 4
ROWS = CODES + 1000 + 1
HEADS = ("--encoder_heads=2", "--decoder_heads=3")
DEAD = {
  "cls_token": (1, 1, WIDTH),
  "mask_token": (1, 1, DECODER),
  "pos_embed": (1, 1 + SIDE**2, WIDTH),
  "decoder_pos_embed": (1, 1 + SIDE**2, DECODER),
  "patch_embed.proj.weight": (WIDTH, 3, 2, 2),
  "patch_embed.proj.bias": (WIDTH,),
  "decoder_pred.weight": (12, DECODER),
  "decoder_pred.bias": (12,),
}


def linear(name, inputs, outputs):
  return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name, width):
  return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(name, width):
  found = norm(f"{name}.norm1", width) | norm(f"{name}.norm2", width)
  found |= linear(f"{name}.attn.qkv", width, 3 * width) | linear(f"{name}.attn.proj", width, width)
  return found | linear(f"{name}.mlp.fc1", width, 4 * width) | linear(f"{name}.mlp.fc2", 4 * width, width)


def residual(name, inputs, outputs):
  found = norm(f"{name}.norm1", inputs) | norm(f"{name}.norm2", outputs)
  found |= {f"{name}.conv1.weight": (outputs, inputs, 3, 3), f"{name}.conv2.weight": (outputs, outputs, 3, 3)}
  return found | ({f"{name}.nin_shortcut.weight": (outputs, outputs, 1, 1)} if inputs != outputs else {})


def tokenizer_shapes():
  found = {"quantize.embedding.weight": (CODES, 4), "encoder.conv_in.weight": (32, 3, 3, 3)}
  found |= residual("encoder.down.0.block.0", 32, 32) | residual("encoder.down.1.block.0", 32, 64)
  for part in ("encoder", "decoder"):
    found |= residual(f"{part}.mid.block_1", 64, 64) | residual(f"{part}.mid.block_2", 64, 64)
  found |= norm("encoder.norm_out", 64)
  found |= {"encoder.conv_out.weight": (4, 64, 1, 1), "encoder.conv_out.bias": (4,)}
  found |= {"decoder.conv_in.weight": (64, 4, 3, 3), "decoder.conv_in.bias": (64,)}
  found |= residual("decoder.up.1.block.0", 64, 64) | residual("decoder.up.0.block.0", 64, 32)
  found |= {"decoder.up.1.upsample.conv.weight": (64, 64, 3, 3), "decoder.up.1.upsample.conv.bias": (64,)}
  found |= norm("decoder.norm_out", 32)
  return found | {"decoder.conv_out.weight": (3, 32, 3, 3), "decoder.conv_out.bias": (3,)}


def mage_shapes():
  found = {f"vqgan.{name}": shape for name, shape in tokenizer_shapes().items()}
  found |= {
    "token_emb.word_embeddings.weight": (ROWS, WIDTH),
    "token_emb.position_embeddings.weight": (257, WIDTH),
    "decoder_pos_embed_learned": (1, 1 + SIDE**2, DECODER),
    "mlm_layer.bias": (1, 1, ROWS),
  }
  found |= norm("token_emb.LayerNorm", WIDTH) | norm("norm", WIDTH) | norm("decoder_norm", DECODER)
  found |= linear("decoder_embed", WIDTH, DECODER) | linear("mlm_layer.fc", DECODER, WIDTH)
  found |= norm("mlm_layer.ln", WIDTH) | block("blocks.0", WIDTH)
  return found | block("decoder_blocks.0", DECODER) | block("decoder_blocks.1", DECODER)


def draw(shapes, seed=0):
  rng = np.random.default_rng(seed)
  found = {name: rng.normal(0.0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
  for value in found.values():
    value.flat[0] = -0.0  # whose sign a sum would lose
  return found


def draw_mage():
  weights = draw(mage_shapes())
  # The images have fewer tokens than the reference has positions: what it never reads is not kept.
  weights["token_emb.position_embeddings.weight"][1 + SIDE**2 :] = 0.0
  return weights


@pytest.fixture(scope="module")
def tiny_mage(tmp_path_factory):
  """A weights file of the reference, and the converted model."""
  folder = tmp_path_factory.mktemp("mage")
  position_ids = {"token_emb.position_ids": np.arange(257)[None]}
  save_file(draw_mage() | draw(DEAD) | position_ids, folder / "reference.safetensors")
  run_convert("mage", folder / "reference.safetensors", folder / "converted", *HEADS)
  return folder


def run_convert(kind, weights, out, *options):
  convert.main([f"--format={kind}", f"--weights={weights}", f"--out={out}", *options])


def run_export(model, out):
  export.main(["--format=mage", f"--model={model}", f"--out={out}"])


# MAGE


def test_what_comes_in_goes_out_bit_for_bit(tiny_mage, tmp_path):
  run_export(tiny_mage / "converted", tmp_path / "back.safetensors")
  tiny.assert_same_bits(load_file(tmp_path / "back.safetensors"), draw_mage())


def test_float16_comes_out_as_equal_float32(tmp_path):
  weights = {name: value.astype(np.float16) for name, value in draw_mage().items()}
  save_file(weights, tmp_path / "short.safetensors")
  run_convert("mage", tmp_path / "short.safetensors", tmp_path / "converted", *HEADS)
  run_export(tmp_path / "converted", tmp_path / "back.safetensors")
  back = load_file(tmp_path / "back.safetensors")
  tiny.assert_same_bits(back, {name: value.astype(np.float32) for name, value in weights.items()})


def test_a_converted_model_is_a_model(tiny_mage):
  model = maskgen.load(tiny_mage / "converted")
  vocab = model.objective.model.vocab
  assert (vocab.null_class_id, vocab.mask_id, vocab.size) == (CODES + 76, ROWS - 1, ROWS)
  images = model.generate(seed=1, batch=2, steps=2)
  assert images.shape == (2, 8, 8, 3) and images.min() >= 0 and images.max() <= 1
  tokens = model.encode(images)
  assert tokens.shape == (2, SIDE**2) and len(np.unique(tokens)) > 1
  assert model.features(images).shape == (2, WIDTH)
  assert model.logits(tokens, tokens % 2 == 0).shape == (2, SIDE**2, CODES)
  assert model.reconstruct(images).shape == images.shape


@pytest.mark.parametrize("name", ["probe_mage", "finetune_mage", "fewshot_mage"])
def test_classifiers_take_a_converted_model_at_once(tiny_mage, tmp_path, name):
  """Class ids, the null class and the tokenizer's shortcut come from its config."""
  path = tiny_mage / "converted"
  config = config_lib.to_dict(config_lib.load(f"configs/{name}.py:debug,model={path}"))
  experiment = dataless.build(complete(config))
  experiment.check_pretrained(epath.Path(tmp_path))
  state, frozen = experiment.init(epath.Path(tmp_path))
  model = maskgen.load(path)
  for part in ("embedding", "position"):
    found = (frozen["encoder"] if name == "probe_mage" else state.params["main"])[part]
    np.testing.assert_array_equal(found, model.variables["params"]["main"][part])


def test_unused_tensors_are_named(tiny_mage, tmp_path, capsys):
  save_file(draw_mage() | draw(DEAD) | draw({"projector.weight": (2, 3)}), tmp_path / "more.safetensors")
  run_convert("mage", tmp_path / "more.safetensors", tmp_path / "converted", *HEADS)
  _, dead, unknown = capsys.readouterr().out.strip().split("\n")
  assert all(name in dead for name in DEAD)
  assert "projector.weight" in unknown and not any(name in unknown for name in DEAD)


def test_a_converted_tokenizer_can_be_trained_on(tiny_mage, tmp_path):
  save_file(draw(tokenizer_shapes()), tmp_path / "tokenizer.safetensors")
  run_convert("vqgan_pytorch", tmp_path / "tokenizer.safetensors", tmp_path / "tokenizer", "--image_size=8")
  config = json.loads((tiny_mage / "converted" / "config.json").read_text())
  objective = objectives.build(config["objective"])
  objective.check_pretrained("tokenizer", storage.load_config(tmp_path / "tokenizer"))
  found = storage.load_variables(tmp_path / "tokenizer", objective.pretrained_shapes()["tokenizer"])
  tree.check_same(found, objective.pretrained_shapes()["tokenizer"], "the tokenizer")
  image = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
  assert maskgen.load(tmp_path / "tokenizer").encode(image).shape == (2, SIDE**2)


def native(tmp_path, **changes):
  """An export of a model trained here: one class id, and a tokenizer with other options."""
  network = dict(
    channels=32,
    multipliers=(1, 2),
    strides=(2,),
    blocks=1,
    codebook_size=CODES,
    code_width=4,
    shortcut="reference",
  )
  sizes = dict(width=8, depth=1, heads=2, decoder_width=12, decoder_depth=1, decoder_heads=3)
  section = dict(name="mage", image_size=(8, 8), tokenizer=network | changes, **sizes)
  objective = objectives.build(section)
  shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda leaf: rng.normal(0.0, 0.2, leaf.shape).astype(np.float32), shapes)
  storage.write_export(tmp_path / "native", {"objective": section}, variables)
  return tmp_path / "native"


def test_a_model_trained_here_goes_out_and_means_the_same(tmp_path):
  path = native(tmp_path)
  run_export(path, tmp_path / "out.safetensors")
  table = load_file(tmp_path / "out.safetensors")["token_emb.word_embeddings.weight"]
  np.testing.assert_array_equal(np.flatnonzero(table.any(axis=1)), [*range(CODES), CODES + 76, ROWS - 1])
  run_convert("mage", tmp_path / "out.safetensors", tmp_path / "back", *HEADS)
  tokens = np.random.default_rng(0).integers(0, CODES, (2, SIDE**2))
  before, after = (
    maskgen.load(folder).logits(tokens, tokens % 3 == 0) for folder in (path, tmp_path / "back")
  )
  np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(shortcut="input"), "shortcut='input'"),
    (dict(normalize_codes=True), "normalize_codes"),
    (dict(norm_groups=16), "norm_groups=16"),
    (dict(strides=(4,)), "strides"),
  ],
)
def test_what_the_reference_cannot_express_is_not_exported(tmp_path, changes, message):
  with pytest.raises(UserError, match=rf"cannot express.*{message}"):
    run_export(native(tmp_path, **changes), tmp_path / "out.safetensors")
  assert not (tmp_path / "out.safetensors").exists()


def test_the_same_width_everywhere_needs_no_shortcut():
  mage.check_expressible(VQGAN(multipliers=(1, 1), strides=(2,)), (4, 4))
  with pytest.raises(UserError, match="4x5"):
    mage.check_expressible(VQGAN(shortcut="reference"), (4, 5))


@pytest.mark.parametrize(
  ("change", "options", "message"),
  [
    (lambda w: w.pop("blocks.0.norm1.bias"), HEADS, r"no tensor 'blocks.0.norm1.bias'"),
    (
      lambda w: [w.pop(n) for n in list(w) if n[:9] == "decoder_b"],
      HEADS,
      r"no tensor 'decoder_blocks.0.norm1",
    ),
    (lambda w: w.pop("vqgan.encoder.conv_in.weight"), HEADS, r"no tensor 'vqgan.encoder.conv_in.weight'"),
    (lambda w: w.update({"norm.weight": np.ones(9, np.float32)}), HEADS, r"'norm.weight' has shape \(9,\)"),
    (lambda w: w["blocks.0.attn.qkv.bias"].fill(np.nan), HEADS, r"attn.qkv.bias' .*not finite"),
    (lambda w: w.update({"norm.weight": np.ones(8, np.int32)}), HEADS, "has type int32"),
    (lambda w: w.update({"norm.weight": np.ones(8, jnp.float8_e4m3fn)}), HEADS, "type 'F8_E4M3': save them"),
    (
      lambda w: w.update({"token_emb.word_embeddings.weight": np.ones((40, 8), np.float32)}),
      HEADS,
      "40 rows",
    ),
    (lambda w: w.update({"vqgan.decoder.attn.weight": np.ones(2, np.float32)}), HEADS, "another network"),
    (lambda w: None, (), "give --encoder_heads"),
    (lambda w: None, ("--encoder_heads=2", "--decoder_heads=5"), "decoder_heads=5 does not divide .* 12"),
    (lambda w: None, ("--encoder_heads=0", "--decoder_heads=5"), "encoder_heads=0: give at least 1"),
    (lambda w: None, ("--image_size=64",), "takes no --image_size"),
  ],
)
def test_a_wrong_mage_is_refused_in_one_sentence(tmp_path, change, options, message):
  weights = draw_mage()
  change(weights)
  save_file(weights, tmp_path / "wrong.safetensors")
  with pytest.raises(UserError, match=message) as error:
    run_convert("mage", tmp_path / "wrong.safetensors", tmp_path / "out", *options)
  assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_prefixes_of_all_names_are_dropped_and_bfloat16_is_read(tmp_path, prefix):
  weights = {"a.weight": np.arange(6).reshape(2, 3).astype(jnp.bfloat16), "b": np.ones((), np.int64)}
  save_file({f"{prefix}{name}": value for name, value in weights.items()}, tmp_path / "a.safetensors")
  found = tensors.read(tmp_path / "a.safetensors")
  tiny.assert_same_bits(found, {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": weights["b"]})


def test_a_prefix_of_some_names_is_kept(tmp_path):
  save_file({"module.a": np.ones(2), "b": np.ones(2)}, tmp_path / "a.safetensors")
  assert tensors.read(tmp_path / "a.safetensors").keys() == {"module.a", "b"}


@pytest.mark.parametrize("name", ["quant_conv.weight", "post_quant_conv.bias"])
def test_a_tokenizer_with_convolutions_beside_its_codes_is_refused(tmp_path, name):
  save_file(draw(tokenizer_shapes()) | draw({name: (4,)}), tmp_path / "tokenizer.safetensors")
  with pytest.raises(UserError, match=f"has a tensor '{name}' for which this network has no layer"):
    run_convert("vqgan_pytorch", tmp_path / "tokenizer.safetensors", tmp_path / "out")


def test_a_null_class_that_does_not_exist_is_refused():
  with pytest.raises(UserError, match="null_class is 1: with class_ids=1"):
    objectives.build(dict(name="mage", image_size=(256, 256), null_class=1))


def test_head_counts_of_the_published_models_are_known():
  assert mage.HEADS[768] == (12, 16) and mage.HEADS[1024] == (16, 16)


@pytest.mark.parametrize("kind", ["mage", "vqgan_pytorch", "maskgit_flax"])
@pytest.mark.parametrize("data", [b"", b"nonsense", bytes(range(256)) * 40, "truncated", None])
def test_a_foreign_or_truncated_file_is_refused_in_one_sentence(tiny_mage, tmp_path, kind, data):
  path = tmp_path / "weights"
  if data == "truncated":
    data = (tiny_mage / "reference.safetensors").read_bytes()[:-100]
  if data is not None:
    path.write_bytes(data)
  with pytest.raises(UserError) as error:
    run_convert(kind, path, tmp_path / "out")
  assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_published_names_say_where_to_download(tmp_path):
  for name, found in PUBLISHED.items():
    with pytest.raises(UserError, match=rf"{name} is not .*{found.address}.*--format={found.format}"):
      run_convert(found.format, name, tmp_path / "out")


# PyTorch files


class Code:
  """A pickle with code: reading it would create a folder."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return os.mkdir, (self.path,)


def test_without_pytorch_its_files_are_not_read(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  (tmp_path / "code.pth").write_bytes(pickle.dumps(Code(tmp_path / "executed")))
  with pytest.raises(UserError, match=r"pip install .*parity"):
    run_convert("mage", tmp_path / "code.pth", tmp_path / "out", *HEADS)
  assert not (tmp_path / "executed").exists()
  (tmp_path / "page.pth").write_text("<html>not found</html>")
  with pytest.raises(UserError, match=r"page\.pth is not an intact safetensors or PyTorch file"):
    run_convert("mage", tmp_path / "page.pth", tmp_path / "out", *HEADS)


# In a process of its own: PyTorch and TensorFlow do not always share one.
WITH_TORCH = """
import argparse, pathlib, pickle, sys
import torch
from safetensors.torch import load_file
sys.path.insert(0, "tests")
from maskgen.errors import UserError
from maskgen.importers import tensors
import test_importers as here

folder = pathlib.Path(sys.argv[1])
weights = load_file(sys.argv[2])
arguments = argparse.Namespace(lr=1.0)
files = {
  "plain": weights,
  "model": {"model": weights, "optimizer": {"state": {}}, "epoch": 3, "args": arguments},
  "state_dict": {"state_dict": {name: torch.nn.Parameter(value) if value.is_floating_point() else value
                                for name, value in weights.items()}},
  "average": {"model": {}, "model_ema": weights},
  "parallel": {"model": {f"module.{name}": value for name, value in weights.items()}},
  "compiled": {f"_orig_mod.{name}": value for name, value in weights.items()},
}
for name, content in files.items():
  torch.save(content, folder / f"{name}.pth")
torch.save(weights, folder / "legacy.pth", _use_new_zipfile_serialization=False)
torch.save({"model": weights, "code": here.Code(folder / "executed")}, folder / "code.pth")
(folder / "plain_pickle.pth").write_bytes(pickle.dumps(here.Code(folder / "executed")))
(folder / "truncated.pth").write_bytes((folder / "plain.pth").read_bytes()[:-5000])
torch.save([1, 2], folder / "list.pth")
expected = tensors.read(sys.argv[2])
for name in (*files, "legacy"):
  found = tensors.read(folder / f"{name}.pth")
  here.tiny.assert_same_bits(found, expected)
refused = dict(code="run code", plain_pickle="run code", truncated="not an intact", list="a list")
for name, message in refused.items():
  try:
    tensors.read(folder / f"{name}.pth")
    raise SystemExit(f"{name} was read")
  except UserError as error:
    assert message in str(error) and len(str(error)) < 300 and "\\n" not in str(error), error
assert not (folder / "executed").exists()
print("all was as it should be")
"""


@pytest.mark.skipif(
  not importlib.util.find_spec("torch"), reason="NO CHECK OF PYTORCH FILES: torch is missing"
)
def test_pytorch_files_are_read_and_their_code_is_not_run(tiny_mage, tmp_path, repository):
  done = subprocess.run(
    [sys.executable, "-c", WITH_TORCH, tmp_path, tiny_mage / "reference.safetensors"],
    cwd=repository,
    env=os.environ | {"PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])},
    capture_output=True,
    text=True,
  )
  assert done.stdout.strip() == "all was as it should be", done.stderr


# MaskGIT


class ResBlock(nn.Module):
  width: int

  @nn.compact
  def __call__(self, x):
    h, inputs = x, x.shape[-1]
    for _ in range(2):
      h = nn.Conv(self.width, (3, 3), use_bias=False)(nn.swish(nn.GroupNorm()(h)))
    return h + (x if inputs == self.width else nn.Conv(self.width, (1, 1), use_bias=False)(h))


class Encoder(nn.Module):
  widths: tuple[int, ...]
  blocks: int = 2

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(self.widths[0], (3, 3), use_bias=False)(x)
    for level, width in enumerate(self.widths):
      for _ in range(self.blocks):
        x = ResBlock(width)(x)
      if level < len(self.widths) - 1:
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
    for _ in range(2):
      x = ResBlock(self.widths[-1])(x)
    return nn.Conv(6, (1, 1))(nn.swish(nn.GroupNorm()(x)))


class Decoder(nn.Module):
  widths: tuple[int, ...]
  blocks: int = 2

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(self.widths[-1], (3, 3))(x)
    for _ in range(2):
      x = ResBlock(self.widths[-1])(x)
    for level in reversed(range(len(self.widths))):
      for _ in range(self.blocks):
        x = ResBlock(self.widths[level])(x)
      if level:
        b, h, w, c = x.shape
        x = nn.Conv(c, (3, 3))(jax.image.resize(x, (b, 2 * h, 2 * w, c), "nearest"))
    return nn.Conv(3, (3, 3))(nn.swish(nn.GroupNorm()(x)))


class Quantizer(nn.Module):
  @nn.compact
  def __call__(self, x):
    codebook = self.param("codebook", nn.initializers.normal(1.0), (12, 6))
    distances = jnp.square(x[..., None, :] - codebook[None, None, None]).sum(axis=-1)
    tokens = distances.argmin(axis=-1)
    return tokens, codebook[tokens]


class MaskGitTokenizer(nn.Module):
  """MaskGIT's tokenizer according to its paper and parameter names, with Linen's automatic names."""

  widths: tuple[int, ...]
  blocks: int = 2

  def setup(self):
    self.encoder = Encoder(self.widths, self.blocks)
    self.decoder = Decoder(self.widths, self.blocks)
    self.quantizer = Quantizer()

  def __call__(self, images):
    latents = self.encoder(images)
    tokens, codes = self.quantizer(latents)
    return latents, tokens, self.decoder(codes)


def maskgit(path, widths, blocks=2, change=lambda params: None):
  model = MaskGitTokenizer(widths, blocks)
  image = jnp.zeros((1, 8, 8, 3))
  shapes = traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), image)["params"], sep="/")
  params = draw({name: leaf.shape for name, leaf in shapes.items()})
  change(params)
  variables = {"params": traverse_util.unflatten_dict(params, sep="/")}
  path.write_bytes(flax.serialization.to_bytes(variables))
  return model, variables


@pytest.mark.parametrize(("widths", "blocks"), [((32, 64, 64), 2), ((32, 32), 1)])
def test_maskgit_computes_the_same_here(tmp_path, widths, blocks):
  def spread(params):  # so that latents differ enough to have different codes
    params["encoder/Conv_1/kernel"] *= 5.0
    params["encoder/Conv_1/bias"] *= 0.0

  model, variables = maskgit(tmp_path / "checkpoint", widths, blocks, spread)
  run_convert("maskgit_flax", tmp_path / "checkpoint", tmp_path / "out", "--image_size=16")
  ours = maskgen.load(tmp_path / "out")
  images = np.random.default_rng(1).random((2, 16, 16, 3), np.float32)
  latents, tokens, decoded = jax.jit(model.apply)(variables, images)
  params = {"params": ours.variables["params"]["generator"]}
  network = ours.objective.tokenizer
  assert network.shortcut == "reference"
  np.testing.assert_allclose(network.apply(params, images, method="encode"), latents, atol=1e-4)
  np.testing.assert_array_equal(ours.encode(images), tokens.reshape(2, -1))
  np.testing.assert_allclose(ours.reconstruct(images), np.clip(decoded, 0, 1), atol=1e-4)
  assert len(np.unique(tokens)) > 2 and np.mean((decoded > 0) & (decoded < 1)) > 0.1


@pytest.mark.parametrize(
  ("change", "options", "message"),
  [
    (lambda p: p.update({"encoder/Conv_9/kernel": np.ones(2, np.float32)}), (), "another network"),
    (
      lambda p: p.pop("encoder/ResBlock_0/GroupNorm_0/scale"),
      (),
      "no tensor 'encoder/ResBlock_0/GroupNorm_0/sc",
    ),
    (lambda p: p.pop("quantizer/codebook"), (), "no tensor 'quantizer/codebook'"),
    (lambda p: p.update({"encoder/ResBlock_9/Conv_0/kernel": np.ones(2, np.float32)}), (), "residual blocks"),
    (lambda p: None, ("--image_size=15",), "15x15 pixels is not divisible"),
  ],
)
def test_a_wrong_maskgit_is_refused(tmp_path, change, options, message):
  maskgit(tmp_path / "checkpoint", (32, 64), change=change)
  with pytest.raises(UserError, match=message):
    run_convert("maskgit_flax", tmp_path / "checkpoint", tmp_path / "out", *options)


# Numbers of the reference implementation


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
  """The reference's weights as one of our models, with the reference's inputs and outputs."""
  if not GOLDEN.is_dir():
    pytest.skip(f"NO PARITY CHECK: the reference's numbers are not at {GOLDEN}")
  out = tmp_path_factory.mktemp("golden") / "converted"
  run_convert("mage", GOLDEN / "mage_reference.safetensors", out, "--encoder_heads=4", "--decoder_heads=4")
  return maskgen.load(out), np.load(GOLDEN / "mage_reference_io.npz"), out


def channels_last(x):
  return x.transpose(0, 2, 3, 1)


def test_the_golden_file_is_understood(golden):
  model, _, _ = golden
  config = json.loads((GOLDEN / "config.json").read_text())
  objective, vocab = model.objective, model.objective.model.vocab
  assert objective.image_size == (config["image_size"],) * 2
  assert objective.tokenizer.multipliers == tuple(config["vqgan"]["ch_mult"])
  assert (objective.width, objective.depth) == (config["encoder"]["width"], config["encoder"]["depth"])
  assert (vocab.null_class_id, vocab.mask_id) == (config["fake_class_id"], config["mask_token_id"])


def test_vqgan_matches_the_reference(golden):
  model, io, _ = golden
  network, params = model.objective.tokenizer, {"params": model.variables["frozen"]["tokenizer"]}
  images = channels_last(io["image_nchw"])

  @jax.jit
  def forward(images):
    latents = network.apply(params, images, method="encode")
    quantized = network.apply(params, latents, method="quantize")
    return latents, quantized.tokens, network.apply(params, quantized.codes, method="decode")

  latents, tokens, decoded = forward(images)
  np.testing.assert_allclose(latents, channels_last(io["encoder_out_nchw"]), atol=2e-5)
  np.testing.assert_array_equal(tokens.reshape(len(images), -1), io["indices"])
  np.testing.assert_array_equal(model.encode(images), io["indices"])
  np.testing.assert_allclose(decoded, channels_last(io["reconstruction_nchw"]), atol=5e-5)


def test_mage_matches_the_reference(golden):
  model, io, _ = golden
  network, params = model.objective.model, {"params": model.variables["params"]["main"]}
  tokens, mask = io["indices"], io["token_mask"]
  kept = np.stack([np.flatnonzero(~dropped) for dropped in io["drop_mask"]]).astype(np.int32)

  @jax.jit
  def forward(tokens, mask, kept):
    latents = network.apply(params, tokens, mask, kept, method="encode")
    return latents, network.apply(params, latents, mask, kept, method="decode")

  latents, logits = forward(tokens, mask, kept)
  np.testing.assert_allclose(latents, io["encoder_latent_dropped"], atol=1e-5)
  np.testing.assert_allclose(logits, io["logits_dropped"], atol=1e-5)
  codes = model.objective.codebook_size
  loss = losses.masked_mean(losses.cross_entropy(logits[:, 1:, :codes], tokens, 0.1), mask)
  np.testing.assert_allclose(loss.mean(), io["loss"], rtol=1e-5)
  latents, logits = forward(tokens, mask, None)
  np.testing.assert_allclose(latents, io["encoder_latent_full"], atol=1e-5)
  np.testing.assert_allclose(logits, io["logits_full"], atol=1e-5)
  np.testing.assert_allclose(model.logits(tokens, mask), io["logits_full"][:, 1:, :codes], atol=1e-5)
  np.testing.assert_allclose(forward(tokens, np.zeros_like(mask), None)[0], io["features_clean"], atol=1e-5)


def test_the_golden_file_goes_out_as_it_came(golden, tmp_path):
  _, io, out = golden
  run_export(out, tmp_path / "back.safetensors")
  weights, back = (
    tensors.read(GOLDEN / "mage_reference.safetensors"),
    load_file(tmp_path / "back.safetensors"),
  )
  weights["token_emb.position_embeddings.weight"][1 + io["indices"].shape[1] :] = 0.0  # which nothing reads
  tiny.assert_same_bits(back, {name: weights[name] for name in back})
  left = weights.keys() - back.keys()
  assert all(name.startswith(mage.DEAD) for name in left), left
