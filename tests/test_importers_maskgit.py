"""MaskGIT's transformer and MAGE's fine-tuned classifiers: the same numbers as restatements in NumPy."""

import functools
import json

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util
from safetensors.numpy import save_file
from scipy.special import erf, softmax
from test_importers import (
  CODES,
  ROWS,
  WIDTH,
  block,
  draw,
  linear,
  maskgit,
  norm,
  run_convert,
  tokenizer_shapes,
)

import maskgen
from maskgen import main, objectives
from maskgen.errors import UserError
from maskgen.importers import mage_finetuned
from maskgen.numerics import losses, masking
from maskgen.tools import sweep
from maskgen.training import evaluation

CLASSES, HIDDEN, HEADS, DEPTH, SIDE = 10, 20, 2, 2, 4
MASKGIT_CODES = 12  # of the tokenizer in test_importers


def normalise(x, scale, bias, epsilon):
  centred = x - x.mean(axis=-1, keepdims=True)
  return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon) * scale + bias


def attend(query, key, value):
  """All [b, n, h, k]."""
  scores = np.einsum("bqhk,bnhk->bhqn", query, key) / np.sqrt(query.shape[-1])
  return np.einsum("bhqn,bnhk->bqhk", softmax(scores, axis=-1), value)


# MaskGIT


def transformer_shapes():
  found = {
    "Embed_0/word_embeddings/embedding": (MASKGIT_CODES + CLASSES + 1, WIDTH),
    "Embed_0/position_embeddings/embedding": (1 + SIDE**2, WIDTH),
    "MlmLayer_0/mlm_bias/bias": (MASKGIT_CODES + CLASSES + 1,),
    "MlmLayer_0/mlm_dense/kernel": (WIDTH, WIDTH),
    "MlmLayer_0/mlm_dense/bias": (WIDTH,),
  }
  norms = ["Embed_0/embeddings_ln", "MlmLayer_0/mlm_ln"]
  for i in range(DEPTH):
    layer = f"TransformerLayer_{i}"
    for name in ("query", "key", "value"):
      found[f"{layer}/Attention_0/self_attention/{name}/kernel"] = (WIDTH, HEADS, WIDTH // HEADS)
      found[f"{layer}/Attention_0/self_attention/{name}/bias"] = (HEADS, WIDTH // HEADS)
    found[f"{layer}/Attention_0/self_attention/out/kernel"] = (HEADS, WIDTH // HEADS, WIDTH)
    found[f"{layer}/Attention_0/self_attention/out/bias"] = (WIDTH,)
    found[f"{layer}/Mlp_0/intermediate_output/kernel"] = (WIDTH, HIDDEN)
    found[f"{layer}/Mlp_0/intermediate_output/bias"] = (HIDDEN,)
    found[f"{layer}/Mlp_0/layer_output/kernel"] = (HIDDEN, WIDTH)
    found[f"{layer}/Mlp_0/layer_output/bias"] = (WIDTH,)
    norms += [f"{layer}/Attention_0/attention_output_ln", f"{layer}/Mlp_0/layer_output_ln"]
  return found | {f"{name}/{leaf}": (WIDTH,) for name in norms for leaf in ("scale", "bias")}


def restated(weights, tokens, mask, label):
  """MaskGIT's logits over the codes, according to its paper and parameter names."""

  def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

  def dense(name, x):
    return x @ weights[f"{name}/kernel"] + weights[f"{name}/bias"]

  def ln(name, x):
    return normalise(x, weights[f"{name}/scale"], weights[f"{name}/bias"], 1e-12)

  table = weights["Embed_0/word_embeddings/embedding"]
  ids = np.where(mask, len(table) - 1, tokens)
  ids = np.concatenate([MASKGIT_CODES + label[:, None], ids], axis=1)
  x = ln("Embed_0/embeddings_ln", table[ids] + weights["Embed_0/position_embeddings/embedding"])
  for i in range(DEPTH):
    layer = f"TransformerLayer_{i}"
    own = f"{layer}/Attention_0/self_attention"
    projected = [
      np.einsum("bnd,dhk->bnhk", x, weights[f"{own}/{name}/kernel"]) + weights[f"{own}/{name}/bias"]
      for name in ("query", "key", "value")
    ]
    out = np.einsum("bnhk,hkd->bnd", attend(*projected), weights[f"{own}/out/kernel"])
    x = ln(f"{layer}/Attention_0/attention_output_ln", out + weights[f"{own}/out/bias"] + x)
    hidden = gelu(dense(f"{layer}/Mlp_0/intermediate_output", x))
    x = ln(f"{layer}/Mlp_0/layer_output_ln", dense(f"{layer}/Mlp_0/layer_output", hidden) + x)
  x = ln("MlmLayer_0/mlm_ln", gelu(dense("MlmLayer_0/mlm_dense", x)))
  return (x @ table.T + weights["MlmLayer_0/mlm_bias/bias"])[:, 1:, :MASKGIT_CODES]


def write(folder, change=lambda weights: None):
  """Writes both files; returns the transformer's weights."""
  maskgit(folder / "tokenizer", (32, 64))
  weights = draw(transformer_shapes())
  change(weights)
  nested = {"params": traverse_util.unflatten_dict(weights, sep="/")}
  (folder / "transformer").write_bytes(flax.serialization.to_bytes(nested))
  return weights


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  """The weights of a transformer, and the folder of the converted model."""
  folder = tmp_path_factory.mktemp("maskgit")
  weights = write(folder)
  run_convert("maskgit", folder / "transformer", folder / "out", f"--tokenizer={folder / 'tokenizer'}")
  return weights, folder / "out"


def test_a_converted_maskgit_computes_the_same(converted):
  weights, out = converted
  model = maskgen.load(out)
  assert model.objective.image_size == (2 * SIDE, 2 * SIDE) and model.objective.classes == CLASSES
  rng = np.random.default_rng(1)
  tokens, mask = rng.integers(0, MASKGIT_CODES, (3, SIDE**2)), rng.random((3, SIDE**2)) < 0.6
  label = np.array([0, 7, CLASSES])  # the last has no class
  batch = {"tokens": tokens, "token_mask": mask, "label": label}
  logits = model.call("logits", batch)
  np.testing.assert_allclose(logits, restated(weights, tokens, mask, label), atol=2e-5)
  assert np.std(logits) > 0.2
  with pytest.raises(UserError, match="this model was only trained with classes: give a label"):
    model.generate(batch=2)
  assert model.generate(label=[1, 2], steps=2).shape == (2, 2 * SIDE, 2 * SIDE, 3)
  with pytest.raises(UserError, match="guidance needs a model that is trained with condition_dropout"):
    model.generate(label=[1, 2], guidance=2.0)


CONFIG = f"""
from maskgen import config as config_lib

def get_config(arg=None):
  config = config_lib.load("{tiny.FILE}:only=mage").unlock()
  config.data.update(preprocess="decode(3)|resize(8)", eval_preprocess="decode(3)|resize(8)")
  config.evals = dict(
    validation=dict(type="loss", every_steps=1),
    reconstruction=dict(type="reconstruction", every_steps=1),
    generation=dict(type="generation", every_steps=1, num_images=8, num_pictures=8),
  )
  return config
"""


def test_it_is_evaluated_and_swept_from_the_command_line(converted, tmp_path, monkeypatch):
  shown = {}
  monkeypatch.setattr(evaluation, "show", lambda name, where, found: shown.update(found))
  (tmp_path / "config.py").write_text(CONFIG)
  model, config = converted[1], f"--config={tmp_path / 'config.py'}"
  main.main([config, "--mode=eval", f"--checkpoint={model}", f"--workdir={tmp_path / 'eval'}"])
  assert {"validation/loss", "reconstruction/psnr", "generation/frechet_pixels"} <= shown.keys()
  assert np.log(MASKGIT_CODES) - 1 < shown["validation/loss"] < np.log(MASKGIT_CODES) + 3
  sweep.main([config, f"--model={model}", "--num_images=8", "--steps=1", f"--out={tmp_path / 'sweep'}"])
  assert (tmp_path / "sweep" / sweep.SHEET).exists()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda w: w.pop("MlmLayer_0/mlm_ln/scale"), "no tensor 'MlmLayer_0/mlm_ln/scale'"),
    (lambda w: w.update({"TransformerLayer_0/extra": np.ones(2, np.float32)}), "it is another network"),
    (
      lambda w: w.update({"Embed_0/position_embeddings/embedding": np.ones((16, WIDTH), np.float32)}),
      "its 15 positions do not form a square",
    ),
    (
      lambda w: w.update({"Embed_0/word_embeddings/embedding": np.ones((12, WIDTH), np.float32)}),
      "12 token ids, too few for the 12 codes of the tokenizer",
    ),
  ],
)
def test_a_wrong_transformer_is_refused(change, message, tmp_path):
  write(tmp_path, change)
  with pytest.raises(UserError, match=message):
    run_convert(
      "maskgit", tmp_path / "transformer", tmp_path / "out", f"--tokenizer={tmp_path / 'tokenizer'}"
    )


def test_a_transformer_needs_its_tokenizer(tmp_path):
  with pytest.raises(UserError, match="give the file of MaskGIT's tokenizer as --tokenizer"):
    run_convert("maskgit", tmp_path / "transformer", tmp_path / "out")


# The objective


def test_training_hides_codes_and_classes_and_guidance_combines_both(converted):
  section = json.loads((converted[1] / "config.json").read_text())["objective"]
  objective = objectives.build({**section, "condition_dropout": 0.5, "dropout": 0.0, "label_smoothing": 0.0})
  variables = maskgen.load(converted[1]).variables
  params, frozen = variables["params"], variables["frozen"]
  rng = np.random.default_rng(2)
  tokens = jnp.asarray(rng.integers(0, MASKGIT_CODES, (64, SIDE**2)), jnp.int32)
  batch = {
    "tokens": tokens,
    "label": jnp.asarray(rng.integers(0, CLASSES, 64)),
    "key": jax.random.split(jax.random.key(0), 64),
  }
  draw_mask = jax.jit(lambda keys: masking.random_mask(keys, SIDE**2, masking.CosineRatio())[0])
  mask = draw_mask(batch["key"])
  assert abs(mask.mean() - 2 / np.pi) < 0.08

  @functools.partial(jax.jit, static_argnums=0)
  def loss(train):
    return objective.losses(params, frozen, {}, batch, jax.random.key(1), 0, train=train)[0]["main"]

  def expected(label):
    logits = restated(converted[0], np.asarray(tokens), np.asarray(mask), np.asarray(label))
    return losses.masked_mean(losses.cross_entropy(jnp.asarray(logits), tokens), mask).mean()

  dropped = jax.vmap(objective._drops)(batch["key"])
  assert 0.3 < dropped.mean() < 0.7
  np.testing.assert_allclose(loss(False), expected(batch["label"]), rtol=1e-4)
  np.testing.assert_allclose(loss(True), expected(jnp.where(dropped, CLASSES, batch["label"])), rtol=1e-4)
  guided = jax.jit(objective.logits_fn(variables, batch, 3.0, "constant"))(tokens, mask, jnp.float32(0.5))
  with_class, without = (
    restated(converted[0], np.asarray(tokens), np.asarray(mask), label)
    for label in (np.asarray(batch["label"]), np.full(64, CLASSES))
  )
  np.testing.assert_allclose(guided, with_class + 2.0 * (with_class - without), atol=2e-4)
  ignored = objective.logits_fn(variables, batch, 0.0, "constant")
  np.testing.assert_allclose(jax.jit(ignored)(tokens, mask, jnp.float32(0.5)), without, atol=2e-4)


# MAGE's classifiers


FINETUNED_DEAD = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 197, WIDTH), "patch_embed.proj.bias": (WIDTH,)}


def finetuned_shapes():
  found = {f"vqgan.{name}": shape for name, shape in tokenizer_shapes().items()}
  found |= {"token_emb.word_embeddings.weight": (ROWS, WIDTH)}
  found |= {"token_emb.position_embeddings.weight": (257, WIDTH)}
  found |= norm("token_emb.LayerNorm", WIDTH) | norm("fc_norm", WIDTH) | linear("head", WIDTH, 5)
  return found | block("blocks.0", WIDTH) | block("blocks.1", WIDTH)


def restated_classifier(weights, tokens, heads):
  """Probabilities from codes, according to the paper and the parameter names."""

  def dense(name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

  def ln(name, x):
    return normalise(x, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

  ids = np.concatenate([np.full((len(tokens), 1), CODES + 76), tokens], axis=1)
  x = weights["token_emb.word_embeddings.weight"][ids] + weights["token_emb.position_embeddings.weight"]
  x = ln("token_emb.LayerNorm", x)
  for name in ("blocks.0", "blocks.1"):
    qkv = dense(f"{name}.attn.qkv", ln(f"{name}.norm1", x)).reshape(*x.shape[:2], 3, heads, -1)
    x = x + dense(f"{name}.attn.proj", attend(*np.moveaxis(qkv, 2, 0)).reshape(x.shape))
    hidden = dense(f"{name}.mlp.fc1", ln(f"{name}.norm2", x))
    x = x + dense(f"{name}.mlp.fc2", hidden / 2 * (1 + erf(hidden / np.sqrt(2))))
  return softmax(dense("head", ln("fc_norm", x[:, 1:].mean(axis=1))), axis=-1)


def test_a_finetuned_mage_classifies_the_same(tmp_path, capsys):
  weights = draw(finetuned_shapes())
  weights["head.weight"] *= 10
  save_file(
    {"unknown": np.ones(2, np.float32)} | weights | draw(FINETUNED_DEAD), tmp_path / "file.safetensors"
  )
  run_convert("mage_finetuned", tmp_path / "file.safetensors", tmp_path / "out", "--encoder_heads=2")
  said = capsys.readouterr().out
  assert (
    "as in the reference: cls_token, patch_embed.proj.bias, pos_embed" in said and "unknown: unknown" in said
  )
  model = maskgen.load(tmp_path / "out")
  images = np.random.default_rng(1).random((3, 32, 32, 3), np.float32)
  expected = restated_classifier(weights, model.encode(images), heads=2)
  np.testing.assert_allclose(model.classify(images), expected, atol=1e-5)
  assert np.std(expected) > 0.05
  variables, part = model.variables, model.objective.image_encoder.encoder
  params = {"main": variables["params"]["main"], "tokenizer": variables["frozen"]["tokenizer"]}
  back = mage_finetuned.to_reference(params, part.network, part.tokenizer)
  tiny.assert_same_bits(back, weights)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda w: w.pop("fc_norm.weight"), r"no tensor 'fc_norm\.weight'"),
    (
      lambda w: w.update({"norm.weight": np.ones(WIDTH, np.float32)}),
      r"has a tensor 'norm\.weight' for which",
    ),
    (lambda w: w.pop("blocks.1.attn.qkv.bias"), r"no tensor 'blocks\.1\.attn\.qkv\.bias'"),
  ],
)
def test_a_wrong_classifier_is_refused(change, message, tmp_path):
  weights = draw(finetuned_shapes())
  change(weights)
  save_file(weights, tmp_path / "file.safetensors")
  with pytest.raises(UserError, match=message):
    run_convert("mage_finetuned", tmp_path / "file.safetensors", tmp_path / "out", "--encoder_heads=2")
