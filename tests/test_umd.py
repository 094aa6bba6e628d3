"""UMD: the reference's numbers from its weights, and what holds of any model that masks and denoises.

tests/golden/umd.npz and umd_labels.npz hold random weights of philippe-eecs/small-vision's network, and what
its code computed from them in float64; in the second everything is visible, noised and of a class.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heirs_reference import assert_gradients, from_reference, read

from maskgen import objectives, serving, tree
from maskgen.errors import UserError
from maskgen.models.patches import patchify
from maskgen.models.umd import Masked, Noised, Umd
from maskgen.numerics import diffusion

GOLDEN = dict(width=32, depth=2, heads=4)
ENCODER = dict(image_size=(16, 16), patch=4, width=16, depth=1, heads=2)
SECTION = dict(name="umd", encoder=ENCODER, decoder_depth=1, sampling=dict(steps=4))
LAYERS = {
  "encoder/patch_embedding": "embedding",
  "encoder/encoder_norm": "Encoder/encoder_norm",
  "encoder/condition/time/up": "time_trunk/Dense_0",
  "encoder/condition/time/down": "time_trunk/Dense_1",
  "encoder/condition/label/up": "label_trunk/Dense_0",
  "encoder/condition/label/down": "label_trunk/Dense_1",
  "decoder/norm": "Decoder/encoder_norm",
  "decoder/modulation": "final_modulation",
}
BLOCK = {
  "attention_norm": "LayerNorm_0",
  "mlp_norm": "LayerNorm_1",
  "modulation": "Dense_0",
  "mlp/up": "MlpBlock_0/Dense_0",
  "mlp/down": "MlpBlock_0/Dense_1",
}
TABLES = {
  "encoder/position": "pos_embedding",
  "encoder/register_tokens": "cls",
  "decoder/position": "dec_pos_embedding",
  "decoder/mask_token": "image_mask_embedding",
}


def to_reference(params, heads: int = 4) -> dict[str, jax.Array]:
  """Parameters by the reference's names and in its shapes.

  Its last layer is a transposed convolution, which flips the kernel and has one bias for all pixels.
  """
  found = {}
  for path, value in tree.flatten(params).items():
    layer, _, leaf = path.rpartition("/")
    part, _, rest = layer.partition("/")
    block, _, name = rest.removeprefix(f"{part}/").partition("/")
    start = f"{part.title()}/Encoder1DBlock_{block.removeprefix('block_')}"
    if path in TABLES:
      found[TABLES[path]] = value.reshape(1, *value.shape)
    elif leaf == "label_embedding":
      found["label_emb/embedding/embedding"] = value
    elif layer in LAYERS:
      found[f"{LAYERS[layer]}/{leaf}"] = value
    elif layer == "decoder/head":
      value = value.reshape(-1, 2, side := int((value.shape[-1] / 6) ** 0.5), side, 3)
      kernel = value.transpose(2, 3, 0, 1, 4).reshape(side, side, -1, 6)[::-1, ::-1]
      found[f"final_conv/{leaf}"] = kernel if leaf == "kernel" else kernel.sum(axis=(0, 1, 2))
    elif name in BLOCK:
      found[f"{start}/{BLOCK[name]}/{leaf}"] = value
    else:
      ours = name.removeprefix("attention/")
      split = (heads, value.shape[-1] // heads)
      shape = value.shape if ours == "out" else (*value.shape[:-1], *split)
      shape = (*split, value.shape[-1]) if ours == "out" and leaf == "kernel" else shape
      found[f"{start}/MultiHeadDotProductAttention_0/{ours}/{leaf}"] = value.reshape(shape)
  return found


def masked(noise, ratio: float) -> Masked:
  """What the reference masks: the patches with the largest random numbers."""
  kept = np.sort(np.argsort(noise, axis=1)[:, : int(noise.shape[1] * (1 - ratio))]).astype(np.int32)
  mask = np.ones(noise.shape, bool)
  np.put_along_axis(mask, kept, False, axis=1)
  return Masked(mask, kept)


def build_reference(name: str, **options):
  golden = read(name)
  images = golden["images_nhwc"]
  patch = golden["weights/embedding/kernel"].shape[0]
  depth = sum(key.startswith("weights/Encoder/") and key.endswith("key/bias") for key in golden)
  encoder = GOLDEN | dict(image_size=images.shape[1:3], patch=patch, depth=depth)
  objective = objectives.build(SECTION | dict(encoder=encoder) | options)
  shapes = jax.eval_shape(objective.init, jax.random.key(0), {})["params"]["main"]
  return golden, objective, from_reference(golden, shapes, to_reference)


def test_loss_and_gradients_are_those_of_the_reference():
  golden, objective, params = build_reference("umd")
  images, model = golden["images_nhwc"], objective.model
  clean, noisy = masked(golden["mask_noise_clean"], 0.75), masked(golden["mask_noise_noisy"], 0.375)
  noised = Noised(golden["t"][:, 0], golden["eps"], None)

  @jax.jit
  def compute(params):
    def loss(params):
      found = model.noisy_errors(params, images[:2], noisy, noised)
      found["clean_error"] = model.clean_errors(params, images[2:], clean)
      parts = {name: value.mean() for name, value in found.items()}
      return (parts["image_error"] + parts["noise_error"]) / 4 + parts["clean_error"] / 2, parts

    predicted = model.predict(params, images[2:], clean.kept, jnp.zeros(2, jnp.int32))
    results, grads = jax.value_and_grad(loss, has_aux=True)(params)
    return *results, to_reference(grads), jnp.concatenate(predicted, axis=-1)

  loss, parts, grads, predicted = compute(params)
  np.testing.assert_allclose(loss, golden["loss"], rtol=3e-6)
  names = {
    "noise_error": "noisy_eps_visible",
    "image_error": "noisy_x0_masked",
    "clean_error": "clean_x0_masked",
  }
  for ours, theirs in names.items():
    np.testing.assert_allclose(parts[ours], golden[f"loss_{theirs}"], rtol=3e-6)
  assert not assert_gradients(golden, grads)
  np.testing.assert_allclose(predicted, golden["pred_clean"], atol=2e-5)


def test_classes_and_nothing_masked_as_in_the_reference():
  golden, objective, params = build_reference("umd_labels", classes=5, mask_ratio=0.0, clean_share=0.0)
  images, model = golden["images_nhwc"], objective.model
  label = np.where(golden["label_drop_noisy"], 5, golden["labels"]).astype(np.int32)
  count = objective.encoder.num_patches
  everything = Masked(np.zeros((3, count), bool), np.tile(np.arange(count), (3, 1)))

  @jax.jit
  def compute(params):
    def loss(params):
      found = model.noisy_errors(params, images, everything, Noised(golden["t"][:, 0], golden["eps"], label))
      return (found["image_error"].mean() + found["noise_error"].mean()) / 2

    value, grads = jax.value_and_grad(loss)(params)
    return value, to_reference(grads)

  loss, grads = compute(params)
  np.testing.assert_allclose(loss, golden["loss"], rtol=3e-6)
  assert not assert_gradients(golden, grads)


@pytest.fixture(scope="module")
def model():
  """A model with random weights, also those that are 0 at first."""
  objective = objectives.build(SECTION | dict(classes=3))
  shapes = jax.eval_shape(objective.init, jax.random.key(0), {})
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)
  return serving.GenerativeModel({"objective": SECTION}, objective, variables)


def test_images_are_generated_by_class(model):
  made = model.generate(batch=2, label=[0, 2], guidance=1.0)
  assert made.shape == (2, 16, 16, 3) and made.min() >= 0 and made.max() <= 1
  plain = model.generate(batch=2)
  np.testing.assert_allclose(model.generate(batch=2, label=1, guidance=0.0), plain, atol=1e-5)
  assert np.abs(made - plain).max() > 1e-3
  guided = model.generate(batch=2, label=[0, 2], guidance=1.5)
  assert np.abs(guided - made).max() > 1e-3
  with pytest.raises(UserError, match="ranges over 3"):
    model.generate(label=3)
  with pytest.raises(UserError, match="without captions"):
    model.generate(prompt="a cat")


def test_reconstructions_keep_what_is_visible_and_losses_add_up(model):
  images = np.random.default_rng(1).uniform(size=(3, 16, 16, 3)).astype(np.float32)
  found = model.call("reconstruct", {"image": images})
  same = np.abs(patchify(found, 4) - patchify(images, 4)).max(axis=-1) < 1e-5
  assert (same.sum(axis=(1, 2)) == 4).all()
  losses = model.call("loss", {"image": images, "label": np.arange(3)})
  parts = (losses["image_error"] + losses["noise_error"]) / 2 + losses["clean_error"]
  np.testing.assert_allclose(losses["loss"], parts / 2, rtol=1e-5)
  assert model.features(images).shape == (3, 16)
  assert model.features(images, patches=True).shape == (3, 16, 16)


def test_true_noise_leads_to_the_image():
  objective = objectives.build(SECTION)
  image = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3), minval=-1.0)

  class Oracle(Umd):
    def predict(self, params, images, kept, level, label=None, rng=None):
      alpha, sigma = diffusion.signal_and_noise(self.schedule, level[0] - 1)
      return None, (images - alpha * image) / sigma

  networks = objective.model
  oracle = Oracle(networks.encoder, networks.decoder, networks.schedule)
  noise, label = jax.random.normal(jax.random.key(1), image.shape), jnp.zeros(2, jnp.int32)
  found = oracle.sample({}, noise, [label], [], sampler="ddim", steps=8)
  np.testing.assert_allclose(found, image, atol=1e-4)


@pytest.mark.parametrize(("share", "clean"), [(0.5, [1, 3, 5, 7]), (0.3, [3, 7]), (0.2, [7]), (0.0, [])])
def test_clean_examples_are_spread_over_the_batch(share, clean):
  objective = objectives.build(SECTION | dict(clean_share=share))
  batch = {"key": np.arange(8), "image": 10 * np.arange(8)}
  noisy, rest = objective.share_out(batch)
  assert list(rest["key"]) == clean and list(rest["image"]) == [10 * i for i in clean]
  assert sorted([*noisy["key"], *rest["key"]]) == list(range(8))
  if share:
    with pytest.raises(UserError, match="of 1 examples is none"):
      objective.share_out({"key": np.arange(1)})


def test_a_share_of_clean_examples_is_not_rounded_below_its_number():
  objective = objectives.build(SECTION | dict(clean_share=0.29))
  assert 100 * 0.29 < 29 and len(objective.share_out({"key": np.arange(100)})[1]["key"]) == 29


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (dict(mask_ratio=0.99), "mask_ratio=0.99 masks 16 of 16 patches: from 0 to 15"),
    (dict(clean_mask_ratio=0.0), "clean_mask_ratio=0.0 masks 0 of 16 patches: from 1 to 15"),
    (dict(clean_share=1.0), "clean_share is 1.0: it must be"),
    (dict(schedule=dict(prediction="v")), "UMD predicts 'noise'"),
    (dict(encoder=ENCODER | dict(std=(0.5, 0.5, 0.2))), "encoder.mean and encoder.std are not all 0.5"),
    (dict(encoder=ENCODER | dict(pooling="mean", registers=0)), "the decoder reads registers"),
    (dict(encoder=ENCODER | dict(registers=0)), "of which there are none"),
    (dict(encoder=ENCODER | dict(pooling="mean")), "need pooling='class' or 'registers'"),
    (dict(sampling=dict(steps=2000)), "2000 steps of sampling"),
  ],
)
def test_wrong_settings(change, words):
  with pytest.raises(UserError, match=words):
    objectives.build(SECTION | change)
