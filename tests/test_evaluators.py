"""Evaluators on small prediction functions with known answers."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge

from maskgen import evaluators
from maskgen.errors import UserError
from maskgen.evaluators import (
  batches,
  comparison,
  generation,
  linear,
  plain_features,
  reconstruction,
  statistics_files,
)
from maskgen.images import to_float, to_rgb_on_devices
from maskgen.numerics import clusters

BATCH = 16
CLASSES = tuple("0123456789")


def make_context(predict, train, test, codebook_size=0, class_names=CLASSES, fresh=None, devices=8):
  """A context that serves (images, labels) pairs in padded batches, sharded over devices."""
  mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
  sharding = NamedSharding(mesh, PartitionSpec("data"))

  def serve(split):
    arrays = dict(zip(("image", "label"), {"train": train, "eval": test}[split], strict=True))
    size = len(arrays["image"])
    arrays["valid"] = np.ones(size, bool)
    for start in range(0, size, BATCH):
      part = {key: value[start : start + BATCH] for key, value in arrays.items()}
      missing = BATCH - len(part["valid"])
      # The padding repeats garbage, so that an evaluator that counts it gets a wrong number.
      yield {
        key: jax.device_put(
          np.concatenate([value, np.full((missing, *value.shape[1:]), key != "valid", value.dtype)]),
          sharding,
        )
        for key, value in part.items()
      }

  compiled = {name: jax.jit(fn) for name, fn in predict.items()}
  objective = tiny.FakeObjective(codebook_size)
  return evaluators.Context(objective, compiled, serve, fresh or (lambda seed, frozen: None), class_names)


def run(kind, context, variables=None, **options):
  evaluator = evaluators.build("it", {"type": kind, "every_steps": 1, **options}, context)
  return evaluator.run(variables, jax.random.key(0))


@pytest.fixture(scope="module")
def noise():
  """40 + 21 random images with labels: neither is a multiple of the batch."""
  rng = np.random.default_rng(0)

  def make(n):
    return rng.integers(0, 256, (n, 12, 12, 3), np.uint8), np.arange(n, dtype=np.int32) % 10

  return make(40), make(21)


@pytest.fixture(scope="module")
def digits():
  """Real digits, 8 x 8 pixels: 600 for training, 200 for the test."""
  data = load_digits()
  images = np.repeat((data.images[..., None] * 15).astype(np.uint8), 3, axis=-1)
  labels = data.target.astype(np.int32)
  return (images[:600], labels[:600]), (images[600:800], labels[600:800])


# Building


@pytest.mark.parametrize(
  ("section", "message"),
  [
    ({}, "needs the key 'type'"),
    ({"type": "prob"}, "did you mean 'probe'"),
    ({"type": "loss"}, "needs the prediction function 'loss'"),
    ({"type": "generation", "num_image": 5}, "did you mean 'num_images'"),
    ({"type": "generation", "features": "pixel"}, "did you mean 'pixels'"),
    ({"type": "generation", "classifier": "svm"}, "did you mean 'svc'"),
    ({"type": "generation", "classifier": "svc"}, "no labels"),
    ({"type": "generation", "schedule": "cosin"}, "did you mean 'cosine'"),
    ({"type": "generation", "num_images": 1}, "at least 2"),
    ({"type": "probe"}, "no labels"),
    ({"type": "samples", "masks": ("centre",)}, "did you mean 'center'"),
    ({"type": "samples", "num_examples": 0}, "at least 1"),
    ({"type": "reconstruction", "num_pictures": 0}, "at least 1"),
  ],
)
def test_wrong_options_are_user_errors_that_name_the_section(noise, section, message):
  predict = dict.fromkeys(("generate", "features", "reconstruct"), lambda v, b, r: b["image"])
  context = make_context(predict, *noise, class_names=None)
  with pytest.raises(UserError, match=message) as error:
    evaluators.build("it", section, context)
  assert "config.evals.it" in str(error.value)


def test_samples_need_something_to_show(noise):
  with pytest.raises(UserError, match="no prediction function that makes images"):
    run("samples", make_context({"loss": lambda v, b, r: {}}, *noise))


# Losses and reconstruction


def test_loss_is_the_mean_over_valid_examples(noise):
  predict = {"loss": lambda v, b, r: {"main": v * b["label"].astype(jnp.float32)}}
  report = run("loss", make_context(predict, *noise), jnp.float32(2.0))
  np.testing.assert_allclose(report.numbers["main"], 2.0 * noise[1][1].mean(), rtol=1e-6)
  assert type(report.numbers["main"]) is float


def test_loss_gives_each_batch_its_own_key(noise):
  predict = {"loss": lambda v, b, r: {"draw": jnp.full(b["label"].shape, jax.random.uniform(r))}}
  keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(2)]
  draws = [float(jax.random.uniform(key)) for key in keys]
  report = run("loss", make_context(predict, *noise))
  np.testing.assert_allclose(report.numbers["draw"], (16 * draws[0] + 5 * draws[1]) / 21, rtol=1e-5)


def test_perfect_reconstruction(noise):
  predict = {"reconstruct": lambda v, b, r: to_float(b["image"])}
  report = run("reconstruction", make_context(predict, *noise), num_pictures=20)
  assert report.numbers == {
    "psnr": 100.0,
    "ssim": pytest.approx(1.0),
    "l1": pytest.approx(0.0, abs=1e-6),
  }
  picture = report.pictures["reconstructions"]
  # Rows of images that are 6 times as large, after their names.
  assert picture.dtype == np.uint8 and picture.shape == (2 * 76, 128 + 16 * 74 + 2, 3)
  np.testing.assert_array_equal(picture[2:74, 128:], picture[78:150, 128:])  # originals over reconstructions
  assert (picture[:, :128] != picture[0, 0]).any()


def test_reconstruction_numbers_are_means_over_images(noise):
  predict = {"reconstruct": lambda v, b, r: to_float(b["image"]) + v}
  numbers = run("reconstruction", make_context(predict, *noise), jnp.float32(0.1)).numbers
  np.testing.assert_allclose(numbers["psnr"], 20.0, rtol=1e-4)
  np.testing.assert_allclose(numbers["l1"], 0.1, rtol=1e-4)
  assert 0.0 < numbers["ssim"] < 1.0


def test_codebook_numbers_count_only_valid_images(noise):
  predict = {
    "reconstruct": lambda v, b, r: to_float(b["image"]),
    # Code 7 occurs in the padding alone.
    "encode": lambda v, b, r: jnp.where(b["valid"][:, None], jnp.int32([[0, 1, 2, 3]]), 7),
  }
  numbers = run("reconstruction", make_context(predict, *noise, codebook_size=8)).numbers
  assert numbers["codebook_usage"] == 0.5
  assert numbers["perplexity"] == pytest.approx(4.0)


def test_perplexity_of_one_code_is_one():
  assert reconstruction.codebook_statistics(12 * (np.arange(8) == 2)) == {
    "codebook_usage": 0.125,
    "perplexity": 1.0,
  }


# Generation


def replay(images):
  """A generator that draws real images, by key."""

  def generate(variables, batch, rng, steps=1):
    pick = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(images)))(batch["key"])
    return to_float(jnp.asarray(images))[pick]

  return generate


def uniform(variables, batch, rng):
  return jax.vmap(lambda key: jax.random.uniform(key, (8, 8, 3)))(batch["key"])


def copy(variables, batch, rng):
  return to_float(batch["image"])


def test_generation_ranks_real_images_before_noise(digits):
  predict = {"generate": replay(digits[0][0]), "generate_uniform": uniform, "reconstruct": copy}
  context = make_context(predict, *digits)
  report = run("generation", context, num_images=200, classifier="svc", num_pictures=36)
  numbers = report.numbers
  assert numbers["frechet_pixels"] < 0.3 * numbers["frechet_pixels_uniform_codes"]
  assert 0.0 < numbers["frechet_pixels_floor"] < 0.3 * numbers["frechet_pixels_uniform_codes"]
  assert numbers["svc_top1"] > 0.9
  assert 0.03 < numbers["class_share_min"] < 0.1
  assert 2.1 < numbers["class_entropy"] < np.log(10)
  assert report.pictures["generated"].shape == (62, 62, 3)
  assert all(type(value) is float for value in numbers.values())
  # These reconstructions are perfect, and of no more images than are generated.
  assert numbers["frechet_pixels_reconstructions"] == pytest.approx(numbers["frechet_pixels_floor"], rel=1e-4)
  few = run("generation", make_context(predict, digits[0], [x[:70] for x in digits[1]])).numbers
  cut = run("generation", context, num_images=70).numbers
  assert cut["frechet_pixels_reconstructions"] == pytest.approx(few["frechet_pixels_floor"], rel=1e-4)
  assert cut["frechet_pixels_reconstructions"] > 1.01 * numbers["frechet_pixels_reconstructions"]


def test_generating_the_training_set_gives_distance_zero(digits):
  images = digits[0][0]
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(jnp.arange(600))
  known = jax.random.key_data(keys)

  def generate(variables, batch, rng):
    data = jax.random.key_data(batch["key"])
    index = jnp.argmax(jnp.all(data[:, None] == known[None], axis=-1), axis=1)
    return to_float(jnp.asarray(images))[index]

  context = make_context({"generate": generate}, *digits)
  numbers = run("generation", context, num_images=600, seed=5).numbers
  assert numbers["frechet_pixels"] < 1e-6
  assert "frechet_pixels_uniform_codes" not in numbers


def test_collapsed_generation_shows_in_the_class_numbers(digits):
  predict = {"generate": replay(digits[0][0][:1]), "generate_uniform": uniform}
  numbers = run("generation", make_context(predict, *digits), num_images=20, classifier="svc").numbers
  assert numbers["class_share_min"] == 0.0 and numbers["class_entropy"] == 0.0
  assert "frechet_pixels_uniform_codes" in numbers and "frechet_pixels_reconstructions" not in numbers


def test_what_does_not_depend_on_the_variables_is_computed_once(digits):
  plain = make_context({"generate": replay(digits[0][0])}, *digits)
  passes = []

  def counted(split):
    passes.append(split)
    return plain.batches(split)

  context = dataclasses.replace(plain, batches=counted)
  evaluator = evaluators.build(
    "it", {"type": "generation", "num_images": 20, "classifier": "svc", "steps": 2}, context
  )
  first = evaluator.run(None, jax.random.key(0))
  count = len(passes)
  assert evaluator.run(None, jax.random.key(1)).numbers == first.numbers
  assert len(passes) == count


# Inception-v3 is replaced by a projection: these rules depend on its protocol only.


@pytest.fixture
def inception(monkeypatch):
  mix = np.random.default_rng(0).normal(size=(8 * 8 * 3, 6))

  def extract(images):
    rows = np.asarray(to_rgb_on_devices(images), np.float64).reshape(len(images), -1) @ mix / 100
    return {"pooled": rows, "spatial": rows[:, :5], "logits": rows}

  network = comparison.Network("inception_v3", "adm", "weights", extract)
  monkeypatch.setattr(comparison, "open_network", lambda *spec: network)
  for module in (comparison, generation):
    monkeypatch.setattr(module, "FEATURES", 6)
  return network


def test_generation_has_fid_under_the_name_of_its_protocol(digits, inception, tmp_path):
  metrics = ("fid", "sfid", "is", "precision")
  context = make_context({"generate": replay(digits[0][0]), "generate_uniform": uniform}, *digits)
  context = dataclasses.replace(context, num_train=600)
  numbers = run("generation", context, features="inception_v3", num_images=50, metrics=metrics).numbers
  where = "50/adm/train/unconditional"
  names = {f"fid{where}", f"sfid{where}", f"precision{where}", "is50/adm/unconditional"}
  assert numbers.keys() == names
  real = comparison.collect("real", [inception.extract(jnp.asarray(digits[0][0]))], {"pooled_moments"})
  manifest = statistics_files.Manifest(
    "inception_v3", "adm", "weights", 600, (8, 8), "digits", "train", "decode", "", "", {}
  )
  path = str(tmp_path / "digits.npz")
  statistics_files.write(path, real, manifest)
  options = dict(features="inception_v3", num_images=50, reference=path)
  against = run("generation", context, **options).numbers
  np.testing.assert_allclose(against["fid50/adm/digits/unconditional"], numbers[f"fid{where}"], rtol=1e-6)
  for changes, options_too, message in (
    (dict(weights="others"), {}, "another weights of the network"),
    (dict(size=(16, 16)), {}, "another size of pictures"),
    (dict(protocol="clean"), {}, "another protocol"),
    (dict(count=5), {}, "FID on 6 features needs at least 6 pictures in .*digits.npz, but there are 5"),
    ({}, dict(metrics=("recall",)), "metric 'recall' needs what .*digits.npz does not have"),
    ({}, dict(num_images=5), "FID on 6 features needs at least 6 pictures in num_images"),
    ({}, dict(reference="nowhere.npz"), "reference nowhere.npz is not a file of statistics"),
    ({}, dict(metrics=("fids",)), "metric 'fids' does not exist; did you mean 'fid'"),
  ):
    statistics_files.write(path, real, dataclasses.replace(manifest, **changes))
    with pytest.raises(UserError, match=message):
      evaluators.build("it", {"type": "generation", **options, **options_too}, context)


def test_weights_of_inception_are_missing_before_a_run(digits):
  context = make_context({"generate": replay(digits[0][0])}, *digits)
  for options, message in (
    (dict(features="inception_v3:nowhere"), "the weights nowhere of inception_v3 do not exist"),
    (
      dict(features="inception_v3", protocol="clear"),
      "protocol 'clear' does not exist; did you mean 'clean'",
    ),
    (dict(protocol="adm"), "protocol 'adm' is for inception_v3, not for pixels"),
    (dict(metrics=("sfid",)), "metric 'sfid' needs Inception-v3"),
    (dict(metrics=("kid",)), "KID needs at least 1,000 pictures in num_images"),
  ):
    with pytest.raises(UserError, match=message):
      evaluators.build("it", {"type": "generation", "num_images": 50, **options}, context)


def test_keys_depend_on_the_seed_and_the_image_alone(noise):
  like = batches.first_batch(make_context({}, *noise))
  keys = jax.random.key_data(batches.make_keys(like, seed=3))
  later = jax.random.key_data(batches.make_keys(like, seed=3, start=10))
  np.testing.assert_array_equal(keys[10:], later[:6])
  assert not np.array_equal(keys, jax.random.key_data(batches.make_keys(like, seed=4)))
  assert batches.make_keys(like, seed=3).sharding.is_equivalent_to(like["valid"].sharding, 1)


# Probe


def scale(factor):
  """Variables with a single number as parameters."""
  return {"params": jnp.float32(factor), "frozen": {}, "extra": {}}


def test_ridge_equals_scikit_learn():
  rng = np.random.default_rng(0)
  for shape in ((30, 5), (5, 30)):  # both of its systems
    features, targets = rng.normal(2.0, 1.0, shape), rng.normal(size=(shape[0], 3))
    weights, bias = linear.ridge(features, targets, penalty=0.7)
    reference = Ridge(alpha=0.7).fit(features, targets)
    np.testing.assert_allclose(weights, reference.coef_.T, atol=1e-9)
    np.testing.assert_allclose(bias, reference.intercept_, atol=1e-9)


def test_draws_are_balanced_and_differ_by_seed():
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), (5, 6, 20, 30)))
  draw = linear.balanced_draw(labels, shots=5, classes=4, seed=0)
  assert len(set(draw)) == 20
  np.testing.assert_array_equal(np.bincount(labels[draw]), [5, 5, 5, 5])
  assert set(draw) != set(linear.balanced_draw(labels, shots=5, classes=4, seed=1))


def test_separable_features_are_perfect_and_noise_is_chance(digits):
  def features(variables, batch, rng):
    signal = jax.nn.one_hot(batch["label"], 10) * variables["params"]
    pixel_noise = jax.random.normal(jax.random.key(1), (BATCH, 2))
    return jnp.concatenate([signal, pixel_noise], axis=1)

  context = make_context({"features": features}, *digits, fresh=lambda seed, frozen: scale(0.0))
  numbers = run("probe", context, scale(20.0)).numbers
  for name in ("top1", "top1_ridge", "top1_knn", "top1_5shot", "top1_10shot"):
    assert numbers[name] == 1.0, name
  assert numbers["top1_10shot_std"] == 0.0
  assert numbers["top1_random_encoder"] < 0.25
  assert 0.85 < numbers["top1_pixels"] < 1.0
  assert "top1_token_onehot" not in numbers


def test_probe_baselines_run_once_and_can_be_left_out(digits):
  fresh_seeds = []
  predict = {
    "features": lambda v, b, r: to_float(b["image"]).reshape(BATCH, -1) * v["params"],
    "encode": lambda v, b, r: (b["image"][:, ::2, ::2, 0] // 64).reshape(BATCH, -1).astype(jnp.int32),
  }

  def fresh(seed, frozen):
    fresh_seeds.append(seed)
    return scale(1.0)

  context = make_context(predict, *digits, codebook_size=4, fresh=fresh)
  section = {"type": "probe", "shots": (1,), "draws": 2, "random_encoders": 2}
  evaluator = evaluators.build("it", section, context)
  first = evaluator.run(scale(1.0), jax.random.key(0)).numbers
  assert evaluator.run(scale(1.0), jax.random.key(0)).numbers == first
  assert fresh_seeds == [0, 1]
  assert first["top1"] == first["top1_pixels"] == first["top1_random_encoder"]
  assert 0.5 < first["top1_token_onehot"] < 1.0
  assert all(type(value) is float for value in first.values())
  capped = run("probe", context, scale(1.0), shots=(), random_encoders=1, baseline_width=40).numbers
  assert 0.6 < capped["top1_pixels"] < first["top1_pixels"]  # 6 x 6 pixels of 8 x 8
  assert 0.5 < capped["top1_token_onehot"] != first["top1_token_onehot"]  # 40 features of 64
  numbers = run("probe", context, scale(1.0), shots=(1,), baselines=False).numbers
  measured = {"top1", "top1_ridge", "top1_knn", "top1_1shot", "top1_1shot_std"}
  assert set(numbers) == measured

  def code_vectors(variables, batch, rng):
    return jnp.eye(4)[predict["encode"](variables, batch, rng)]

  predict["code_vectors"] = code_vectors
  named = ("patch_clusters", "token_histogram", "code_vectors")
  context = make_context(predict, *digits, codebook_size=4)
  numbers = run("probe", context, scale(1.0), shots=(), baselines=named).numbers
  assert numbers["top1_code_vectors"] == first["top1_token_onehot"]  # vectors that are one-hot
  assert 0.8 < numbers["top1_patch_clusters"] < 1.0
  assert 0.1 < numbers["top1_token_histogram"] < 0.3  # of four codes
  context = make_context(predict, *digits)  # without a codebook
  numbers = run("probe", context, scale(1.0), shots=(1,), baselines=named[1:]).numbers
  assert set(numbers) == measured


def test_baselines_are_reduced_only_where_they_are_too_wide(noise):
  images = jnp.asarray(noise[0][0])
  flat = to_float(images).reshape(len(images), -1)
  np.testing.assert_array_equal(plain_features.pooled_pixels(images, 432), flat)
  small = to_float(images).reshape(-1, 4, 3, 4, 3, 3).mean(axis=(2, 4))
  pooled = plain_features.pooled_pixels(images, 60)  # 4 x 4 of 3 channels are 48
  np.testing.assert_allclose(pooled, small.reshape(len(images), -1), atol=1e-6)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (200, 64)))
  onehot = plain_features.hashed_onehot(tokens, 50, 3200)
  np.testing.assert_array_equal(onehot, jax.nn.one_hot(tokens, 50).reshape(200, -1))
  hashed = np.asarray(plain_features.hashed_onehot(tokens, 50, 1000))
  assert hashed.shape == (200, 1000)
  exact, about = np.asarray(onehot @ onehot.T), hashed @ hashed.T
  assert abs(about - exact).mean() < 3 and abs((about - exact).mean()) < 0.1
  np.testing.assert_array_equal(plain_features.hashed(onehot, 1000), hashed)
  counts = [np.bincount(row, minlength=50) for row in tokens]
  np.testing.assert_array_equal(plain_features.token_histogram(tokens, 50, 50), counts)


def test_patch_features_equal_loops_and_see_no_brightness_and_contrast(noise):
  images = jnp.asarray(noise[0][0])
  state = plain_features.patch_clusters(images, 432)
  found = np.asarray(plain_features.patch_features(state, images[:2], 432))
  centroids, side = np.asarray(clusters.centroids(state)), 6
  assert found.shape == (2, 4 * len(centroids)) == (2, 432)
  for image, features in zip(to_float(images[:2]), found, strict=True):
    expected = np.zeros((4, 108))
    for row, column in itertools.product(range(4), repeat=2):
      patch = image[2 * row : 2 * row + side, 2 * column : 2 * column + side]
      patch = np.moveaxis(np.asarray(patch), -1, 0).reshape(-1)  # channels vary slowest
      patch = (patch - patch.mean()) / np.sqrt(patch.var() + 10 / 255**2)
      white = np.asarray(clusters.whiten(state, patch[None]))[0]
      distances = np.linalg.norm(white - centroids, axis=1)
      expected[row // 2 * 2 + column // 2] += np.maximum(distances.mean() - distances, 0)
    np.testing.assert_allclose(features.reshape(4, 108), expected, atol=1e-3)
  faint = to_float(images[:2]) * 0.9 + 0.05
  np.testing.assert_allclose(plain_features.patch_features(state, faint, 432), found, atol=1e-2)


def test_clusters_of_many_pictures_take_no_memory_for_their_floats():
  images = jax.ShapeDtypeStruct((512, 96, 96, 3), jnp.uint8)
  memory = plain_features.patch_clusters.lower(images, 432).compile().memory_analysis()
  assert memory.temp_size_in_bytes < images.size


def test_a_probe_of_some_training_images_is_one_of_less_data(digits):
  train, test = digits
  number = 2 * BATCH + 3  # no whole number of batches
  predict = {"features": lambda v, b, r: to_float(b["image"]).reshape(BATCH, -1)}
  options = dict(shots=(1,), baselines=False)
  some = run("probe", make_context(predict, *digits), scale(1.0), num_images=number, **options)
  less = make_context(predict, (train[0][:number], train[1][:number]), test)
  assert some.numbers == run("probe", less, scale(1.0), **options).numbers
  with pytest.raises(UserError, match="num_images, shots, draws and random_encoders must be at least 1"):
    run("probe", less, scale(1.0), num_images=0)


def test_shots_that_a_class_does_not_have_are_left_out(digits):
  train, test = digits
  rare = np.concatenate([np.flatnonzero(train[1] != 3), np.flatnonzero(train[1] == 3)[:4]])
  predict = {"features": lambda v, b, r: to_float(b["image"]).reshape(BATCH, -1)}
  context = make_context(predict, (train[0][rare], train[1][rare]), test)
  numbers = run("probe", context, scale(1.0), shots=(1, 4, 5), baselines=False).numbers
  assert {name for name in numbers if name.endswith("shot")} == {"top1_1shot", "top1_4shot"}


# Pictures


def fill_with_grey(variables, batch, rng):
  return jnp.where(batch["mask"][..., None], 0.5, to_float(batch["image"]))


def test_samples_show_what_the_objective_can_do(noise):
  predict = {"inpaint": fill_with_grey, "generate": uniform}
  report = run("samples", make_context(predict, *noise), num_generated=20, num_examples=4)
  assert set(report.pictures) == {"generated", "inpainted"} and not report.numbers
  assert report.pictures["generated"].shape == (4 * 10 + 2, 5 * 10 + 2, 3)
  picture = report.pictures["inpainted"]
  assert picture.shape == (3 * 3 * 76, 128 + 4 * 74 + 2, 3)
  original, holed, filled = (picture[top : top + 72 : 6, 130:202:6] for top in (2, 78, 154))
  hole = np.all(holed == (255, 0, 255), axis=-1)
  assert hole[3:9, 3:9].all() and hole.sum() == 36
  np.testing.assert_array_equal(original, noise[1][0][0])
  np.testing.assert_array_equal(original[~hole], filled[~hole])
  assert (filled[hole] == 128).all()


def test_one_channel_images_show_the_hole_in_colour(noise):
  grey = tuple((images[..., :1], labels) for images, labels in noise)
  context = make_context({"inpaint": fill_with_grey}, *grey)
  picture = run("samples", context, masks=("right",)).pictures["inpainted"]
  assert np.all(picture == (255, 0, 255), axis=-1).sum() == 16 * 12 * 6 * 6**2
