"""Text-to-image models: published sizes, properties of their parts, samplers, and wrong folders.

Parity with PyTorch is in test_parity_diffusers.py.
"""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maskgen import tree
from maskgen.errors import UserError
from maskgen.importers import diffusers, diffusers_configs, torch_tensors
from maskgen.models.autoencoder_kl import AutoencoderKL
from maskgen.models.text_encoder import TextEncoder
from maskgen.models.text_to_image import TEXT_PARTS, TextToImage
from maskgen.models.unet import Condition, UNet
from maskgen.numerics import diffusion
from maskgen.numerics.text import BytePairTokenizer
from maskgen.tools import convert

TEXT = TextEncoder(vocabulary_size=514, positions=6, width=8, depth=2, heads=2, hidden=8)
UNET = UNet(
  channels=(4, 8),
  layers=1,
  depths=(0, 1),
  heads=(1, 2),
  in_channels=2,
  out_channels=2,
  context_width=8,
  groups=2,
)
VAE = AutoencoderKL(channels=(4, 4), layers=1, latent_channels=2, groups=2)
TINY = TextToImage((TEXT,), UNET, VAE, diffusion.Schedule())
# Two text encoders whose widths add up to the context, and a pooled text.
TINY_XL = TextToImage(
  (TEXT.clone(width=4, positions=6), TEXT.clone(width=8, projection=5, activation="gelu")),
  UNET.clone(context_width=12, pooled_width=5, size_width=4),
  VAE,
  diffusion.Schedule(),
  zero_null=True,
)
SCHEDULE = diffusion.Schedule()


def random_params(model, seed=0):
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 10
    return np.float32(rng.normal(size=leaf.shape) / np.sqrt(fan_in) + tree.path_name(path).endswith("scale"))

  return jax.tree_util.tree_map_with_path(draw, model.shapes())


@functools.cache
def params(model):
  return random_params(model)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Sizes


@pytest.mark.slow
@pytest.mark.parametrize(
  ("family", "counts"),
  [
    ("sd15", {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863}),
    ("sd21", {"text_encoder": 340_387_840, "unet": 865_910_724, "vae": 83_653_863}),
    (
      "sdxl",
      {
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "unet": 2_567_463_684,
        "vae": 83_653_863,
      },
    ),
  ],
)
def test_sizes_are_those_published(family, counts):
  model = diffusers.published_model(family)
  assert {part: tree.count(shapes) for part, shapes in model.shapes().items()} == counts


# Text encoder


def test_words_see_what_is_before_them():
  variables = {"params": params(TINY)["text_encoder"]}
  encode = jax.jit(functools.partial(TEXT.apply, method="encode"))
  x = normal(2, 6, 8)
  changed = x.copy()
  changed[:, 3] = normal(2, 8, seed=1)
  before, after = (encode(variables, y, np.array([2, 5])) for y in (x, changed))
  np.testing.assert_allclose(after.last[:, :3], before.last[:, :3], atol=1e-6)
  assert (np.abs(after.last - before.last)[:, 3:].max(axis=(0, 2)) > 1e-3).all()
  assert np.allclose(after.pooled[0], before.pooled[0], atol=1e-6)
  assert not np.allclose(after.pooled[1], before.pooled[1], atol=1e-3)
  np.testing.assert_allclose(before.pooled, before.last[[0, 1], [2, 5]], atol=1e-6)


def test_embeddings_may_come_from_elsewhere():
  variables = {"params": params(TINY)["text_encoder"]}
  ids, end = np.array([[3, 4, 5], [6, 7, 513]]), np.array([2, 2])
  embeddings = jax.jit(functools.partial(TEXT.apply, method="embed"))(variables, ids)
  np.testing.assert_array_equal(
    embeddings, variables["params"]["embeddings"]["token_embedding"]["embedding"][ids]
  )
  encode = jax.jit(functools.partial(TEXT.apply, method="encode"))
  both = encode(variables, embeddings, end), jax.jit(TEXT.apply)(variables, ids, end)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *both)
  slope = jax.grad(lambda x: encode(variables, x, end).pooled.sum())(embeddings)
  assert (np.abs(slope).max(axis=(0, 2)) > 0).all()
  with pytest.raises(UserError, match="a prompt of 7 positions is too long: this text encoder has 6"):
    encode(variables, normal(1, 7, 8), np.array([2]))


# U-Net


def test_everything_reaches_the_prediction():
  unet, noisy, time = TINY_XL.unet, normal(2, 4, 6, 2), np.float32([3, 700])
  condition = Condition(normal(2, 6, unet.context_width), normal(2, 5), np.float32([[4, 6, 0, 1, 4, 6]] * 2))

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1, 2))
  def slopes(weights, noisy, context):
    found = unet.apply({"params": weights}, noisy, time, condition._replace(context=context))
    return jnp.square(found).sum()

  for name, slope in tree.flatten(slopes(params(TINY_XL)["unet"], noisy, condition.context)).items():
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0, name


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_number(remat):
  def value(unet, x, context):
    found = unet.apply({"params": params(TINY)["unet"]}, x, np.array([5]), Condition(context))
    return jnp.square(found).sum()

  x, context = normal(1, 4, 4, 2), normal(1, 6, 8)
  slopes = [
    jax.jit(jax.grad(functools.partial(value, unet), argnums=(0, 1)))(x, context)
    for unet in (UNET, UNET.clone(remat=remat))
  ]
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *slopes)


def test_bfloat16_is_near_float32():
  x, condition = normal(1, 4, 4, 2), Condition(normal(1, 6, 8))
  found = [
    jax.jit(unet.apply)({"params": params(TINY)["unet"]}, x, np.array([5]), condition)
    for unet in (UNET, UNET.clone(dtype="bfloat16"))
  ]
  assert found[1].dtype == jnp.float32
  assert np.abs(found[0] - found[1]).max() < 0.1 * np.abs(found[0]).max()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(heads=(1,)), "2 channels, 2 depths and 1 heads"),
    (dict(heads=(1, 3)), "8 channels do not divide into 3 heads"),
    (dict(remat="some"), "remat 'some' is not supported"),
    (dict(attention="flash"), "attention 'flash' does not exist"),
    (dict(dtype="float8"), "dtype 'float8' does not exist"),
    (dict(depths=(0, -1)), "depths is"),
  ],
)
def test_wrong_fields(fields, message):
  with pytest.raises(UserError, match=message):
    UNET.clone(**fields)


def test_wrong_inputs():
  shapes = TINY.shapes()
  predict = functools.partial(jax.eval_shape, TINY.predict)
  with pytest.raises(UserError, match="a latent image of 3x4 is not divisible by 2"):
    predict(shapes, normal(1, 3, 4, 2), np.array([1]), Condition(normal(1, 6, 8)))
  with pytest.raises(UserError, match="takes a pooled text and sizes, which the condition lacks"):
    jax.eval_shape(
      TINY_XL.predict, TINY_XL.shapes(), normal(1, 4, 4, 2), np.array([1]), Condition(normal(1, 6, 12))
    )
  with pytest.raises(UserError, match="an image of 5x4 pixels is not divisible by 2"):
    jax.eval_shape(TINY.encode, shapes, normal(1, 5, 4, 3))


# Noise and samplers


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
@pytest.mark.parametrize("betas", diffusion.BETAS)
def test_targets_mean_the_data(prediction, betas):
  schedule = diffusion.Schedule(prediction=prediction, betas=betas)
  clean, noise, t = normal(3, 2, 2, 1), normal(3, 2, 2, 1, seed=1), np.array([0, 400, 900])
  noisy = diffusion.add_noise(schedule, clean, noise, t)
  alpha, sigma = (x.reshape(3, 1, 1, 1) for x in diffusion.signal_and_noise(schedule, t))
  np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-5)
  target = diffusion.target(schedule, clean, noise, t)
  np.testing.assert_allclose(diffusion.to_clean(schedule, target, noisy, alpha, sigma), clean, atol=1e-3)


@pytest.mark.parametrize("spacing", ["", *diffusion.SPACINGS])
@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
def test_steps_go_from_noise_to_data(sampler, spacing):
  schedule = diffusion.Schedule(spacing=spacing)
  for steps in (1, 2, 4, 30, 100):
    times = diffusion.visited(schedule, sampler, steps)
    assert times.shape == (steps,) and times.dtype == np.int32
    assert (np.diff(times) < 0).all() and times.min() >= 0 and times.max() < 1000


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
@pytest.mark.parametrize("sampler", diffusion.SAMPLERS)
def test_samplers_solve_a_known_flow(sampler, prediction):
  """For data of variance s^2 the flow scales noise by s, and the best prediction is known."""
  schedule = diffusion.Schedule(prediction=prediction, clean_end=True, spacing="trailing")
  deviation = 0.5

  def predict(x, t):
    alpha, sigma = diffusion.signal_and_noise(schedule, t)
    variance = alpha**2 * deviation**2 + sigma**2
    clean, noise = alpha * deviation**2 / variance * x, sigma / variance * x
    return {"noise": noise, "v": alpha * noise - sigma * clean, "clean": clean}[prediction]

  noise = normal(50)
  errors = []
  for steps in (10, 40):
    found = diffusion.sample(predict, noise, schedule, sampler=sampler, steps=steps)
    errors.append(np.abs(found - deviation * noise).max())
  assert errors[1] < errors[0] / (2.5 if sampler == "ddim" else 4)
  assert errors[1] < 0.1


def test_guidance():
  def guided(scale):
    return diffusion.guide_in_turn([away, towards], [scale])

  away, towards = normal(3), normal(3, seed=1)
  np.testing.assert_allclose(guided(1.0), towards, rtol=1e-6)
  np.testing.assert_allclose(guided(0.0), away, rtol=1e-6)
  np.testing.assert_allclose(guided(3.0), 3 * towards - 2 * away, rtol=1e-4)


@pytest.mark.parametrize(
  ("scales", "needed"),
  [
    ([], [0]),
    ([1.0], [1]),
    ([0], [0]),
    ([1, 2.0], [1, 2]),
    ([2.0, 2.0], [0, 2]),
    ([2.0, 0.0], [0, 1]),
    ([0.0, 2.0], [0, 1, 2]),
    ([1.0, 1.0], [2]),
    ([jnp.float32(1.0), 1.0], [0, 1, 2]),
    ([0.0, jnp.float32(0.0)], [0, 1, 2]),
  ],
)
def test_guidance_in_turn_needs_what_has_a_weight(scales, needed):
  assert diffusion.needed(scales) == needed
  predictions = [normal(3, seed=seed) for seed in range(len(scales) + 1)]
  least = diffusion.guide_in_turn([predictions[i] for i in needed], [scales[i - 1] for i in needed[1:]])
  np.testing.assert_allclose(least, diffusion.guide_in_turn(predictions, scales), atol=1e-6)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: diffusion.Schedule(betas="scaled"),
      "schedule of betas 'scaled' does not exist; did you mean 'scaled_linear'",
    ),
    (lambda: diffusion.Schedule(prediction="epsilon"), "prediction 'epsilon' does not exist"),
    (lambda: diffusion.Schedule(spacing="lead"), "spacing 'lead' does not exist; did you mean 'leading'"),
    (lambda: diffusion.visited(SCHEDULE, "dmp", 4), "sampler 'dmp' does not exist; did you mean 'dpm'"),
    (lambda: diffusion.visited(SCHEDULE, "ddim", 0), "0 steps of sampling"),
    (
      lambda: diffusion.visited(SCHEDULE, "ddim", 1000),
      "1000 steps of sampling: give a whole number from 1 to 999",
    ),
    (lambda: diffusion.visited(SCHEDULE, "dpm", 2.5), "2.5 steps of sampling"),
  ],
)
def test_wrong_sampling(call, message):
  with pytest.raises(UserError, match=message):
    call()


# Folders


def text_config(encoder):
  return dict(
    architectures=["CLIPTextModelWithProjection" if encoder.projection else "CLIPTextModel"],
    vocab_size=encoder.vocabulary_size,
    max_position_embeddings=encoder.positions,
    hidden_size=encoder.width,
    num_hidden_layers=encoder.depth,
    num_attention_heads=encoder.heads,
    intermediate_size=encoder.hidden,
    hidden_act=encoder.activation,
    projection_dim=encoder.projection or 512,
    eos_token_id=2,
  )


def unet_config(unet):
  down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in unet.depths]
  added = dict(
    addition_embed_type="text_time",
    addition_time_embed_dim=unet.size_width,
    projection_class_embeddings_input_dim=unet.pooled_width + 6 * unet.size_width,
  )
  return dict(
    in_channels=unet.in_channels,
    out_channels=unet.out_channels,
    block_out_channels=list(unet.channels),
    down_block_types=down,
    up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
    layers_per_block=unet.layers,
    attention_head_dim=list(unet.heads),
    cross_attention_dim=unet.context_width,
    norm_num_groups=unet.groups,
    sample_size=8,
    act_fn="silu",
    **(added if unet.pooled_width else {}),
  )


def vae_config(vae):
  return dict(
    block_out_channels=list(vae.channels),
    down_block_types=["DownEncoderBlock2D"] * len(vae.channels),
    up_block_types=["UpDecoderBlock2D"] * len(vae.channels),
    layers_per_block=vae.layers,
    latent_channels=vae.latent_channels,
    norm_num_groups=vae.groups,
  )


SCHEDULER = dict(
  _class_name="PNDMScheduler",
  beta_start=0.00085,
  beta_end=0.012,
  beta_schedule="scaled_linear",
  steps_offset=1,
  set_alpha_to_one=False,
  clip_sample=False,
)


def torch_tensor(leaf, path):
  if not path.endswith("kernel"):
    return leaf
  return np.ascontiguousarray(leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T)


def save(folder, model):
  """Writes a model as diffusers would."""
  texts = TEXT_PARTS[: len(model.text_encoders)]
  tokenizer = BytePairTokenizer([])
  configs = dict(zip(texts, map(text_config, model.text_encoders), strict=True))
  configs |= {"unet": unet_config(model.unet), "vae": vae_config(model.autoencoder)}
  index = {part: ["library", "class"] for part in (*configs, "scheduler")} | {"safety_checker": [None, None]}
  for part, config in configs.items():
    (folder / part).mkdir(parents=True)
    (folder / part / "config.json").write_text(json.dumps(config))
    tensors = {
      torch_tensors.torch_name(path): torch_tensor(leaf, path)
      for path, leaf in tree.flatten(params(model)[part]).items()
    }
    save_file(tensors, folder / part / f"{diffusers.STEMS[part]}.safetensors")
  for part in texts:
    place = folder / part.replace("text_encoder", "tokenizer")
    place.mkdir()
    (place / "merges.txt").write_text("#version: 0.2\n")
    (place / "vocab.json").write_text(json.dumps(tokenizer.vocabulary))
    (place / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
  (folder / "scheduler").mkdir()
  (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
  (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp("models")
  for name, model in (("sd", TINY), ("xl", TINY_XL)):
    save(root / name, model)
  return root


@pytest.fixture
def folder(folders, tmp_path):
  return shutil.copytree(folders / "sd", tmp_path / "sd")


def edit(path, **changes):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def retensor(path, change):
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path)


@pytest.mark.parametrize(("name", "model"), [("sd", TINY), ("xl", TINY_XL)])
def test_folders_round_trip(folders, name, model):
  loaded = diffusers.load(folders / name)
  assert loaded.model == model
  jax.tree.map(np.testing.assert_array_equal, loaded.params, params(model))
  assert diffusers.family_of(loaded.model) == {"sd": "sd15", "xl": "sdxl"}[name]
  ids, end = loaded.tokenize(["a", "", "abcdefgh"])
  assert len(ids) == len(model.text_encoders) and ids[0].shape == (3, 6)
  assert end.tolist() == [2, 1, 5]
  half = diffusers.load(folders / name, param_dtype="bfloat16", dtype="bfloat16")
  for part, arrays in half.params.items():
    expected = np.dtype("float32" if part == "vae" else "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(arrays)} == {expected}, part
  assert half.model.unet.dtype == "bfloat16" and half.model.autoencoder.dtype == "float32"


def test_bfloat16_files_are_read(folder):
  def change(tensors):
    tensors |= {name: value.astype(jnp.bfloat16) for name, value in tensors.items()}

  retensor(folder / "vae" / "diffusion_pytorch_model.safetensors", change)
  loaded = diffusers.load(folder).params["vae"]
  expected = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16).astype(np.float32), params(TINY)["vae"])
  jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_prefixes_of_all_names_of_a_part_are_dropped(folder):
  part = folder / "unet"
  whole = load_file(part / "diffusion_pytorch_model.safetensors")
  (part / "diffusion_pytorch_model.safetensors").unlink()
  prefixed = {f"_orig_mod.module.{name}": tensor for name, tensor in whole.items()}
  shards = {name: f"{i % 2}.safetensors" for i, name in enumerate(prefixed)}
  for file in set(shards.values()):
    save_file({name: prefixed[name] for name in shards if shards[name] == file}, part / file)
  index = part / "diffusion_pytorch_model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": shards}))
  jax.tree.map(np.testing.assert_array_equal, diffusers.load(folder).params["unet"], params(TINY)["unet"])


def test_pictures_are_drawn(folders):
  loaded = diffusers.load(folders / "xl")
  model, noise = loaded.model, normal(2, 4, 4, 2)

  @jax.jit
  def generate(params, noise, guidance):
    ids, end = loaded.tokenize(["a b", "c"])
    condition = model.condition(params, model.embed(params, ids), end, size=(8, 8))
    null = model.null(condition)
    assert condition.context.shape == (2, 6, 12) and condition.pooled.shape == (2, 5)
    return model.generate(params, noise, condition, null, guidance=guidance, steps=2), condition, null

  images, condition, null = generate(loaded.params, noise, 1.0)
  assert images.shape == (2, 8, 8, 3) and images.min() >= 0 and images.max() <= 1
  np.testing.assert_array_equal(condition.sizes, [[8, 8, 0, 0, 8, 8]] * 2)
  assert not np.any(null.context) and not np.any(null.pooled)
  np.testing.assert_array_equal(null.sizes, condition.sizes)
  assert np.abs(images - generate(loaded.params, noise, 4.0)[0]).max() > 1e-4


def test_older_names_and_other_files(folder):
  """`text_model.`, position_ids, old attentions, 1x1 convolutions, several files, 16-bit weights."""
  expected = params(TINY)

  def older(tensors):
    for name in list(tensors):
      tensors[f"text_model.{name}"] = tensors.pop(name)
    tensors["text_model.embeddings.position_ids"] = np.arange(6)[None]

  retensor(folder / "text_encoder" / "model.safetensors", older)

  def old_attention(tensors):
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
      for name in [name for name in tensors if f".{new}." in name]:
        tensor = tensors.pop(name)
        tensors[name.replace(new, old)] = tensor[:, :, None, None] if tensor.ndim == 2 else tensor

  retensor(folder / "vae" / "diffusion_pytorch_model.safetensors", old_attention)

  whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
  tensors = load_file(whole)
  for name in tensors:
    if "proj_in.weight" in name or "proj_out.weight" in name:
      tensors[name] = tensors[name][:, :, None, None]
  names = sorted(tensors)
  for i, part in enumerate((names[::2], names[1::2])):
    save_file({name: tensors[name] for name in part}, folder / "unet" / f"part-{i}.safetensors")
  weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
  whole.with_suffix(".safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  whole.unlink()
  jax.tree.map(np.testing.assert_array_equal, diffusers.load(folder).params, expected)

  (folder / "unet" / "part-1.safetensors").unlink()
  with pytest.raises(UserError, match=r"part-1.safetensors, which .*index.json names, is missing"):
    diffusers.load(folder)
  (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").unlink()
  half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
  save_file(half, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
  found = diffusers.load(folder).params["unet"]
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), found, expected["unet"])


def weights(part):
  return f"{part}/{diffusers.STEMS[part]}.safetensors"


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (
      lambda f: (f / "model_index.json").unlink(),
      "has no model_index.json: give a text-to-image",
    ),
    (lambda f: (f / "model_index.json").write_text("[]"), "model_index.json does not contain a JSON object"),
    (lambda f: shutil.rmtree(f / "unet"), "has no part 'unet'"),
    (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer is missing: give the complete folder"),
    (lambda f: (f / "tokenizer/merges.txt").unlink(), "tokenizer.*cannot be read"),
    (lambda f: (f / "vae/config.json").unlink(), r"vae/config.json cannot be read \(No such file"),
    (lambda f: (f / "vae/config.json").write_text("{"), "vae/config.json is not an intact JSON file"),
    (lambda f: (f / weights("vae")).unlink(), "vae does not contain diffusion_pytorch_model.safetensors"),
    (lambda f: (f / weights("vae")).rename(f / "vae/model.bin"), "is a pickle, which can run code"),
    (lambda f: (f / weights("vae")).write_bytes(b"x" * 99), "is not an intact safetensors file"),
    (
      lambda f: retensor(f / weights("unet"), lambda t: t.pop("conv_in.bias")),
      "unet lacks the tensor 'conv_in.bias': give complete weights",
    ),
    (
      lambda f: retensor(f / weights("unet"), lambda t: t.update({"conv_inn.bias": t["conv_in.bias"]})),
      "unet has a tensor 'conv_inn.bias' that its config does not use",
    ),
    (
      lambda f: retensor(f / weights("unet"), lambda t: t.update({"conv_in.bias": np.zeros(3, np.float32)})),
      r"tensor 'conv_in.bias' of shape \[3\] does not fit the parameter 'conv_in/bias' of shape \[4\]",
    ),
    (
      lambda f: retensor(f / weights("unet"), lambda t: t.update({"conv_in.bias": np.full(4, np.nan, "f")})),
      "tensor 'conv_in.bias' contains values that are not finite",
    ),
    (
      lambda f: retensor(
        f / weights("text_encoder"),
        lambda t: t.update({"text_model.final_layer_norm.bias": t["final_layer_norm.bias"]}),
      ),
      "has the tensors 'final_layer_norm.bias' and 'text_model.final_layer_norm.bias' for the same parameter",
    ),
    (
      lambda f: edit(f / "unet/config.json", cross_attention_dim=16),
      "text of width 8 does not fit a U-Net for 16",
    ),
    (lambda f: edit(f / "unet/config.json", in_channels=9), "the U-Net has 9 input and 2 output channels"),
    (
      lambda f: edit(f / "text_encoder/config.json", vocab_size=513),
      "has 514 ids, but the encoder embeds 513",
    ),
  ],
)
def test_wrong_folders(folder, spoil, message):
  spoil(folder)
  with pytest.raises(UserError, match=message):
    diffusers.load(folder)


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (
      lambda f: (f / "model_index.json").unlink(),
      "has no model_index.json: give a text-to-image",
    ),
    (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer is missing: give the complete folder"),
    (
      lambda f: retensor(f / weights("unet"), lambda t: t.pop("conv_in.bias")),
      "lacks the tensor 'conv_in.bias'",
    ),
  ],
)
def test_wrong_folders_are_not_converted(folder, tmp_path, spoil, message):
  """The command line also prints one sentence and writes nothing."""
  spoil(folder)
  with pytest.raises(UserError, match=message) as error:
    convert.main(["--format=diffusers", f"--weights={folder}", f"--out={tmp_path / 'out'}"])
  assert "\n" not in str(error.value)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("part", "changes", "message"),
  [
    ("unet", dict(class_embed_type="timestep"), "class_embed_type='timestep': only None is supported"),
    ("unet", dict(num_attention_heads=8), "num_attention_heads=8: only None"),
    ("unet", dict(brand_new_gate="tanh"), "brand_new_gate='tanh', which is not supported"),
    ("unet", dict(up_block_types=["UpBlock2D"] * 2), "the same mirrored on the way up"),
    ("unet", dict(layers_per_block=[1, 2]), "one number for all levels"),
    ("unet", dict(block_out_channels=8), "block_out_channels=8: give a list"),
    ("unet", dict(norm_eps="small"), "epsilon is 'small'"),
    ("unet", dict(addition_embed_type="text"), "addition_embed_type='text'"),
    ("vae", dict(shift_factor=0.1), "shift_factor=0.1"),
    ("vae", dict(down_block_types=["AttnDownEncoderBlock2D"] * 2), "only 2 times DownEncoderBlock2D"),
    ("text_encoder", dict(architectures=["T5EncoderModel"]), "is of 'T5EncoderModel'"),
    ("text_encoder", dict(hidden_act="relu"), "activation 'relu' does not exist"),
    (
      "scheduler",
      dict(prediction_type="sample"),
      "prediction_type='sample': only 'epsilon' or 'v_prediction'",
    ),
    ("scheduler", dict(_class_name="LCMScheduler"), "_class_name='LCMScheduler'"),
    ("scheduler", dict(clip_sample=True), "clip_sample=True"),
    ("scheduler", dict(use_karras_sigmas=True), "use_karras_sigmas=True"),
  ],
)
def test_options_that_are_not_supported(folder, part, changes, message):
  name = "scheduler_config.json" if part == "scheduler" else "config.json"
  edit(folder / part / name, brand_new_switch=False, brand_new_name=None)
  diffusers.read_model(folder)  # new options that are off change nothing
  edit(folder / part / name, **changes)
  with pytest.raises(UserError, match=message):
    diffusers.read_model(folder)


def test_families(folders):
  assert diffusers.read_model(folders / "xl", family="sdxl") == TINY_XL
  with pytest.raises(
    UserError, match=r"xl is Stable Diffusion XL .* width 4 and 8, but Stable Diffusion 1 .*is needed"
  ):
    diffusers.load(folders / "xl", family="sd15")
  with pytest.raises(UserError, match=r"sd is Stable Diffusion 1 .*but Stable Diffusion 2"):
    diffusers.load(folders / "sd", family="sd21")
  with pytest.raises(UserError, match="family 'sd14' does not exist"):
    diffusers.load(folders / "sd", family="sd14")


def test_clipping_must_be_ruled_out():
  config = {key: value for key, value in SCHEDULER.items() if key != "clip_sample"}
  assert diffusers_configs.schedule(config, "a file") == diffusion.Schedule()
  with pytest.raises(UserError, match="does not have clip_sample=false"):
    diffusers_configs.schedule(config | {"_class_name": "DDIMScheduler"}, "a file")
