"""MR-MAE: MAE's loss at masked patches, and the distance to a teacher at visible ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskgen import objectives
from maskgen.errors import UserError

ENCODER = dict(
  image_size=(16, 16), patch=4, width=16, depth=1, heads=2, pooling="class", fixed_positions=True
)
TEACHER = dict(name="vit", image_size=(16, 16), patch=4, width=12, depth=1, heads=2)
SIZES = dict(encoder=ENCODER, decoder_width=16, decoder_depth=1, decoder_heads=2)
GREY = dict(mean=(0.5,), std=(0.5,))
SECTION = dict(name="mr_mae", teacher=TEACHER, mimic_weight=0.5, **SIZES)


def test_the_loss_is_that_of_mae_and_the_distance_to_the_teacher():
  objective, mae = objectives.build(SECTION), objectives.build(dict(name="masked_pixels", **SIZES))
  shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: np.float32(0.3 * rng.normal(size=leaf.shape)), shapes["params"])
  images = rng.uniform(size=(2, 16, 16, 3)).astype(np.float32)
  taught = rng.normal(2.0, 3.0, (2, 16, 12)).astype(np.float32)

  @jax.jit
  def compute(params, images, taught):
    mask, kept = objective.mask(jax.random.split(jax.random.key(1), 2))
    latents = objective.encoder.apply(
      {"params": params["main"]["encoder"]}, images, kept, method="encode_kept"
    )
    found = objective.both_errors(params, images, taught, mask, kept)
    return found, mae.errors(params, images, mask, kept), latents, kept

  found, pixels, latents, kept = compute(params, images, taught)
  np.testing.assert_allclose(found["pixel_error"], pixels, rtol=1e-5)
  head = params["main"]["head"]
  predicted = np.asarray(latents)[:, 1:] @ head["kernel"] + head["bias"]
  target = (taught - taught.mean(-1, keepdims=True)) / np.sqrt(taught.var(-1, keepdims=True) + 1e-5)
  error = np.abs(predicted - np.take_along_axis(target, np.asarray(kept)[..., None], 1))
  mimic = np.where(error < 1, error**2, 2 * error - 1).mean(axis=(1, 2))
  assert error.min() < 1 < error.max()
  np.testing.assert_allclose(found["mimic_error"], mimic, rtol=1e-4)
  np.testing.assert_allclose(found["loss"], pixels + 0.5 * mimic, rtol=1e-4)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (dict(teacher=TEACHER | dict(patch=8)), "the teacher has 2 x 2 patches and the encoder 4 x 4 patches"),
    (dict(teacher=TEACHER | GREY), "the teacher reads 1 channel and the encoder 3"),
    (dict(teacher=dict(name="tokenizer", image_size=(16, 16))), "no image encoder"),
    (dict(mimic_weight=-1.0), "mimic_weight is -1"),
  ],
)
def test_wrong_settings(change, words):
  with pytest.raises(UserError, match=words):
    objectives.build(SECTION | change)


def test_grey_images_are_shown_to_a_teacher_of_three_channels():
  objective = objectives.build(SECTION | dict(encoder=ENCODER | GREY))
  teacher = objective.pretrained_shapes()["teacher"]["params"]["main"]
  images = jax.ShapeDtypeStruct((2, 16, 16, 1), jnp.uint8)
  frozen = {"teacher": {"params": teacher, "frozen": {}}}
  assert jax.eval_shape(objective.teach, frozen, {"image": images}).shape == (2, 16, 12)
