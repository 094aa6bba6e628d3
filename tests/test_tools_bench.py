"""The benchmarks: what they report, and that they measure the same work, but never speed."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath
from PIL import Image

from maskgen import config as config_lib
from maskgen import objectives, sharding
from maskgen.benchmarks import accelerator, common, dataless, devices, evaluate, recipes, recording
from maskgen.benchmarks.handwritten import Handwritten
from maskgen.benchmarks.model_flops import model_flops
from maskgen.config import fields
from maskgen.costs import chips, flops
from maskgen.data.pipeline import Data
from maskgen.errors import UserError
from maskgen.evaluators import comparison
from maskgen.main import split_stages
from maskgen.tools.bench import main
from maskgen.training.pretrained import complete
from maskgen.training.workdir import write_config

TINY = f"--config={tiny.FILE}"
CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.fixture
def photos(tmp_path):
  """Forty JPEG photos of various sizes."""
  rng = np.random.default_rng(0)
  for number in range(40):
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    small.resize((40 + number, 60 - number // 2)).save(tmp_path / f"{number}.jpg")
  return tmp_path


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
  """Measures the peak with small matrices, which is fast."""
  monkeypatch.setattr(devices, "_SIZES", (64, 128))
  monkeypatch.setattr(devices, "_SECONDS_PER_REPEAT", 1e-4)


@pytest.fixture
def clock(monkeypatch):
  """A clock that advances by a second on each call."""
  seconds = iter(range(10_000))
  monkeypatch.setattr("time.perf_counter", lambda: float(next(seconds)))


def _lines(capsys):
  """The lines that a benchmark prints."""
  return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def _numbers(capsys):
  """The one line that a benchmark prints."""
  (numbers,) = _lines(capsys)
  return numbers


def _data(source, preprocess, size, batch_size=6):
  return Data(source, preprocess, f"decode|resize({size})", batch_size, process_index=0, process_count=1)


def test_input(capsys, photos):
  preprocess = "decode(3)|random_resized_crop(16, (0.2, 1.0))|flip_lr"
  main(
    [
      *("input", TINY, "--stage=mage", "--seconds=0.05", "--rounds=3"),
      f"--config.mage.data.source=folder:{photos}",
      f"--config.mage.data.preprocess={preprocess}",
    ]
  )
  numbers = _numbers(capsys)
  rates = [numbers.pop(f"{name}_images_per_second") for name in ("pipeline", "handwritten", "decode")]
  assert all(isinstance(rate, float) and rate > 0 for rate in rates)
  ratio, low, high = (numbers.pop(name) for name in ("ratio", "ratio_min", "ratio_max"))
  assert ratio == pytest.approx(rates[0] / rates[1])
  assert 0 < low <= ratio <= high
  assert isinstance(numbers.pop("cores"), int)
  assert numbers == {"source": f"folder:{photos}", "preprocess": preprocess, "batch_size": 8}


def test_one_round_has_one_ratio(capsys):
  main(["input", "--config=configs/quickstart.py", "--seconds=0.05", "--rounds=1"])
  numbers = _numbers(capsys)
  assert numbers["source"] == "digits"
  assert numbers["ratio"] == numbers["ratio_min"] == numbers["ratio_max"]


@pytest.mark.parametrize("source", ["digits", "folder", "mixed"])
@pytest.mark.parametrize(
  ("preprocess", "size"),
  [
    ("decode|resize(16)", 16),
    ("decode|resize((16, 16), 'bicubic', False)", 16),
    ("decode|resize_small(20)|center_crop(16)", 16),
    ("decode|resize(14)|pad(1, 'reflect')", 16),
  ],
)
def test_the_loop_makes_the_images_of_the_pipeline(photos, source, preprocess, size):
  if source == "mixed":
    Image.new("RGB", (30, 50), (10, 200, 30)).save(photos / "other.png")
  source = "digits" if source == "digits" else f"folder:{photos}"
  batch_size = 479 if source == "digits" else 6  # of 1,437
  data = _data(source, preprocess, size, batch_size)
  ours, theirs = data.train_batches(), Handwritten(source, "train", preprocess).batches(batch_size)
  # Whole epochs, several if a batch has rows of two.
  batches = data.num_train // np.gcd(data.num_train, batch_size)
  ours = sorted(image.tobytes() for _ in range(batches) for image in next(ours)["image"])
  theirs = sorted(image.tobytes() for _ in range(batches) for image in next(theirs))
  assert ours == theirs


@pytest.mark.parametrize("source", ["digits", "folder"])
@pytest.mark.parametrize(
  "preprocess",
  [
    "decode|random_resized_crop(16)|flip_lr",
    "decode|pad(20)|random_resized_crop((16, 16), (0.5, 1.0))",
    "decode(1)|pad(6)|random_crop(16)",
  ],
)
def test_random_images_have_the_same_shape(photos, source, preprocess):
  source = "digits" if source == "digits" else f"folder:{photos}"
  channels = 1 if "(1)" in preprocess else 3
  data = Data(source, preprocess, f"decode({channels})|resize(16)", 6, process_index=0, process_count=1)
  ours = next(data.train_batches())["image"]
  loop = Handwritten(source, "train", preprocess)
  batches = loop.batches(6)
  theirs = [next(batches) for _ in range(3)]
  for images in theirs:
    assert (images.shape, images.dtype) == (ours.shape, ours.dtype)
  assert len({image.tobytes() for images in theirs for image in images}) > 12


def test_decoding_is_of_whole_pictures(photos):
  sizes = sorted(np.asarray(Image.open(path)).size for path in photos.iterdir())
  counted = {int(size) for size in next(Handwritten(f"folder:{photos}", "train", "decode").decodings(30))}
  assert counted <= set(sizes) and len(counted) > 10


def test_tokens(capsys):
  main(
    ["tokens", TINY, "--steps=2", "--batch_size=16", "--config.mage.objective.tokenizer.codebook_size=300"]
  )
  numbers = _numbers(capsys)
  live, cached = (numbers.pop(f"{name}_seconds_per_step") for name in ("live", "cached"))
  assert numbers.pop("ratio") == pytest.approx(live / cached)
  assert 0 < numbers.pop("ratio_min") <= numbers.pop("ratio_max")
  assert numbers.pop("live_flops_per_step") > numbers.pop("cached_flops_per_step") > 0
  assert (numbers.pop("device"), numbers.pop("devices")) == ("cpu", 8)
  bytes_per_crop = tiny.TOKENS * 2 * 1_000_000  # of uint16
  assert numbers == {
    "batch_size": 16,
    "tokens": tiny.TOKENS,
    "code_dtype": "uint16",
    "bytes_per_million_images_per_crop": bytes_per_crop,
    "bytes_per_million_images_10_crops": 10 * bytes_per_crop,
  }


def _check_spread(numbers, name):
  """Removes a measurement's median, minimum and maximum, and returns the median."""
  median, low, high = (numbers.pop(key) for key in (name, f"{name}_min", f"{name}_max"))
  assert 0 < low <= median <= high
  return median


def _check_step(numbers):
  """Removes what depends on the machine from a line of `bench step`, and checks its consistency."""
  seconds = _check_spread(numbers, "step_seconds")
  assert numbers.pop("images_per_second") == pytest.approx(numbers["batch_size"] / seconds)
  achieved, peak = (numbers.pop(f"{name}_flops_per_second") for name in ("achieved", "peak"))
  assert achieved == pytest.approx(numbers["model_flops_per_step"] / seconds)
  assert numbers.pop("mfu") == pytest.approx(achieved / peak)
  assert numbers.pop("compile_seconds") > 0
  assert numbers.pop("argument_bytes") > 0
  assert numbers.pop("temporary_bytes") > 0
  assert numbers.pop("peak_memory_bytes") > 1e7


def _experiment(stage, source="synthetic", **overrides):
  return dataless.build(tiny.stage(stage, **overrides), source)


def test_step(capsys, tmp_path):
  main(["step", TINY, "--steps=2", "--warmup=0", "--batch_size=16,8,16", f"--profile={tmp_path}"])
  small, large = _lines(capsys)
  assert (small["batch_size"], large["batch_size"]) == (8, 16)
  assert small["peak_flops_per_second"] == large["peak_flops_per_second"]
  for numbers in (small, large):
    _check_step(numbers)
    shares = numbers.pop("time_shares")
    assert sum(shares.values()) == pytest.approx(1)
    assert {"matmul", "convolution", "other"} <= shares.keys()
    assert numbers == {
      "config": tiny.FILE,
      "device": "cpu",
      "devices": 8,
      "stage": "mage",
      "batch_size": numbers["batch_size"],
      "source": "synthetic",
      "dtype": "float32",
      "model_flops_per_step": numbers["batch_size"] * small["model_flops_per_step"] // 8,
      "peak_memory_of": "process",
    }
  assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


@pytest.mark.parametrize(("stage", "source"), [("tokenizer", "config"), ("mage", "tokens")])
def test_step_of_other_stages_and_sources(capsys, stage, source):
  main(["step", TINY, f"--stage={stage}", f"--source={source}", "--steps=1", "--warmup=1"])
  numbers = _numbers(capsys)
  _check_step(numbers)
  assert (numbers["stage"], numbers["source"], numbers["batch_size"]) == (stage, source, 8)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_objective_has_a_compute_dtype(file):
  config = complete(config_lib.to_dict(config_lib.load(f"{file}:debug")))
  for stage in split_stages(config, pathlib.Path("run")).values():
    assert common.compute_dtype(objectives.build(stage["objective"])) in ("float32", "bfloat16")


def test_sample(capsys):
  main(["sample", TINY, "--batch_size=8", "--sampling_steps=2", "--repeats=2"])
  numbers = _numbers(capsys)
  seconds = _check_spread(numbers, "batch_seconds")
  assert numbers.pop("images_per_second") == pytest.approx(8 / seconds)
  assert numbers.pop("model_flops_per_image") > 1e3
  assert numbers.pop("compile_seconds") > 0
  assert numbers.pop("peak_memory_bytes") > 1e7
  assert numbers == {
    "config": tiny.FILE,
    "stage": "mage",
    "device": "cpu",
    "devices": 8,
    "batch_size": 8,
    "sampling_steps": 2,
    "dtype": "float32",
    "peak_memory_of": "process",
  }


def test_sample_takes_the_steps_of_the_config(capsys):
  main(["sample", f"{TINY}:only=mage", "--repeats=1"])
  numbers = _numbers(capsys)
  assert (numbers["sampling_steps"], numbers["batch_size"], numbers["stage"]) == (3, 8, None)


def test_sample_compares_the_reuse_of_features(capsys):
  main(["sample", TINY, "--sampling_steps=4", "--reuse=2,4", "--repeats=2"])
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [line.get("reuse") for line in lines] == [None, 2, 4]
  for line in lines[1:]:
    expected = lines[0]["batch_seconds"] / line["batch_seconds"]
    assert line["ratio"] == pytest.approx(expected)
    assert line["ratio_min"] <= line["ratio_max"]


def test_evaluate(capsys, caplog, monkeypatch):
  """With a small network in the place of Inception-v3, and without torch-fidelity."""
  widths = {"pooled": 12, "logits": 5}

  def extract(images):
    return {name: images.reshape(len(images), -1)[:, :d].astype(jnp.float32) for name, d in widths.items()}

  network = comparison.Network("inception_v3", "torch-fidelity", "", extract)
  monkeypatch.setattr(evaluate, "_WIDTHS", widths)
  monkeypatch.setattr(evaluate, "_random_weights", lambda: None)
  monkeypatch.setattr(comparison, "open_inception", lambda params, protocol: network)
  monkeypatch.setattr(evaluate, "_PACKAGES", ("torch_of_nobody",))
  main(["evaluate", "--pictures=6", "--side=8", "--samples=1000", "--batch_size=500", "--rounds=1"])
  assert "torch_of_nobody is not installed, so only maskgen is measured" in caplog.text
  numbers = _numbers(capsys)
  assert _check_spread(numbers, "maskgen_pictures_per_second") > 0
  assert _check_spread(numbers, "maskgen_metrics_seconds") > 0
  assert numbers.pop("peak_memory_bytes") > 1e7
  assert numbers == {
    "device": "cpu",
    "devices": 8,
    "peak_memory_of": "process",
    "torch_of_nobody": None,
    "pictures": 6,
    "side": 8,
    "samples": 1000,
    "batch_size": 500,
    "rounds": 1,
  }


def test_steps_and_samples_are_without_tensorflow():
  code = f"""
import sys
from maskgen.benchmarks import devices
from maskgen.tools.bench import main
devices._SIZES = {devices._SIZES}
for line in ("step --steps=1", "sample --repeats=1"):
  name, *flags = line.split()
  main([name, "--config={tiny.FILE}", *flags])
print("tensorflow" in sys.modules)
"""
  process = tiny.python("-c", code)
  out, err = process.communicate()
  assert process.returncode == 0, err
  *results, imported = out.splitlines()
  assert len(results) == 2
  assert imported == "False"


def test_an_accelerator_needs_few_packages():
  code = """
import sys
sys.modules.update(dict.fromkeys(("tensorflow", "tensorflow_datasets", "clu", "ml_collections")))
from maskgen.benchmarks import devices
from maskgen.errors import UserError
from maskgen.tools.bench import main
devices._SIZES = (64, 128)
try:
  main(["step", "--config=configs/quickstart.py"])
except UserError as error:
  print(error)
main(["accelerator", "--size=tiny", "--steps=1", "--seconds=1"])
"""
  process = tiny.python("-c", code)
  out, err = process.communicate()
  assert process.returncode == 0, err
  refused, *lines = out.splitlines()
  assert refused.startswith("config files need ml-collections")
  # The first row is always measured, and is printed although there is no time for others.
  measured, rest = map(json.loads, lines)
  assert (measured["recipe"], measured["source"], measured["batch_size"]) == ("mage_tiny", "synthetic", 16)
  assert measured["mfu"] > 0 and "error" not in measured
  planned = accelerator.rows(accelerator.SIZES["tiny"], against=False)
  assert rest == {"left_out": [row._asdict() for row in planned[1:]]}


def test_rows_of_an_accelerator():
  """Each kind comes once before other batch sizes, and the reference beside what it is compared with."""
  plain, against = (accelerator.rows(accelerator.SIZES["paper"], against=given) for given in (False, True))
  assert len(set(against)) == len(against) == 17
  assert [row for row in against if row.part != "reference"] == plain
  assert [row.part for row in against[2:4]] == ["reference"] * 2
  assert {(row.part, row.recipe) for row in plain[:7]} == {(row.part, row.recipe) for row in plain}


def test_recipes_are_those_of_the_configs():
  """If not, run `python -m maskgen.benchmarks.recipes`."""
  assert json.loads(recipes.FILE.read_text()) == recipes.current()
  assert dataless.build(recipes.read("vqgan")).config.batch_size == 256


def test_chips_are_compared_with_their_data_sheet(monkeypatch):
  result = {"achieved_flops_per_second": 1e14, "dtype": "bfloat16", "devices": 2}
  assert devices.utilisation(result, 4e14) == {"peak_flops_per_second": 4e14, "mfu": 0.25}
  monkeypatch.setattr(devices.chips, "chip_of", lambda device: chips.Chip("a chip", 1e14, 1, 1, 1))
  found = devices.utilisation(result, 4e14)
  assert (found["stated_flops_per_second"], found["mfu_of_stated"]) == (2e14, 0.5)
  assert "mfu_of_stated" not in devices.utilisation(result | {"dtype": "float32"}, 4e14)


# What a step is made of


@pytest.mark.parametrize("source", dataless.SOURCES)
def test_batches_are_what_their_spec_says(source):
  experiment = _experiment("mage", source, objective__tokenizer__codebook_size="300")
  spec = dataless.batch_spec(experiment, source)
  batches = dataless.batches(experiment, source)
  batch = next(batches)
  batches.close()
  assert batch.keys() == spec.keys()
  for name, leaf in spec.items():
    assert (batch[name].shape, batch[name].dtype) == (leaf.shape, leaf.dtype)
    assert batch[name].sharding == leaf.sharding == sharding.batch_sharding(experiment.mesh)
  if source == "tokens":
    assert spec["tokens"].dtype == jnp.uint16
    assert 255 < batch["tokens"].max() < 300
  else:
    assert spec["image"].dtype == jnp.uint8
    assert batch["image"].max() > 200


def test_live_tokens_cost_what_the_tokenizer_does():
  experiment = _experiment("mage", "tokens")
  live, cached = (
    model_flops(experiment, dataless.batch_spec(experiment, source)) for source in ("synthetic", "tokens")
  )
  variables = experiment.targets["state"].variables(experiment.targets["frozen"])
  encode = experiment.objective.predict_fns()["encode"]
  image = dataless.batch_spec(experiment, "synthetic")
  assert live - cached == flops.count(encode, variables, image, jax.random.key(0))
  assert cached > 0


# A config for each objective; the others differ in numbers, `mage_large` in how it is run.
ONE_OF_EACH = (
  *("cropmae_small", "diffusion_digits", "dmjd_base", "finetune_mage", "lease_base", "lmd_base", "mae_base"),
  *("mage_base", "mage_c_base", "mage_class_cond", "mage_text_cond", "mask_align_base", "mr_mae_base"),
  *("probe_mage", "selfie_base", "siglip_base", "sorcen_base", "umd_base", "vilex_digits", "vqgan_imagenet"),
)


def last_stage(path):
  stages = split_stages(complete(config_lib.to_dict(config_lib.load(path))), pathlib.Path("run"))
  return list(stages.values())[-1]


def test_there_is_a_config_of_each_objective():
  by_file = {file.stem: last_stage(f"{file}:debug")["objective"]["name"] for file in CONFIGS}
  assert {by_file[name] for name in ONE_OF_EACH} == {*by_file.values()}


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "mage_large"])
def test_how_a_step_is_run_changes_no_model_flops(name):
  large = name == "mage_large"
  config = last_stage(f"{CONFIGS[0].parent / name}.py{'' if large else ':debug'}")
  if large:
    config["objective"] |= dict(depth=2, decoder_depth=1)
  config["batch_size"] = 16
  section, one_device = config["objective"], jax.devices()[:1]
  plain = dataless.build(config, devices=one_device)
  changes = {
    ("objective", *path): (field.metadata["less_memory"] or (not value,))[-1]
    for path, field, value in fields.walk(objectives.find(section), section)
    if field.metadata.get("operational") and path[-1] != "attention"
  }
  if not plain.objective.batch_spec().whole_batch:
    changes["accumulation",] = 2
  changed = dataless.build(fields.replace(config, changes), devices=one_device)
  spec = dataless.batch_spec(plain, "synthetic")
  found = model_flops(plain, spec)
  assert found == model_flops(changed, spec)
  if large:  # what is not counted is there
    target = changed.targets
    again = flops.count(changed.make_update(changed.objective), target["state"], target["frozen"], spec)
    assert found < again


# How things are measured


def test_the_peak_counts_all_devices(monkeypatch, clock):
  monkeypatch.setattr(devices, "_SECONDS_PER_PRODUCT", 2.0)
  # Each measurement takes a second of this clock, whatever the size.
  assert devices.matmul_peak("float32") == 2 * 8 * 128**3


def test_the_peak_stops_at_slow_products(clock):
  assert devices.matmul_peak("bfloat16") == 2 * 8 * 64**3


def test_queued_steps_are_timed_from_end_to_end(clock):
  started = []

  def start():
    started.append(len(started))
    return jnp.zeros(())

  times = common.seconds_in_a_row(start, warmup=2, count=3)
  assert len(started) == 6  # one is under way when the clock starts
  np.testing.assert_array_equal(times, np.ones(3))


def test_exhausted_memory_is_told_from_other_errors():
  message = r"--batch_size=8: device memory is exhausted \(RES.* 9 GB\)"
  with pytest.raises(UserError, match=message), devices.enough_memory(8):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of 9 GB\nat all")
  with pytest.raises(jax.errors.JaxRuntimeError), devices.enough_memory(8):
    raise jax.errors.JaxRuntimeError("INTERNAL: no")


@pytest.mark.parametrize(
  ("function", "shapes", "kinds"),
  [
    (lambda x, y: jnp.tanh(x @ y), [(64, 64), (64, 64)], {"matmul"}),
    (lambda x: jnp.tanh(x.astype(jnp.bfloat16)), [(64, 64)], {"other"}),
    (
      lambda x, y: jax.lax.conv_general_dilated(
        x, y, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
      ),
      [(2, 16, 16, 8), (3, 3, 8, 8)],
      {"convolution"},
    ),
    (lambda x: jnp.tanh(jax.lax.fori_loop(0, 9, lambda _, x: x @ x, x)), [(64, 64)], {"matmul", "other"}),
  ],
)
def test_kinds_of_operations(function, shapes, kinds):
  arrays = [jnp.zeros(shape) for shape in shapes]
  found = set(recording.kinds_of_operations(jax.jit(function).lower(*arrays).compile().as_text()).values())
  assert kinds <= found
  assert not found & ({"matmul", "convolution", "collective"} - kinds)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "benchmark"),
    (["inputs", TINY], "invalid choice: 'inputs'"),
    (["input"], "--config"),
    (["input", TINY, "--stage=maeg"], "--stage=maeg: .* no such stage; did you mean 'mage'"),
    (["input", f"{TINY}:only=mage", "--stage=mage"], "has no stages, remove the flag"),
    (["input", TINY, "--rounds=0"], "--rounds=0: give at least 1"),
    (["input", TINY, "--seconds=nan"], "--seconds=nan: give at least 0"),
    (["input", TINY], "synthetic has no encoded pictures"),
    (["input", TINY, "--steps=3"], "'--steps=3' is not understood"),
    (
      ["input", TINY, "--config.mage.data.preprocess=decode|random_crop(16)|grayscale"],
      "grayscale in .* has no counterpart .*decode, random_resized_crop, resize",
    ),
    (
      ["input", TINY, "--config.mage.data.preprocess=two_views|decode|random_crop(16)"],
      "two_views in .* has no counterpart",
    ),
    (["tokens", TINY, "--stage=tokenizer"], "'tokenizer' is not trained on codes"),
    (["step", TINY, "--stage=tokenizer", "--source=tokens"], "'tokenizer' is not trained on codes"),
    (["step", TINY, "--source=jpeg"], "invalid choice: 'jpeg'"),
    (["step", TINY, "--batch_size=8,x"], "--batch_size=8,x: give numbers of at least 1"),
    (["step", TINY, "--batch_size=8,0"], "--batch_size=8,0: give numbers of at least 1"),
    (["step", TINY, "--batch_size=12"], "config.batch_size=12 is not divisible by 8 .* use a multiple of 8"),
    (["step", TINY, "--steps=0"], "--steps=0: give at least 1"),
    (["step", TINY, "--warmup=-1"], "--warmup=-1: give at least 0"),
    (
      ["step", TINY, f"{TINY}/x".replace("config", "profile")],
      "/x: it is not a writable folder, give another",
    ),
    (["sample", TINY, "--stage=tokenizer"], "'tokenizer' does not generate: .* objective 'mage'"),
    (["sample", TINY, "--batch_size=12"], "config.batch_size=12 is not divisible by 8"),
    (["sample", TINY, "--sampling_steps=0"], "--sampling_steps=0: give at least 1"),
    (["sample", TINY, "--reuse=2,x"], "--reuse=2,x: give numbers of at least 1"),
    (["sample", TINY, "--reuse=2"], "reuse is 2: it must divide the number of steps, 3"),
    (["sample", TINY, "--repeats=0"], "--repeats=0: give at least 1"),
    (["accelerator", "--size=huge"], "invalid choice: 'huge'"),
    (["accelerator", "--seconds=0"], "--seconds=0.0: give at least 1"),
    (["accelerator", "--reference=/nowhere"], "--reference=/nowhere has no models_mage.py: give a checkout"),
    (["reference"], "--reference"),
    (
      ["reference", "--reference=x", "--task=live,code"],
      "--task=live,code: give some of live, tokens, sample",
    ),
    (["reference", "--reference=/nowhere"], "--reference=/nowhere has no models_mage.py"),
    (["evaluate", "--pictures=0"], "--pictures=0: give at least 1"),
    (["evaluate", "--samples=999"], "--samples=999: give at least 1000"),
    (["tokens", TINY, "--steps=0"], "--steps=0: give at least 1"),
    (["tokens", TINY, "--batch_size=0"], "--batch_size=0: give at least 1"),
    (["tokens", TINY, "--batch_size=9"], "9"),
  ],
)
def test_errors(arguments, message):
  with pytest.raises(UserError, match=message):
    main(arguments)


def test_a_python_without_pytorch_is_named_as_such(tmp_path):
  (tmp_path / "models_mage.py").touch()
  for python, message in (("/no/python", "does not run"), ("false", "cannot run the reference")):
    with pytest.raises(UserError, match=f"--python={python} {message}"):
      main(["reference", f"--reference={tmp_path}", f"--python={python}"])


def test_a_damaged_picture_is_named_as_such(photos):
  for path in photos.iterdir():
    path.write_bytes(path.read_bytes()[:60])
  batches = Handwritten(f"folder:{photos}", "train", "decode|resize(16)").batches(6)
  with pytest.raises(UserError, match=r"the hand-written loop cannot read .*folder"):
    next(batches)


QUICKSTART = "--config=configs/quickstart.py"


@pytest.fixture
def raced(tmp_path, repository):
  """A finished run of the quickstart as a speedrun reads it, with an evaluation every 1000 steps."""
  config = config_lib.to_dict(config_lib.load(str(repository / "configs/quickstart.py"), {}))

  def write(*evaluations):
    lines = [
      {
        "step": 1000 * number,
        "probe/top1": top1,
        "generation/frechet_pixels": frechet,
        "timing/seconds": seconds,
      }
      for number, (top1, frechet, seconds) in enumerate(evaluations, 1)
    ]
    (tmp_path / "mage").mkdir(exist_ok=True)
    (tmp_path / "mage" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_config(epath.Path(tmp_path), config, ["--config=configs/quickstart.py"], {})
    run = {"wall_seconds": 300.0, "device": "2 x cpu", "version": "0.1.0"}
    (tmp_path / "results.json").write_text(json.dumps({"run": run}))
    return f"--workdir={tmp_path}"

  return write


def test_a_speedrun_ends_where_both_numbers_are_good_enough(raced, capsys):
  # Of 300 s, 80 s passed after the second evaluation.
  main(["speedrun", raced((0.95, 1.2, 90.0), (0.94, 0.9, 140.0), (0.93, 1.0, 220.0))])
  found = _numbers(capsys)
  assert (found["seconds"], found["step"]) == (220.0, 2000)
  assert (found["probe/top1"], found["generation/frechet_pixels"]) == (0.94, 0.9)


def test_a_speedrun_that_has_not_arrived_says_so(raced, tmp_path):
  with pytest.raises(
    UserError, match=r"has not reached 0.93 and 1 \(step 1000: 0.950 and 1.2; step 2000: 0.9"
  ):
    main(["speedrun", raced((0.95, 1.2, 90.0), (0.92, 0.9, 140.0))])
  results = json.loads((tmp_path / "results.json").read_text())
  (tmp_path / "results.json").write_text(json.dumps({"run": results["run"] | {"resumed": True}}))
  with pytest.raises(UserError, match=r"took more than one process, .*: train it in one go in a new"):
    main(["speedrun", f"--workdir={tmp_path}"])
  (tmp_path / "results.json").unlink()
  with pytest.raises(UserError, match=r"results\.json"):
    main(["speedrun", f"--workdir={tmp_path}"])


@pytest.mark.parametrize(
  "change, named",
  [
    (
      "tokenizer.data.source=synthetic",
      "tokenizer.data.source is 'synthetic': a speedrun has 'digits'",
    ),
    ("mage.data.eval_split=train", "config.mage.data.eval_split is 'train'"),
    ("mage.pretrained.tokenizer=digits", "config.mage.pretrained.tokenizer is digits"),
    ("mage.evals.generation.num_images=10", "config.mage.evals.generation.num_images is 10"),
    ("mage.evals.probe.type=loss", "config.mage.evals.probe.type is 'loss'"),
  ],
)
def test_who_breaks_a_rule_does_not_race(change, named, tmp_path):
  with pytest.raises(UserError) as error:
    main(["speedrun", QUICKSTART, f"--workdir={tmp_path}/run", f"--config.{change}"])
  assert named in str(error.value) and not (tmp_path / "run").exists()
