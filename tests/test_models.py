import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskgen import config as config_lib
from maskgen import tree
from maskgen.costs import flops
from maskgen.errors import UserError
from maskgen.models.discriminator import INITIALISERS, Discriminator, blur_pool
from maskgen.models.mage import Mage
from maskgen.models.transformer import Transformer
from maskgen.models.vqgan import VQGAN
from maskgen.numerics import losses
from maskgen.numerics.vocab import Vocab


def tiny_vqgan(**changes) -> VQGAN:
  options = dict(
    channels=4, multipliers=(1, 2), strides=(2,), blocks=1, norm_groups=2, codebook_size=10, code_width=6
  )
  return VQGAN(**options | changes)


def random_variables(model, *args, seed=0):
  """Random values for every parameter, without compilation and without zeros that hide others."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 9
    scale = np.float32(tree.path_name(path).endswith("scale"))
    return jnp.asarray(noise / np.float32(np.sqrt(fan_in)) + scale)

  shapes = jax.eval_shape(model.init, jax.random.key(0), *args)["params"]
  return {"params": jax.tree_util.tree_map_with_path(draw, shapes)}


# VQGAN


@pytest.mark.parametrize(
  "size,changes,factor",
  [
    ((8, 8), dict(), 2),
    ((12, 6), dict(multipliers=(1, 2), strides=(3,), image_channels=1), 3),
    ((8, 16), dict(multipliers=(1, 1, 2), strides=(2, 2), shortcut="reference", normalize_codes=True), 4),
    ((6, 12), dict(multipliers=(1, 2, 3), strides=(3, 2), blocks=2), 6),
  ],
)
def test_vqgan_shapes(size, changes, factor):
  model = tiny_vqgan(**changes)
  images = jax.random.uniform(jax.random.key(0), (3, *size, model.image_channels))
  variables = random_variables(model, images)
  grid = (size[0] // factor, size[1] // factor)
  assert model.factor == factor and model.token_grid(images.shape[1:]) == grid

  @jax.jit
  def everything(images):
    apply = lambda *args, method: model.apply(variables, *args, method=method)  # noqa: E731
    latents = apply(images, method="encode")
    quantized = apply(latents, method="quantize")
    tokens = apply(images, method="tokenize")
    decoded = apply(quantized.codes, method="decode")
    return latents, quantized, tokens, decoded, apply(tokens, grid, method="detokenize")

  latents, quantized, tokens, decoded, clipped = everything(images)
  assert latents.shape == quantized.codes.shape == (3, *grid, model.code_width)
  assert quantized.distances.shape == (3, *grid, model.codebook_size)
  assert tokens.shape == (3, grid[0] * grid[1]) and tokens.dtype == jnp.int32
  np.testing.assert_array_equal(tokens, quantized.tokens.reshape(3, -1))  # row by row
  assert decoded.shape == images.shape and decoded.dtype == jnp.float32
  assert decoded.min() < 0 or decoded.max() > 1
  np.testing.assert_allclose(clipped, np.clip(decoded, 0, 1), atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_quantize_finds_the_nearest_code(normalize):
  model = tiny_vqgan(codebook_size=50, normalize_codes=normalize)
  variables = random_variables(model, jnp.zeros((1, 4, 4, 3)))
  latents = jax.random.normal(jax.random.key(1), (4, 5, 5, model.code_width))
  codes = np.asarray(model.apply(variables, method="codes"))
  if normalize:
    np.testing.assert_allclose(np.linalg.norm(codes, axis=-1), 1.0, rtol=1e-5)
    latents = latents / jnp.linalg.norm(latents, axis=-1, keepdims=True)
  found = model.apply(variables, latents, method="quantize")
  distances = np.square(np.asarray(latents, np.float64)[..., None, :] - codes).sum(axis=-1)
  np.testing.assert_allclose(found.distances, distances, atol=1e-5)
  np.testing.assert_array_equal(found.tokens, distances.argmin(axis=-1))
  np.testing.assert_array_equal(found.codes, codes[found.tokens])
  assert len(np.unique(found.tokens)) > 10


def test_latents_are_of_unit_length_where_codes_are():
  model = tiny_vqgan(normalize_codes=True)
  images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
  latents = jax.jit(functools.partial(model.apply, method="encode"))(random_variables(model, images), images)
  np.testing.assert_allclose(jnp.linalg.norm(latents, axis=-1), 1.0, rtol=1e-5)


def test_the_reference_shortcut_differs_where_the_number_of_channels_does():
  images = jax.random.uniform(jax.random.key(0), (2, 4, 4, 3))
  for multipliers, same in (((1, 1), True), ((1, 2), False)):
    outputs = []
    for shortcut in ("input", "reference"):
      model = tiny_vqgan(multipliers=multipliers, shortcut=shortcut)
      outputs.append(jax.jit(model.apply)(random_variables(model, images), images))
    assert (np.abs(outputs[0] - outputs[1]).max() < 1e-6) == same


def test_bfloat16_keeps_parameters_codes_and_pixels_float32():
  model = tiny_vqgan(dtype="bfloat16")
  images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)

  def dtypes(*args, method="__call__"):
    shapes = jax.eval_shape(lambda *args: model.apply(*args, method=method), variables, *args)
    return {leaf.dtype.name for leaf in jax.tree.leaves(shapes)}

  assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
  assert dtypes(images) == dtypes(images, method="encode") == {"float32"}
  latents = jax.ShapeDtypeStruct((2, 4, 4, 6), jnp.float32)
  assert dtypes(latents, method="quantize") == {"int32", "float32"}


def test_fewer_codes_flip_in_bfloat16_without_a_gradient():
  """At 1,024 codes, which are themselves latents, so that neighbours are as near as in a trained codebook."""
  network = tiny_vqgan(channels=8, multipliers=(1, 2, 4), strides=(2, 2), codebook_size=1024)
  noise = jax.random.normal(jax.random.key(0), (48, 8, 8, 3))
  images = jax.nn.sigmoid(jax.image.resize(noise, (48, 32, 32, 3), "cubic"))
  params = random_variables(network, images)["params"]

  @functools.partial(jax.jit, static_argnums=0)
  def codes(dtype, codebook):
    """Latents, their codes, and those of `tokenize`."""
    chosen, variables = network.clone(dtype=dtype), {"params": {**params, "codebook": codebook}}
    latents = chosen.apply(variables, images, method="encode")
    trained = chosen.apply(variables, latents, method="quantize").tokens
    return latents, trained.reshape(48, -1), chosen.apply(variables, images, method="tokenize")

  drawn = codes("float32", params["codebook"])[0].reshape(-1, network.code_width)[::3]
  _, expected, frozen = codes("float32", drawn)
  np.testing.assert_array_equal(frozen, expected)
  _, *found = codes("bfloat16", drawn)
  before, after = ((tokens != expected).mean() for tokens in found)
  assert before > 0.002 and after < 0.7 * before, (before, after)


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(strides=(2, 2)), "2 multipliers need 1 strides"),
    (dict(channels=5), "channels=5 is not divisible by norm_groups=2"),
    (dict(shortcut="inptu"), "shortcut 'inptu'"),
  ],
)
def test_wrong_vqgan_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    tiny_vqgan(**changes)


@pytest.mark.parametrize("shape,message", [((9, 8, 3), "9x8.*factor 2"), ((8, 8, 1), "1 channels.*takes 3")])
def test_wrong_images_are_refused(shape, message):
  with pytest.raises(UserError, match=message):
    tiny_vqgan().token_grid(shape)
  with pytest.raises(UserError, match=message):
    jax.eval_shape(tiny_vqgan().init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), jnp.float32))


def test_uint8_images_are_rejected():
  with pytest.raises(TypeError, match="float32"):
    jax.eval_shape(tiny_vqgan().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8))


# Discriminator


@pytest.mark.parametrize("size,channels,blocks", [((8, 8), 3, 1), ((12, 9), 1, 3)])
def test_discriminator_and_its_r1_gradient(size, channels, blocks):
  model = Discriminator(channels=4, max_channels=6, blocks=blocks)
  images = jax.random.uniform(jax.random.key(0), (3, *size, channels))
  variables = random_variables(model, images)
  apply = jax.jit(model.apply)
  logits = apply(variables, images)
  assert logits.shape == (3,) and logits.dtype == jnp.float32 and len(np.unique(logits)) == 3
  # One image at a time: each logit depends on its own image alone.
  others = apply(variables, images.at[::2].set(0.5))
  np.testing.assert_allclose(others[1], logits[1], atol=1e-5)
  assert np.abs(others - logits)[::2].min() > 1e-5

  @jax.jit
  @jax.grad
  def gradient(params):
    return losses.r1_penalty(lambda x: model.apply({"params": params}, x), images).mean()

  for name, leaf in tree.flatten(gradient(variables["params"])).items():
    assert np.isfinite(leaf).all()
    # Biases move no gradient at the input but through kinks, which have measure zero.
    assert np.abs(leaf).max() > 0 or name.endswith("bias"), name


def test_the_discriminator_of_maskgit_at_256_pixels():
  config = config_lib.load("configs/vqgan_imagenet.py")
  model = Discriminator(**config.objective.discriminator)
  images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  kernels = tree.flatten(variables["params"])
  widths = [kernels[f"block_{i}_conv_1/kernel"].shape[-1] for i in range(6)]
  assert kernels["conv_in/kernel"].shape == (3, 3, 3, 64) and widths == [128, 256, 512, 512, 512, 512]
  assert kernels["dense/kernel"].shape == (4 * 4 * 512, 512) and kernels["logit/kernel"].shape == (512, 1)
  # 15.1 with the products with padding, which the count leaves out.
  assert flops.count(model.apply, variables, images) / 2e9 == pytest.approx(15.04, abs=0.01)


@pytest.mark.parametrize("name", INITIALISERS)
def test_kernels_of_the_discriminator_start_as_named(name):
  model = Discriminator(channels=16, max_channels=32, blocks=1, kernel_init=name)
  params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  kernel = np.asarray(params["block_0_conv_1"]["kernel"])
  fan_in, fan_out = 9 * 16, 9 * 32
  variance = {"lecun_normal": 1 / fan_in, "xavier_uniform": 2 / (fan_in + fan_out)}[name]
  assert kernel.var() == pytest.approx(variance, rel=0.1)
  limit = np.sqrt(3 * variance)
  assert (np.abs(kernel).max() <= limit) == (name == "xavier_uniform")


def test_images_too_small_for_the_discriminator_are_refused():
  with pytest.raises(UserError, match="at least 32 pixels"):
    jax.eval_shape(Discriminator().init, jax.random.key(0), jnp.zeros((1, 31, 64, 3)))


def test_blur_pool_halves_and_keeps_a_constant():
  pooled = blur_pool(jnp.full((1, 8, 6, 2), 3.0))
  assert pooled.shape == (1, 4, 3, 2)
  np.testing.assert_allclose(pooled[:, 1:-1, 1:-1], 3.0, rtol=1e-6)


# Transformer and MAGE

VOCAB = Vocab(codebook=7)
TOKENS = 9


@pytest.fixture(scope="module")
def mage():
  """A tiny MAGE with random parameters, and (tokens, mask, kept, dropped) as in training."""
  model = Mage(VOCAB, TOKENS, 8, 2, 2, decoder_width=12, decoder_depth=2, decoder_heads=3, dropout=0.0)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, VOCAB.codebook, (4, TOKENS)).astype(np.int32)
  order = rng.permuted(np.tile(np.arange(TOKENS), (4, 1)), axis=1)
  mask, kept = order < 6, np.argsort(order < 4, axis=1, kind="stable")[:, :5].astype(np.int32)
  variables = random_variables(model, tokens, mask)
  apply = jax.jit(functools.partial(model.apply, variables), static_argnames="method")
  return apply, tokens, mask, kept


def test_vocab_ids_do_not_overlap():
  vocab = Vocab(codebook=64, classes=1000, null_class=76)
  assert (vocab.null_class_id, vocab.mask_id, vocab.size) == (140, 1064, 1065)
  assert len({VOCAB.null_class_id, VOCAB.mask_id, *range(VOCAB.codebook)}) == VOCAB.size


def test_mage_shapes(mage):
  apply, tokens, mask, kept = mage
  assert apply(tokens, mask, kept, method="encode").shape == (4, 1 + 5, 8)
  latents = apply(tokens, mask, method="encode")
  assert latents.shape == (4, 1 + TOKENS, 8)
  logits = apply(latents, mask, method="decode")
  assert logits.shape == (4, 1 + TOKENS, VOCAB.size) and logits.dtype == jnp.float32
  np.testing.assert_allclose(
    apply(tokens, mask, method="code_logits"), logits[:, 1:, : VOCAB.codebook], rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize("drop", [False, True])
def test_masked_tokens_are_hidden_and_visible_ones_are_not(mage, drop):
  apply, tokens, mask, kept = mage
  kept = kept if drop else None
  logits = apply(tokens, mask, kept, method="code_logits")
  other = (tokens + 1) % VOCAB.codebook
  hidden = apply(np.where(mask, other, tokens), mask, kept, method="code_logits")
  np.testing.assert_array_equal(hidden, logits)
  for position in range(TOKENS):
    changed = tokens.copy()
    changed[:, position] = other[:, position]
    moved = np.abs(apply(changed, mask, kept, method="code_logits") - logits).max(axis=(1, 2)) > 1e-4
    np.testing.assert_array_equal(moved, ~mask[:, position])


def test_dropping_nothing_is_not_dropping(mage):
  apply, tokens, mask, _ = mage
  everything = np.tile(np.arange(TOKENS, dtype=np.int32), (4, 1))
  for method in ("encode", "code_logits"):
    np.testing.assert_allclose(
      apply(tokens, mask, everything, method=method), apply(tokens, mask, method=method), rtol=1e-4, atol=1e-4
    )


def test_dropped_positions_do_not_reach_the_encoder_and_visible_ones_keep_their_place(mage):
  apply, _, mask, kept = mage
  # The decoder, given distinct latents, must read kept position p from latent 1 + (rank of p in kept).
  latents = jax.random.normal(jax.random.key(5), (4, 1 + kept.shape[1], 8))
  full = np.full((4, 1 + TOKENS, 8), np.nan, np.float32)
  full[:, 0] = latents[:, 0]
  np.put_along_axis(full[:, 1:], kept[..., None], np.asarray(latents[:, 1:]), axis=1)
  hidden = np.broadcast_to(mask[..., None], full[:, 1:].shape)
  # NaN stays where nothing was kept: those positions are masked, or the result would show it.
  full[:, 1:][hidden] = np.nan
  assert np.isfinite(full[:, 1:][~hidden]).all()
  np.testing.assert_allclose(
    apply(latents, mask, kept, method="decode"),
    apply(full, mask, method="decode"),
    rtol=1e-4,
    atol=1e-4,
  )


def test_masked_positions_get_the_class_position_s_feature(mage):
  apply, _, mask, _ = mage
  latents = np.array(jax.random.normal(jax.random.key(6), (4, 1 + TOKENS, 8)))
  logits = apply(latents, mask, method="decode")
  filled = np.where(np.pad(mask, ((0, 0), (1, 0)))[..., None], latents[:, :1], latents)
  nothing = np.zeros_like(mask)
  np.testing.assert_allclose(apply(filled, nothing, method="decode"), logits, rtol=1e-4, atol=1e-4)


def test_the_place_of_a_token_matters(mage):
  apply, tokens, mask, _ = mage
  moved = apply(np.roll(tokens, 1, axis=1), np.roll(mask, 1, axis=1), method="code_logits")
  back = np.roll(moved, -1, axis=1)
  assert np.abs(back - apply(tokens, mask, method="code_logits")).max() > 1e-2


def test_the_pooled_vector_sees_every_token(mage):
  apply, tokens, _, _ = mage
  pooled = np.asarray(apply(tokens, method="pool"))
  assert pooled.shape == (4, 8) and pooled.dtype == np.float32
  for position in range(TOKENS):
    changed = tokens.copy()
    changed[:, position] = (changed[:, position] + 1) % VOCAB.codebook
    assert (np.abs(apply(changed, method="pool") - pooled).max(axis=-1) > 1e-4).all()


def test_dropout_is_random_only_during_training():
  model = Mage(VOCAB, TOKENS, 8, 1, 2, decoder_width=8, decoder_depth=1, decoder_heads=2, dropout=0.5)
  tokens = np.zeros((2, TOKENS), np.int32)
  mask = tokens > 0
  variables = random_variables(model, tokens, mask)

  @functools.partial(jax.jit, static_argnames="train")
  def logits(seed, train):
    rngs = {"dropout": jax.random.key(seed)}
    return model.apply(variables, tokens, mask, train=train, rngs=rngs, method="code_logits")

  np.testing.assert_array_equal(logits(0, False), logits(1, False))
  np.testing.assert_array_equal(logits(0, True), logits(0, True))
  assert (logits(0, True) != logits(1, True)).any()


def test_width_that_does_not_divide_into_heads_is_refused():
  with pytest.raises(UserError, match=r"width of 10.*3 heads"):
    jax.eval_shape(lambda x: Transformer(1, 3).init(jax.random.key(0), x, train=False), jnp.zeros((1, 4, 10)))
