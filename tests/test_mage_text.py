"""Text-conditional MAGE: what is trained, captions, guidance; the rest is tested with classes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskgen import config as config_lib
from maskgen import objectives, tree
from maskgen.errors import UserError


@pytest.fixture(scope="module")
def objective():
  section = config_lib.to_dict(config_lib.load("configs/mage_text_cond.py:debug"))["mage_text"]["objective"]
  return objectives.build({**section, "condition_dropout": 0.0, "layout": 8})


@pytest.fixture(scope="module")
def variables(objective):
  """Random values for every parameter, so that no zero hides another."""
  shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: jnp.float32(0.5 * rng.normal(size=leaf.shape)), shapes)


def example(objective, captions=("a red three", "a small five", "")):
  rng = np.random.default_rng(0)
  shape = (len(captions), objective.num_tokens)
  return {
    "key": jax.random.split(jax.random.key(0), len(captions)),
    "caption": objective.captions.read(captions),
    "tokens": rng.integers(0, objective.codebook_size, shape).astype(np.int32),
    "token_mask": rng.random(shape) < 0.5,
  }


@pytest.fixture(scope="module")
def logits(objective, variables):
  def run(scale, **changes):
    given = example(objective)
    batch = {name: value for name, value in {**given, **changes}.items() if value is not None}

    @jax.jit
    def compute(batch, tokens, mask):
      return objective.logits_fn(variables, batch, scale, "constant")(tokens, mask, jnp.float32(0.0))

    return np.asarray(compute(batch, given["tokens"], given["token_mask"]))

  return run


def test_the_text_encoder_and_the_decoder_are_trained(objective, variables):
  def loss(main):
    batch, rest = example(objective), (jax.random.key(0), jnp.int32(0))
    return objective.losses({"main": main}, variables["frozen"], {}, batch, *rest, train=True)[0]["main"]

  main = variables["params"]["main"]
  assert {name.split("/")[0] for name in tree.flatten(main)} > {
    "text_encoder",
    "condition_input",
    "layout_output",
  }
  for name, value in tree.flatten(jax.jit(jax.grad(loss))(main)).items():
    assert np.abs(value).max() > 0, name


def test_captions_reach_their_own_example(objective, logits):
  before = logits(1.0)
  after = logits(1.0, caption=objective.captions.read(["a red three", "a large five", ""]))
  np.testing.assert_allclose(after[[0, 2]], before[[0, 2]], atol=1e-5)
  assert np.abs(after[1] - before[1]).max() > 1e-3


def test_guidance_leads_away_from_the_empty_caption(objective, logits):
  conditional, unconditional = logits(1.0), logits(1.0, caption=None)
  np.testing.assert_allclose(conditional[2], unconditional[2], atol=1e-4)
  assert np.abs(conditional[0] - unconditional[0]).max() > 1e-3
  expected = unconditional + 3 * (conditional - unconditional)
  np.testing.assert_allclose(logits(3.0), expected, atol=1e-3)


def test_wrong_fields_are_refused(objective):
  with pytest.raises(UserError, match=r"condition_dropout is 1\.0"):
    dataclasses.replace(objective, condition_dropout=1.0)
  assert objective.num_classes == 0 and objective.captions.length == 16
