"""Evaluation of anyone's pictures, and reference statistics, from the command line."""

import dataclasses
import json
import logging
import runpy

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import maskgen
from maskgen import objectives, storage
from maskgen.errors import UserError
from maskgen.evaluators import comparison, frechet, paired, picture_sets, statistics_files
from maskgen.evaluators.feature_spaces import pixels
from maskgen.importers import lpips as lpips_files
from maskgen.models import lpips
from maskgen.tools import evaluate, feature_flags, reference_stats

RNG = np.random.default_rng(0)
SIDE, WIDTH = 16, 192  # of pictures; of the features of the space "pixels"
GENERATED, REAL = (RNG.integers(high, size=(60, SIDE, SIDE, 3), dtype=np.uint8) for high in (200, 256))
PREPROCESS = "decode|center_crop(16)"
METRICS = "fid,precision,recall,density,coverage"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """The same generated pictures as folder and as npz; real ones as npz, folder and statistics."""
  folder = tmp_path_factory.mktemp("data")
  for name, images in (("generated", GENERATED), ("real", REAL)):
    np.savez(folder / f"{name}.npz", arr_0=images)
    for i, image in enumerate(images):
      path = folder / name / ("cats" if i < 30 else "dogs") / f"{i:03}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(image).save(path)
  reference_stats.main(
    [
      f"--source=folder:{folder}/real",
      "--split=test",
      "--features=pixels",
      f"--out={folder}/tenth.npz",
      f"--preprocess={PREPROCESS}",
    ]
  )
  return folder


def run(data, generated, reference, *flags):
  out = data / "out.json"
  command = (f"--generated={data / generated}", f"--reference={data / reference}", f"--json={out}", *flags)
  evaluate.main(["--features=pixels", "--batch_size=24", *command])
  return json.loads(out.read_text())


def test_folders_and_npz_files_give_the_same_numbers(data, capsys):
  found = [
    run(data, f"generated{kind}", f"real{kind}", f"--metrics={METRICS}")["metrics"] for kind in ("", ".npz")
  ]
  assert found[0].keys() == {"frechet_pixels", *(f"{m}_pixels" for m in METRICS.split(",")[1:])}
  assert found[0] == found[1]
  assert f"frechet_pixels = {found[0]['frechet_pixels']:.7g}" in capsys.readouterr().out
  a, b = (frechet.fit([np.asarray(pixels(images))]) for images in (GENERATED, REAL))
  np.testing.assert_allclose(found[0]["frechet_pixels"], frechet.distance(a, b), rtol=1e-6)


def test_device_memory_does_not_grow_with_the_number_of_pictures():
  network = comparison.open_network("pixels")

  def peak(count):
    sizes = []
    batches = (np.zeros((24, SIDE, SIDE, 3), np.uint8) for _ in range(count // 24))
    for _ in feature_flags.stream(network, batches, count, 24, "pictures"):
      sizes.append(sum(array.nbytes for array in jax.live_arrays()))
    return max(sizes)

  few, many = peak(24), peak(240)  # in this order: what an earlier test left may only go away
  assert many <= few


def test_what_moves_a_distance(data, repository, capsys):
  """The script of docs/distances.md."""
  script = runpy.run_path(str(repository / "docs" / "distances.py"))
  script["main"]([f"--pictures={data}/real", "--features=pixels", "--batch_size=24"])
  rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
  assert [row[0] for row in rows[:3]] == [
    "none: 30 pictures each",
    "18 pictures of A, classes in equal shares",
    "18 pictures of A, classes in shares 1 to 2",
  ]
  moved = {row[0]: float(row[2]) for row in rows if len(row) > 2}
  assert 0 < moved["B as JPEG of quality 95"] < moved["B as JPEG of quality 75"]
  assert 0 < moved["A halved by lanczos, B by bicubic"] < moved["A halved by lanczos, B by nearest"]


def test_statistics_of_a_data_set_replace_its_pictures(data, caplog):
  manifest = statistics_files.read(str(data / "tenth.npz"))[1]
  assert (manifest.network, manifest.count, tuple(manifest.size)) == ("pixels", 6, (SIDE, SIDE))
  with caplog.at_level(logging.WARNING, "maskgen"):
    found = run(data, "generated", "tenth.npz", "--metrics=fid")
  assert (
    "tenth has 6 pictures for 192 features, n/d = 0.03" in caplog.text and "no manifest" not in caplog.text
  )
  assert found["reference"]["manifest"]["preprocess"] == PREPROCESS
  again = data / "again.npz"
  reference_stats.main(
    [
      f"--source=folder:{data}/real",
      "--split=test",
      "--features=pixels",
      f"--out={again}",
      f"--preprocess={PREPROCESS}",
    ]
  )
  assert again.read_bytes() == (data / "tenth.npz").read_bytes()


def test_adms_files_have_pictures_and_statistics(data):
  moments = frechet.fit([np.asarray(pixels(REAL))])
  path = data / "both.npz"
  np.savez(path, arr_0=REAL[:30], mu=moments.mean, sigma=moments.covariance)
  made = run(data, "generated.npz", "both.npz", "--metrics=fid,recall")
  # Nothing says of how many pictures the statistics are.
  assert made["samples_per_dimension"]["reference"] is None and made["reference"]["pictures"] == 30
  found = made["metrics"]
  expected = run(data, "generated.npz", "real.npz", "--metrics=fid")["metrics"]
  np.testing.assert_allclose(found["frechet_pixels"], expected["frechet_pixels"], rtol=1e-6)
  with np.load(path) as archive:
    np.savez(data / "statistics.npz", mu=archive["mu"], sigma=archive["sigma"])
  with pytest.raises(UserError, match="'recall' needs the pictures of the reference, but statistics has"):
    run(data, "generated.npz", "statistics.npz", "--metrics=recall")


def refused(data, message, generated="generated.npz", reference="real.npz", *flags):
  with pytest.raises(UserError, match=message):
    run(data, generated, reference, *flags)


def test_bad_pictures_are_one_sentence(data, tmp_path):
  refused(data, "KID needs at least 1,000 pictures in .*, but there are 60", "real.npz")
  refused(data, "'nowhere' does not exist|does not exist: give a folder", "nowhere")
  np.savez(data / "other.npz", images=REAL)
  refused(data, r"has no array 'arr_0' \(it has images\): save images uint8", "other.npz")
  np.savez(data / "floats.npz", arr_0=REAL / 255)
  refused(data, r"'arr_0' is float64\[60, 16, 16, 3\]: save images uint8", "floats.npz")
  (data / "cut.npz").write_bytes((data / "real.npz").read_bytes()[:-200])
  refused(data, "is not an intact npz file", "cut.npz")
  np.savez(data / "larger.npz", arr_0=np.repeat(REAL, 2, axis=1))
  refused(data, r"have \(32, 16\) .* but those of .* have \(16, 16\)", "larger.npz")
  (data / "text.txt").write_text("no pictures")
  refused(data, "is neither a folder nor an npz file", "text.txt")
  folder = tmp_path / "pictures"
  folder.mkdir()
  refused(data, "has no pictures", folder)
  for i in range(3):
    Image.fromarray(REAL[i]).save(folder / f"{i}.png")
  Image.fromarray(REAL[0, :8]).save(folder / "3.png")
  refused(data, "3.png has 16 x 8 pixels, but .*0.png has 16 x 16", folder)
  (folder / "3.png").write_bytes((folder / "2.png").read_bytes()[:300])
  refused(data, "3.png cannot be read as a picture", folder, "real.npz", "--metrics=fid")


def test_other_statistics_are_one_sentence(data):
  statistics, manifest = statistics_files.read(str(data / "tenth.npz"))
  for changes, message in (
    (dict(network="mobilenet_v2"), "another network .mobilenet_v2 instead of pixels"),
    (dict(weights="1234"), "another weights of the network"),
    (dict(size=(32, 32)), "another size of pictures"),
  ):
    statistics_files.write(str(data / "wrong.npz"), statistics, dataclasses.replace(manifest, **changes))
    refused(data, message, "generated.npz", "wrong.npz", "--metrics=fid")
  np.savez(data / "wrong.npz", mu=np.zeros(2048), sigma=np.eye(2048))
  refused(data, "statistics of 2,048 features, but pixels has 192", "generated.npz", "wrong.npz")
  for mu, sigma in ((np.zeros(192), np.eye(3)), (np.zeros(()), np.zeros(())), (np.array(["a"]), np.eye(1))):
    np.savez(data / "wrong.npz", mu=mu, sigma=sigma)
    refused(data, "'sigma' does not fit 'mu'", "generated.npz", "wrong.npz")


def test_wrong_flags_are_one_sentence(data):
  for flag, message in (
    ("--metrics=fidd", "metric 'fidd' does not exist; did you mean 'fid'"),
    ("--metrics=sfid", "'sfid' needs Inception-v3"),
    ("--labels=balance", "--labels=balance does not exist; did you mean 'balanced'"),
    ("--protocol=adm", "protocol 'adm' is for inception_v3, not for pixels"),
    ("--features=pixel", "did you mean 'pixels'"),
    (f"--weights={data}/real.npz", "'pixels' has no weights: leave .*real.npz out"),
    ("--json=out.txt", "give the name of a .json file"),
  ):
    refused(data, message, "generated.npz", "real.npz", flag)
  with pytest.raises(UserError, match="protocol 'clear' does not exist; did you mean 'clean'"):
    evaluate.main([f"--generated={data}", f"--reference={data}", "--protocol=clear"])


def test_damaged_records_are_not_replaced_in_statistics(data, tmp_path):
  folder = tmp_path / "train"
  folder.mkdir()
  for i in range(20):
    Image.fromarray(REAL[i]).save(folder / f"{i:02}.png")
  (folder / "07.png").write_bytes(b"\x89PNG\r\n\x1a\n")
  flags = (
    f"--source=folder:{folder}",
    "--features=pixels",
    f"--out={tmp_path}/out.npz",
    f"--preprocess={PREPROCESS}",
  )
  with pytest.raises(UserError, match=r"07\.png is damaged: replace or remove it"):
    for split in ("train", "test"):
      reference_stats.main([*flags, f"--split={split}"])


# Inception-v3 is replaced by a projection: these rules depend on its name only.


def small_network(protocol):
  mix = RNG.normal(size=(SIDE * SIDE * 3, 6))

  def extract(images):
    rows = np.asarray(images, np.float64).reshape(len(images), -1) @ mix / 100
    return {"pooled": rows, "spatial": rows[:, :5], "logits": rows}

  return comparison.Network("inception_v3", protocol, "weights", extract)


@pytest.mark.parametrize("protocol", ["adm", "torch-fidelity"])
def test_names_say_protocol_reference_and_labels(protocol):
  network = small_network(protocol)
  metrics = tuple(m for m in comparison.DEFAULTS[protocol] if m != "kid")
  a, b = (
    comparison.collect(name, [network.extract(x[:20]), network.extract(x[20:])], comparison.needs_of(metrics))
    for name, x in (("generated", GENERATED), ("real", REAL))
  )
  found = comparison.compute(metrics, network, a, b)
  names = {comparison.metric_name(m, network, 50_000, "imagenet_256", "balanced") for m in found}
  expected = {f"{m}50k/{protocol}/imagenet_256/balanced" for m in ("fid", "precision", "recall")}
  expected |= {f"is50k/{protocol}/balanced"}
  expected |= (
    {"sfid50k/adm/imagenet_256/balanced"} if protocol == "adm" else {f"is_std50k/{protocol}/balanced"}
  )
  assert names == expected
  assert comparison.metric_name("fid", network, 1234, "x", "random") == f"fid1234/{protocol}/x/random"


def test_fid_needs_more_pictures_than_features():
  network = small_network("clean")
  with pytest.raises(UserError, match="FID on 2,048 features needs at least 2,048 pictures in x, but there "):
    comparison.check_counts(("fid",), 200, "x", network, 2048)
  with pytest.raises(UserError, match="sfid' is defined by ADM"):
    comparison.check_metrics(("sfid",), "clean")


def test_features_that_are_not_finite_are_refused():
  rows = np.ones((5, 3))
  rows[3, 1] = np.inf
  with pytest.raises(UserError, match="picture 8 of x has features that are not finite"):
    comparison.collect("x", [{"pooled": np.ones((5, 3))}, {"pooled": rows}], {"pooled"})


def test_hidden_files_are_no_pictures(tmp_path):
  (tmp_path / "@eaDir").mkdir()
  for name in ("0.png", ".1.png", "@eaDir/2.png"):
    Image.fromarray(REAL[0]).save(tmp_path / name)
  assert picture_sets.open_pictures(str(tmp_path)).names == ("0.png",)


def test_npz_files_are_read_in_pieces(data):
  found = picture_sets.open_pictures(str(data / "real.npz"))
  batches = list(found.read(25))
  assert [len(batch) for batch in batches] == [25, 25, 10] and len(found) == 60
  np.testing.assert_array_equal(np.concatenate(batches), REAL)


# Pairs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  """A folder with an untrained tokenizer."""
  folder = tmp_path_factory.mktemp("tokenizer") / "export"
  section = tiny.get_config("only=tokenizer").objective.to_dict()
  objective = objectives.build(section)
  storage.write_export(folder, {"objective": section}, objective.init(jax.random.key(0), {}))
  return folder


def test_pairs_are_compared_one_by_one(data, tmp_path):
  """A folder of the originals, brighter by 10 levels."""
  images = REAL // 2
  np.savez(tmp_path / "originals.npz", arr_0=images)
  (tmp_path / "made").mkdir()
  for i, image in enumerate(images):
    Image.fromarray(image + 10).save(tmp_path / "made" / f"{i:03}.png")
  flags = (f"--reference={tmp_path}/originals.npz", f"--json={tmp_path}/out.json", "--metrics=psnr,ssim")
  evaluate.main([f"--generated={tmp_path}/made", f"--page={tmp_path}/page.png", *flags])
  found = json.loads((tmp_path / "out.json").read_text())["metrics"]
  assert found.keys() == {"psnr", "ssim"}
  np.testing.assert_allclose(found["psnr"], 20 * np.log10(255 / 10), rtol=1e-5)
  assert 0.8 < found["ssim"] < 1
  page = Image.open(tmp_path / "page.png")
  assert min(page.size) > 2 * 192


@pytest.mark.parametrize(
  ("channels", "smallest"), [((64, 192, 384, 256, 256), 31), ((64, 128, 256, 512, 512), 16)]
)
def test_lpips_needs_pictures_on_which_no_map_is_empty(channels, smallest):
  name, network = lpips.BACKBONES[channels]
  image = jax.ShapeDtypeStruct((1, smallest, smallest, 3), np.float32)
  outputs = jax.eval_shape(lambda x: network.init_with_output(jax.random.key(0), x)[0], image)
  assert [level.size > 0 for level in outputs["maps"]] == [True] * 5
  loaded = lpips_files.Loaded(name, network, {}, ())
  large, small = (
    picture_sets.PictureSet("x", ("a.png",), (64, side), lambda size: iter(()))
    for side in (smallest, smallest - 1)
  )
  paired.check(["lpips"], large, large, loaded)
  with pytest.raises(UserError, match=f"'lpips' needs sides of at least {smallest} pixels, but x has"):
    paired.check(["lpips"], small, small, loaded)


def test_a_tokenizer_is_evaluated_on_a_folder(data, tokenizer):
  """Pictures are cut into tiles, and put together again."""
  wide = np.concatenate([REAL[:6], REAL[6:12]], axis=2)
  np.savez(data / "wide.npz", arr_0=wide)
  out = data / "out.json"
  metrics = "psnr,codebook_usage,perplexity"
  evaluate.main(
    [f"--model={tokenizer}", f"--reference={data}/wide.npz", f"--metrics={metrics}", f"--json={out}"]
  )
  found = json.loads(out.read_text())["metrics"]
  model = maskgen.load(tokenizer)
  made = model.reconstruct(REAL[:12]).astype(np.float64)
  errors = np.square((made - REAL[:12]) / 255).mean(axis=(1, 2, 3))
  expected = -10 * np.log10((errors[:6] + errors[6:]) / 2).mean()
  np.testing.assert_allclose(found["psnr"], expected, rtol=1e-5)
  counts = np.bincount(model.encode(REAL[:12]).ravel(), minlength=tiny.CODES) / (12 * tiny.TOKENS)
  assert found["codebook_usage"] == np.mean(counts > 0)
  entropy = -sum(share * np.log(share) for share in counts[counts > 0])
  np.testing.assert_allclose(found["perplexity"], np.exp(entropy))


def test_bad_pairs_are_one_sentence(data, tokenizer, tmp_path):
  np.savez(data / "fewer.npz", arr_0=REAL[:5])
  refused(
    data, "has 5 pictures and .* 60: 'psnr' needs one original", "fewer.npz", "real.npz", "--metrics=psnr"
  )
  refused(data, "sides of at least 161 pixels", "generated.npz", "real.npz", "--metrics=ms_ssim")
  refused(data, "'lpips' needs --lpips_trunk=FILE", "generated.npz", "real.npz", "--metrics=lpips")
  refused(data, "no other metric does", "generated.npz", "real.npz", "--metrics=psnr", "--lpips_heads=a.pth")
  refused(data, "'perplexity' is of a tokenizer", "generated.npz", "real.npz", "--metrics=perplexity")
  refused(data, "needs a metric of pairs", "generated.npz", "real.npz", "--page=page.png")
  (tmp_path / "renamed").mkdir()
  for i, image in enumerate(REAL):
    Image.fromarray(image).save(tmp_path / "renamed" / f"x{i:03}.png")
  refused(
    data,
    "'x000.png' of .* would be compared with 'cats/000.png'",
    tmp_path / "renamed",
    "real",
    "--metrics=psnr",
  )
  with pytest.raises(UserError, match="either --generated or --model"):
    evaluate.main([f"--reference={data}/real.npz"])
  np.savez(data / "odd.npz", arr_0=REAL[:, :15])
  with pytest.raises(UserError, match=r"have \(15, 16\) .* takes \(16, 16\): crop or resize"):
    evaluate.main([f"--model={tokenizer}", f"--reference={data}/odd.npz", "--metrics=psnr"])
