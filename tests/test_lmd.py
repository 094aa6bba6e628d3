"""LMD: the loss of a masked autoencoder that sees the visible latents alone, and how many these are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskgen import objectives
from maskgen.errors import UserError
from maskgen.models import latents as latents_lib
from maskgen.models.autoencoder_kl import AutoencoderKL
from maskgen.numerics import masking

NETWORK = dict(
  channels=8, multipliers=(1, 2), strides=(4,), blocks=1, norm_groups=2, codebook_size=8, code_width=6
)
TOKENIZER = dict(name="tokenizer", image_size=(16, 16), tokenizer=NETWORK)
ENCODER = dict(patch=1, width=16, depth=2, heads=2, pooling="class", fixed_positions=True)
DECODER = dict(decoder_width=16, decoder_depth=1, decoder_heads=2)
SECTION = dict(
  name="lmd", image_size=(16, 16), autoencoder=TOKENIZER, encoder=ENCODER, rise_steps=8, **DECODER
)
STEP = 4


def randomize(shapes, rng):
  return jax.tree.map(lambda leaf: np.float32(0.3 * rng.normal(size=leaf.shape)), shapes)


def ratio(step: float, steps: float) -> float:
  """That of the authors' code, by its formula."""

  def f(t: float) -> float:
    return np.cos((t / steps + 0.008) / 1.008 * np.pi / 2) ** 2

  return 0.15 + 0.6 * (1.0 - f(min(step, steps)) / f(0.0))


def test_the_number_of_masked_patches_rises_as_in_the_code_of_the_authors():
  count = jax.jit(lambda step: masking.num_masked_at(step, 49, 0.15, 0.75, 300))
  steps = [0, 1, 40, 77, 150, 222, 299, 300, 301, 10**6]
  expected = [49 - int(49 * (1.0 - ratio(step, 300))) for step in steps]
  assert [int(count(step)) for step in steps] == expected
  assert expected[0] == 8 and expected[-1] == 37 and len(set(expected)) == 6


def test_loss_and_gradients_are_those_of_the_visible_latents_alone():
  objective = objectives.build(SECTION)
  mae = objectives.build(dict(name="masked_pixels", encoder=vars_of(objective.encoder), **DECODER))
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())
  params, frozen = randomize(shapes["params"], rng), randomize(shapes["frozen"], rng)
  batch = {
    "image": rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8),
    "key": jax.random.split(jax.random.key(1), 3),
  }
  visible = 16 - int(np.ceil(16 * ratio(STEP, 8)))

  @jax.jit
  def compute(params, frozen, batch):
    def loss(params):
      return objective.losses(params, frozen, {}, batch, batch["key"][0], jnp.int32(STEP), train=True)[0][
        "main"
      ]

    images = batch["image"].astype(jnp.float32) / 255.0
    latents = objective.network.apply({"params": frozen["autoencoder"]}, images, method="encode")
    mask, kept = objective.mask(batch["key"], jnp.int32(STEP))

    def expected(params):
      return mae.errors(params, latents, mask, kept[:, :visible]).mean()

    predicted = mae.predict(params, latents, kept[:, :visible])
    return (
      jax.value_and_grad(loss)(params),
      jax.value_and_grad(expected)(params),
      (latents, mask, kept, predicted),
    )

  found, expected, (latents, mask, kept, predicted) = jax.device_get(compute(params, frozen, batch))
  assert kept.shape == (3, 13) and (kept[:, visible:] == 16).all()
  assert all(
    sorted(row[:visible]) == list(np.flatnonzero(~hidden)) for row, hidden in zip(kept, mask, strict=True)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected)
  patches = latents.reshape(3, 16, 6)
  target = patches - patches.mean(axis=-1, keepdims=True)
  target /= np.sqrt(patches.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
  errors = ((predicted - target) ** 2).mean(axis=-1)
  loss = np.mean([one[hidden].mean() for one, hidden in zip(errors, mask, strict=True)])
  np.testing.assert_allclose(found[0], loss, rtol=1e-5)


def vars_of(encoder) -> dict:
  return ENCODER | dict(image_size=encoder.image_size, mean=encoder.mean, std=encoder.std)


def test_features_are_of_the_latents_of_resized_images():
  objective = objectives.build(SECTION)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())
  variables = {name: randomize(shapes[name], rng) for name in ("params", "frozen")}
  part, images = objective.image_encoder, rng.uniform(size=(2, 16, 16, 3)).astype(np.float32)
  assert part.shapes().keys() == {"params", "frozen"} and part.shapes()["frozen"].keys() == {"autoencoder"}

  @jax.jit
  def compute(variables, images):
    latents = latents_lib.encode(objective.network, variables["frozen"]["autoencoder"], images)
    encoder = {"params": variables["params"]["main"]["encoder"]}
    large = jnp.repeat(jnp.repeat(images, 2, axis=1), 2, axis=2)
    fns = objective.predict_fns()
    shown = fns["reconstruct"](variables, {"image": images}, jax.random.key(0))
    pooled = objective.encoder.apply(encoder, latents, method="pool")
    return part.pool(variables, {"image": images}), pooled, part.encode(variables, {"image": large}), shown

  found, expected, patches, shown = compute(variables, images)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  assert patches.shape == (2, 16, 16) and shown.shape == images.shape
  assert np.isfinite(patches).all() and shown.min() >= 0.0 and shown.max() <= 1.0


def test_latents_of_a_diffusion_autoencoder_are_means():
  network = AutoencoderKL(channels=(4, 4), layers=1, groups=2)
  rng = np.random.default_rng(0)
  images = rng.uniform(size=(1, 8, 8, 3)).astype(np.float32)
  params = randomize(jax.eval_shape(network.init, jax.random.key(0), images)["params"], rng)

  @jax.jit
  def compute(params, images):
    latents = latents_lib.encode(network, params, images)
    gaussian = network.apply({"params": params}, images, method="encode")
    return latents, gaussian.mean, latents_lib.decode(network, params, latents)

  latents, mean, shown = compute(params, images)
  np.testing.assert_array_equal(latents, mean)
  assert latents.shape[1:] == latents_lib.shape(network, (8, 8)) == (4, 4, 4) and shown.shape == images.shape


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (dict(image_size=(16, 18)), r"image_size is \(16, 18\): give multiples of 4"),
    (dict(first_ratio=0.8), "first_ratio is 0.8 and mask_ratio 0.75: give no more at first"),
    (dict(first_ratio=0.0), "first_ratio=0.0 masks no patch"),
    (dict(rise_steps=0), "rise_steps is 0"),
    (dict(encoder=ENCODER | dict(patch=4), mask_ratio=0.9), "masks 1 of 1 patches"),
    (dict(autoencoder=dict(name="masked_pixels", encoder=ENCODER)), "autoencoder is no tokenizer, and no"),
  ],
)
def test_wrong_settings(change, words):
  with pytest.raises(UserError, match=words):
    objectives.build(SECTION | change)


def test_another_autoencoder_is_refused():
  objective = objectives.build(SECTION)
  other = {"objective": TOKENIZER | dict(tokenizer=NETWORK | dict(codebook_size=16))}
  with pytest.raises(UserError, match="codebook_size=16"):
    objective.check_pretrained("autoencoder", other)
  with pytest.raises(UserError, match="not a tokenizer"):
    objective.check_pretrained("autoencoder", {"objective": dict(name="masked_pixels")})
