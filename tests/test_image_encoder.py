"""The contract of image encoders that classifiers, ViLex and optimizers rely on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskgen import objectives, storage, tree
from maskgen.errors import UserError
from maskgen.training import optim

MAGE = tiny.stage("mage")["objective"]
VIT = dict(name="vit", image_size=(16, 16), patch=8, width=8, depth=2, heads=2)
SUBCLASS = """
import dataclasses
from maskgen.objectives import mage

@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(mage.Objective):
  bins: int = 8
"""


def classify(encoder, **changes) -> objectives.Objective:
  return objectives.build(dict(name="classify", encoder=encoder, classes=10) | changes)


def random(shapes):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


@pytest.fixture
def subclass(tmp_path, monkeypatch) -> dict:
  """The section of an objective outside the package that extends MAGE."""
  (tmp_path / "mage_with_bins.py").write_text(SUBCLASS)
  monkeypatch.syspath_prepend(str(tmp_path))
  return MAGE | dict(name="mage_with_bins", bins=4)


def test_a_subclass_of_mage_is_taken_wherever_mage_is(subclass):
  part = objectives.encoder_part(subclass, "it")
  assert part == objectives.encoder_part(MAGE, "it")
  classify(MAGE).check_pretrained("encoder", {"objective": subclass})
  conditional = objectives.build(MAGE | dict(name="mage_conditional", classes=10))
  conditional.check_pretrained("mage", {"objective": subclass})


def test_a_frozen_encoder_is_found_where_it_is():
  conditional = MAGE | dict(name="mage_conditional", classes=10)
  shapes = classify(conditional).pretrained_shapes()["encoder"]
  names = {"/".join(name.split("/")[:2]) for name in tree.flatten(shapes)}
  assert names == {"frozen/encoder", "frozen/tokenizer"}
  expected = tree.flatten(classify(MAGE).pretrained_shapes()["encoder"]["params"]["main"])
  assert tree.flatten(shapes["frozen"]["encoder"]) == expected


def test_a_classifier_of_a_classifier_shares_its_encoder():
  first = classify(MAGE)
  section = dict(name="classify", encoder=MAGE, classes=10)
  assert classify(section).pretrained_shapes() == first.pretrained_shapes()


@pytest.mark.parametrize("trained", ["all", "head"])
def test_a_classifier_on_a_vit(trained):
  """It sees pixels: there are no codes; dropout applies where the encoder is trained."""
  rates = dict(dropout=0.5, drop_path=0.5) if trained == "all" else {}
  objective = classify(VIT, trained=trained, **rates)
  parts = jax.jit(objective.init)(jax.random.key(0), random(objective.pretrained_shapes()))
  assert objective.codebook_size == 0 and "encode" not in objective.predict_fns()
  batch = {"image": np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), np.uint8)}
  features = objective.predict_fns()["features"](parts, batch, None)
  np.testing.assert_allclose(features.mean(axis=-1), 0.0, atol=1e-5)
  np.testing.assert_allclose(features.std(axis=-1), 1.0, atol=1e-3)
  pool = objective.image_encoder.pool
  assert (np.abs(pool(parts, batch, jax.random.key(1)) - pool(parts, batch)).max() > 1e-3) == bool(rates)


def test_layer_decay_of_a_vit():
  objective = classify(VIT)
  shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())["params"]["main"]
  rules = optim.layer_decay(0.5, objective.image_encoder.layers("main"))
  factors = tree.first_match(shapes, rules, 1.0)
  assert {name: factors[name] for name in factors if "block" not in name} == {
    "encoder_norm/bias": 1.0,
    "encoder_norm/scale": 1.0,
    "head/logits/bias": 1.0,
    "head/logits/kernel": 1.0,
    "head/norm/bias": 1.0,
    "head/norm/scale": 1.0,
    "patch_embedding/bias": 0.125,
    "patch_embedding/kernel": 0.125,
    "position": 0.125,
  }
  assert factors["encoder/block_0/mlp/up/kernel"] == 0.25 and factors["encoder/block_1/mlp/up/kernel"] == 0.5


def test_converted_networks_describe_themselves():
  fields = {key: value for key, value in VIT.items() if key != "name"}
  assert storage.model_section({"network": "vit", "vit": fields}) == VIT
  classify(VIT).check_pretrained("encoder", {"network": "vit", "vit": fields})
  with pytest.raises(UserError, match="describes no model"):
    storage.model_section({"network": "mobilenet_v2"})


@pytest.mark.parametrize(
  ("encoder", "message"),
  [
    (tiny.stage("tokenizer")["objective"], "is 'tokenizer', which has no image encoder"),
    (dict(name="resnet"), "'resnet' does not exist"),
    (VIT | dict(drop_path=0.1), "has no key 'drop_path'"),
    (VIT | dict(attention="flash"), "config.objective.encoder: "),
  ],
)
def test_what_is_not_an_image_encoder(encoder, message):
  with pytest.raises(UserError, match=message):
    classify(encoder)
