"""LEASE: the reference's numbers from its weights, and the clusters that it is taught by."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heirs_reference import assert_gradients, from_reference, read, to_reference
from safetensors.numpy import save_file

import maskgen
from maskgen import objectives, storage
from maskgen.errors import UserError
from maskgen.importers import vqgan_pytorch
from maskgen.models.mage import Prediction
from maskgen.models.vqgan import VQGAN
from maskgen.numerics import clusters
from maskgen.numerics.positions import sines
from maskgen.tools import convert

NETWORK = dict(
  channels=8, multipliers=(1, 1), strides=(4,), blocks=1, norm_groups=2, codebook_size=40, code_width=4
)
TEACHER = dict(name="vit", image_size=(32, 32), patch=4, width=20, depth=1, heads=2)
# The sizes and options of the golden file.
SECTION = dict(
  name="lease",
  image_size=(32, 32),
  tokenizer=NETWORK,
  class_ids=3,
  null_class=2,
  width=32,
  depth=2,
  heads=4,
  decoder_width=24,
  decoder_depth=2,
  decoder_heads=4,
  teacher=TEACHER,
  clusters=50,
  fixed_positions=True,
  add_visible=True,
)

OPTIONS = ("fixed_positions", "add_visible")


def test_loss_and_gradients_are_those_of_the_reference():
  golden, objective = read("lease"), objectives.build(SECTION)
  rename = functools.partial(
    to_reference,
    depths={"encoder": 2, "decoder": 2},
    layers={"projection": "proj_to_dino.0"},
    rows=golden["weights/decoder_pos_embed_learned"].shape[1],
  )
  shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())["params"]["main"]
  params = from_reference(golden, shapes, rename)
  tokens, kept = (golden[name].astype(np.int32) for name in ("vq_idx", "keep_idx_sorted"))
  mask, ids = golden["masked"], golden["dino_idx"].astype(np.int32)
  centroids = jnp.asarray(golden["weights/dino_codebook"])

  def loss(params):
    params = {"main": params}
    latents = objective.latents(params, {}, tokens, mask, kept)
    logits = objective.logits(params, {}, {}, latents, mask, kept)
    found = Prediction(tokens, mask, kept, latents, logits)
    reconstructive = objective.scores(params, {}, {}, found)["loss"].mean()
    contrastive = objective.contrast(params, centroids, ids, found)[0].mean()
    return reconstructive + objective.contrastive_weight * contrastive, (reconstructive, contrastive)

  (total, parts), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  expected = [golden[f"loss{name}"] for name in ("", "_reconstruction", "_info_nce_unweighted")]
  np.testing.assert_allclose([total, *parts], expected, rtol=1e-6)
  left = assert_gradients(golden, rename(gradients))
  assert left == {str(name) for name in golden["grad_names"][~golden["grad_reached"]]} | {
    "dec_to_dino.weight"
  }


def test_cached_decoding_sees_what_the_network_sees():
  """Also with fixed positions and with visible tokens that are added."""
  model = objectives.build(SECTION | dict(depth=1, decoder_depth=1)).model

  @jax.jit
  def both(key):
    tokens, mask = jax.random.randint(key, (2, 64), 0, 40), jax.random.bernoulli(key, 0.5, (2, 64))
    variables = model.init(key, tokens, mask)
    run = functools.partial(model.apply, method="code_logits")
    first, cache = run(variables, tokens, mask, mutable=["cache"])
    every = jnp.tile(jnp.arange(64), (2, 1))
    return first, run(variables | cache, tokens, mask, every, cached=True)

  first, again = both(jax.random.key(0))
  np.testing.assert_allclose(again, first, atol=1e-5)


def features(rng, count=600, width=6, groups=4):
  """Points around centres with a large common offset and directions of unequal variance; and their groups."""
  scales = np.geomspace(1.0, 100.0, width)
  centres = np.random.default_rng(0).normal(size=(groups, width)) * 3.0
  labels = rng.integers(0, groups, count)
  points = (centres[labels] + 0.3 * rng.normal(size=(count, width))) * scales + 1000.0
  return points.astype(np.float32), labels


def test_clusters_find_the_groups_of_features():
  state, rng = clusters.init(12, 6), np.random.default_rng(1)
  update, means = jax.jit(clusters.update), []
  for number in range(60):
    points, labels = features(rng)
    ids, state = update(state, points, jax.random.key(number))
    means.append(points.mean(axis=0))
    if number < 3:  # the first batches count alike
      np.testing.assert_allclose(state["mean"], np.mean(means, axis=0), rtol=1e-5)
  table = np.zeros((12, 4))
  np.add.at(table, (np.asarray(ids), labels), 1)
  assert table.max(axis=1).sum() / table.sum() > 0.99  # each cluster belongs to one group
  white = clusters.whiten(state, points)
  np.testing.assert_allclose(np.linalg.norm(white, axis=-1), 1.0, rtol=1e-4)
  assert np.abs(white.mean(axis=0)).max() < 0.1
  assert 4 < clusters.perplexity(state) <= 12
  np.testing.assert_allclose(np.linalg.norm(clusters.centroids(state), axis=-1), 1.0, rtol=1e-4)


def test_a_dead_cluster_starts_again_at_a_feature():
  points, _ = features(np.random.default_rng(2))
  update = jax.jit(clusters.update)
  _, state = update(clusters.init(3, 6), points, jax.random.key(0))
  _, state = update(state, points, jax.random.key(1))
  state["batches"] = jnp.int32(1000)
  state["shares"] = state["shares"].at[1].set(0.0)
  state["sums"] = state["sums"].at[1].set(-1e-6 * clusters.centroids(state)[0])
  _, after = update(state, points, jax.random.key(2))
  np.testing.assert_allclose(after["shares"][1], 1 / 3)
  nearest = (clusters.whiten(after, points) @ clusters.centroids(after)[1]).max()
  assert nearest == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (dict(teacher=TEACHER | dict(patch=8)), "4 x 4 patches and the tokenizer 8 x 8 tokens"),
    (dict(teacher=TEACHER | dict(mean=(0.5,), std=(0.5,))), "reads 1 channel and the tokenizer 3"),
    (dict(clusters=4), "neighbours=5 of 4 clusters"),
    (dict(temperature=0.0), "temperature is 0"),
    (dict(width=34, heads=2), "fixed positions need a multiple of 4"),
    (dict(teacher=dict(name="tokenizer", image_size=(32, 32))), "no image encoder"),
  ],
)
def test_wrong_settings(change, words):
  with pytest.raises(UserError, match=words):
    objectives.build(SECTION | change)


def test_without_a_teacher_the_moving_average_teaches():
  objective = objectives.build({**SECTION, "teacher": {}, "contrastive_weight": 1.0, "depth": 1})
  assert objective.averages == ("main",) and objective.batch_spec().num_tokens == 64
  tokens = jax.random.randint(jax.random.key(0), (4, 64), 0, 40)
  batch = {"tokens": tokens, "key": jax.random.split(jax.random.key(1), 4)}

  shapes = objective.pretrained_shapes()
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  parts = jax.jit(objective.init)(jax.random.key(2), zeros)
  params = parts["params"]

  @jax.jit
  def step(state, average):
    frozen = {"average": {"main": average}}
    return objective.losses(params, frozen, state, batch, jax.random.key(3), jnp.int32(0), train=True)

  other = jax.tree.map(lambda leaf: leaf[..., ::-1], params["main"])
  (first, _, state) = step(parts["extra"], params["main"])
  losses = [
    step(known, average)[0]["main"]
    for known in (parts["extra"], state)
    for average in (params["main"], other)
  ]
  assert losses[0] == losses[1] == first["main"]  # before the first batch there are no clusters
  assert losses[2] != losses[3]


def test_exports_leave_out_the_teacher(tmp_path):
  section = SECTION | dict(depth=1, decoder_depth=1)
  objective = objectives.build(section)
  shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())
  rng = np.random.default_rng(0)
  whole = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
  storage.write_export(tmp_path / "whole", {"objective": section}, whole)
  models = [maskgen.load(tmp_path / "whole")]
  models[0].save(tmp_path / "export")
  models.append(maskgen.load(tmp_path / "export"))
  image = np.zeros((1, 32, 32, 3), np.uint8)
  for model in models:
    assert model.variables["frozen"].keys() == {"tokenizer"}
    jax.eval_shape(
      objective.predict_fns()["loss"],
      model.variables,
      {"image": image, "key": jax.random.split(jax.random.key(0), 1)},
      jax.random.key(0),
    )
  np.testing.assert_array_equal(*(model.features(image) for model in models))


def test_a_conditional_model_refuses_another_network():
  sizes = {name: value for name, value in SECTION.items() if name not in ("teacher", "clusters", *OPTIONS)}
  conditional = objectives.build(sizes | dict(name="mage_conditional", classes=3, condition_width=8))
  plain = SECTION | dict.fromkeys(OPTIONS, False)
  conditional.check_pretrained("mage", {"objective": plain})
  for option in OPTIONS:
    with pytest.raises(UserError, match=f"its objective has {option}=True, config.objective has False"):
      conditional.check_pretrained("mage", {"objective": plain | {option: True}})


def write_tokenizer(path, codes):
  network = VQGAN(**{**NETWORK, "channels": 32, "norm_groups": 32, "strides": (2,), "codebook_size": codes})
  shapes = vqgan_pytorch.shapes(network.clone(shortcut="reference"))
  params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, np.float32), shapes)
  tensors = vqgan_pytorch.to_reference(params, network)
  save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)


@pytest.mark.parametrize("name", ["lease", "sorcen"])
def test_checkpoints_of_the_reference_are_converted(tmp_path, name):
  """Its loss of masked tokens, by a model of the `mage` objective."""
  golden, is_lease = read(name), name == "lease"
  weights = {key.removeprefix("weights/"): value for key, value in golden.items() if "weights/" in key}
  weights["classifier.0.bias"] = np.ones(3, np.float32)
  if is_lease:
    weights["pos2d"] = sines((8, 8), 32)[None]
  file, codes, out = tmp_path / "weights.safetensors", tmp_path / "codes.safetensors", tmp_path / "out"
  save_file(weights, file)
  flags = ["--format=lease", f"--weights={file}", f"--out={out}", "--encoder_heads=4", "--decoder_heads=4"]
  with pytest.raises(UserError, match="has no tokenizer: give the file of MAGE's tokenizer as --tokenizer"):
    convert.main(flags)
  write_tokenizer(codes, 2048)
  with pytest.raises(UserError, match="token ids, which do not fit the 2048 codes of the tokenizer"):
    convert.main([*flags, f"--tokenizer={codes}"])
  write_tokenizer(codes, 40 if is_lease else 1024)
  convert.main([*flags, f"--tokenizer={codes}"])
  model = maskgen.load(out)
  objective, params = model.objective, model.variables["params"]
  assert (objective.fixed_positions, objective.add_visible) == (is_lease, is_lease)
  tokens = golden["vq_idx"].astype(np.int32)
  if is_lease:
    mask, kept = golden["masked"], golden["keep_idx_sorted"].astype(np.int32)
  else:
    mask = golden["all_mask"][:, 1:].astype(bool)
    kept = np.sort(golden["noise"].argsort(axis=1)[:, 32:], axis=1).astype(np.int32)

  @jax.jit
  def loss(params):
    latents = objective.latents(params, {}, tokens, mask, kept)
    logits = objective.logits(params, {}, {}, latents, mask, kept)
    found = Prediction(tokens, mask, kept, latents, logits)
    return objective.scores(params, {}, {}, found)["loss"].mean()

  expected = golden["loss_reconstruction" if is_lease else "loss_reconstruction_only"]
  np.testing.assert_allclose(loss(params), expected, rtol=1e-5)
