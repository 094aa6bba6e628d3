"""Any wrong input ends with one sentence that names it and the remedy."""

import concurrent.futures
import importlib
import json
import shutil

import numpy as np
import pytest
import tiny
from etils import epath

import maskgen
from maskgen import main, processes
from maskgen.errors import TransientError, UserError
from maskgen.tools import export, generate

trained = tiny.trained


def assert_clear(error: pytest.ExceptionInfo) -> str:
  """Asserts that it is one sentence, or a sentence and a table, without internals of the program."""
  text = str(error.value)
  sentence, *table = text.split("\n")
  assert 10 < len(sentence) < 500
  assert all(line.startswith("  ") for line in table)
  for inside in ("Traceback", "object at 0x", "<class", "ShapeDtypeStruct", 'File "'):
    assert inside not in text
  return text


def run_main(tmp_path, *arguments, config=tiny.FILE + ":only=tokenizer", workdir="run"):
  main.main([f"--config={config}", f"--workdir={tmp_path / workdir}", *arguments])


@pytest.fixture
def write_config(tmp_path):
  """Writes a config file that changes one stage of the tiny config: `write_config("data.source = 'x'")`."""

  def write(*lines, stage="tokenizer"):
    file = tmp_path / "changed.py"
    file.write_text(
      "\n".join(
        [
          "from maskgen import config as config_lib",
          "def get_config(arg=None):",
          f"  config = config_lib.load({tiny.FILE!r} + ':only={stage}').unlock()",
          *(f"  config.{line}" for line in lines),
          "  return config",
        ]
      )
    )
    return str(file)

  return write


# The command line


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--workdr=x"], r"argument '--workdr=x' is not understood"),
    (["stray"], r"argument 'stray' is not understood"),
    (["--config.seed", "3"], r"'--config\.seed' is not understood.*--config\.KEY=VALUE"),
    (["--mode=evaluate"], r"--mode: invalid choice: 'evaluate' .*train.*eval.*check"),
    (["--config.seed=4294967301"], r"seed is 4294967301: it must be a whole number from 0 to"),
    (["--config.sed=3"], r"config has no key 'sed'; did you mean 'seed'\?"),
    (["--config.batch_sizes=3"], r"did you mean 'batch_size'\?"),
    (["--config.data.sorce=digits"], r"config\.data has no key 'sorce'; did you mean 'source'\?"),
    (["--config.total_steps=many"], r"config\.total_steps is 'many': it takes"),
    (["--config.objective=mage"], r"config\.objective is a group of keys"),
  ],
)
def test_wrong_arguments(arguments, message, tmp_path):
  with pytest.raises(UserError, match=message) as error:
    run_main(tmp_path, *arguments)
  assert_clear(error)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ("configs/quickstrat.py", r"configs/quickstrat\.py does not exist; did you mean 'quickstart\.py'\?"),
    ("configs/quickstart.py:debgu", r"':debgu' does not exist; did you mean 'debug'\?"),
    ("configs/quickstart.py:seed=x", r"':seed' is 'x': it takes"),
    ("/nowhere/quickstart.py", r"/nowhere/quickstart\.py does not exist"),
    ("configs", r"configs does not exist: `maskgen configs` lists"),
    ("", r"does not exist"),
  ],
)
def test_wrong_configs(config, message, tmp_path):
  with pytest.raises(UserError, match=message) as error:
    run_main(tmp_path, config=config)
  assert_clear(error)


@pytest.mark.parametrize("missing", ["config", "workdir"])
def test_required_arguments(missing, tmp_path):
  arguments = {"config": "configs/quickstart.py", "workdir": str(tmp_path)}
  with pytest.raises(UserError, match=f"--{missing}") as error:
    main.main([f"--{name}={value}" for name, value in arguments.items() if name != missing])
  assert_clear(error)


# Keys and values of a config file


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("objective.l3_weight = 1.0", r"config\.objective has no key 'l3_weight'; did you mean 'l[12]_weight'\?"),
    ("objective.name = 'tokeniser'", r"'tokeniser' does not exist; did you mean 'tokenizer'\?"),
    ("objective.tokenizer.chanels = 3", r"config\.objective\.tokenizer has no key 'chanels'"),
    ("objective.tokenizer.norm_groups = 3", r"config\.objective\.tokenizer: channels=8 .* norm_groups=3"),
    ("objective.tokenizer.shortcut = 'none'", r"shortcut 'none' does not exist"),
    ("data.sorce = 'digits'", r"config\.data has no key 'sorce'; did you mean 'source'\?"),
    ("data.source = 'digts'", r"'digts' does not exist; did you mean 'digits'\?"),
    ("data.source = 'folder:/nowhere'", r"'/nowhere' is not a folder"),
    ("data.split = 'trian'", r"split 'trian' .*did you mean 'train'\?"),
    ("data.preprocess = 'decode(3)|resise(16)'", r"op 'resise' .*did you mean resize"),
    ("data.preprocess = 'decode(3)|resize(16'", r"is malformed"),
    ("optimizer.generator.lr = 1.0", r"config\.optimizer\.generator has no key 'lr'"),
    ("optimizer.generatr = dict(learning_rate=1.0)", r"'generatr'; did you mean 'generator'\?"),
    ("optimizer.generator.schedule = 'cosin'", r"'cosin' does not exist; did you mean 'cosine'\?"),
    (
      "optimizer.generator.warmup_epochs = 1.0",
      r"config\.optimizer\.generator\.warmup_steps and warmup_epochs are both set",
    ),
    ("optimizer.generator.base_learning_rate = 1.0", r"learning_rate, or base_learning_rate"),
    (
      "optimizer.generator.warmup_steps = 99",
      r"config\.optimizer\.generator\.warmup_steps is 99: it must be less",
    ),
    ("optimizer.generator.multipliers = (('nothing', 2.0),)", r"rule 'nothing' .* no parameter"),
    ("optimizer = dict(generator=dict(learning_rate=1.0))", r"config\.optimizer\.discriminator is missing"),
    ("ema.generatr = 0.9", r"config\.ema has no group 'generatr'; did you mean 'generator'\?"),
    ("evals.reconstruction.evry = 1", r"config\.evals\.reconstruction has no key 'evry'"),
    ("evals.reconstruction.type = 'recon'", r"type 'recon' does not exist"),
    ("evals.probe = dict(type='probe', every_steps=1)", r"config\.evals\.probe needs .* 'features'"),
    ("evals.loss = dict(type='loss')", r"config\.evals\.loss\.every_steps is missing: set it to 1"),
    ("evals.loss = dict(type='loss', every_steps=0)", r"config\.evals\.loss\.every_steps is 0: set it to 1"),
    ("evals.loss = dict(every_steps=1)", r"config\.evals\.loss needs the key 'type'"),
    ("mesh.dtaa = 8", r"config\.mesh has no key 'dtaa'; did you mean 'data'\?"),
    ("mesh.fsdp = 3", r"config\.mesh asks for .* devices, there are 8"),
    ("sharding = (('nothing', ('fsdp',)),)", r"rule 'nothing' .* no parameter"),
    ("sharding = ('nothing', ('fsdp',))", r"config: sharding has the rule 'nothing': give a regular"),
    ("sharding = (('nothing',),)", r"sharding has the rule \('nothing',\)"),
    ("sharding = (('nothing', 'fsdp'),)", r"sharding has the rule \('nothing', 'fsdp'\)"),
    ("sharding = (('nothing', (3,)),)", r"sharding has the rule \('nothing', \(3,\)\)"),
    ("sharding = (('(', ('fsdp',)),)", r"sharding has the rule \('\(', \('fsdp',\)\)"),
    ("batch_size = 800_000_000_000", r"config\.data: a batch of 800000000000 records takes .* smaller"),
    ("checkpoint.save_every = 3", r"config\.checkpoint has no key 'save_every'"),
    ("profile = dict(stps=3)", r"config\.profile has no key 'stps'; did you mean 'steps'\?"),
    ("batchsize = 8", r"config has no key 'batchsize'; did you mean 'batch_size'\?"),
    ("batch_size = 12", r"config\.batch_size=12 is not divisible by 8 .* multiple of 8"),
    ("batch_size = 0", r"batch.size"),
    ("accumulation = 3", r"not divisible by 8 .* times 3 .* multiple of 24"),
    ("total_epochs = 3.0", r"total_steps and total_epochs are both set"),
    ("seed = -1", r"config: seed is -1: it must be a whole number from 0 to 4294967295"),
    ("seed = 2**64", r"config: seed is 18446744073709551616: it must be"),
    ("total_steps = 0", r"total_steps"),
    ("total_steps = -3", r"total_steps"),
    ("log_every_steps = 0", r"log_every_steps"),
    ("checkpoint.save_steps = 0", r"save_steps"),
    (
      "objective.tokenizer.dtype = 'float16'",
      r"config\.objective\.tokenizer\.dtype computes gradients in float16, .* bfloat16",
    ),
    ("objective.image_size = (18, 16)", r"18x16 pixels is not divisible by .* factor 4"),
    ("objective.image_size = (20, 20)", r"config\.data provides .*config\.objective takes"),
    ("pretrained = dict(perceptual='/nowhere')", r"config\.pretrained has no key 'perceptual'"),
    ("resume = '/nowhere'", r"/nowhere"),
  ],
)
def test_wrong_keys_and_values(line, message, tmp_path, write_config):
  with pytest.raises(UserError, match=message) as error:
    run_main(tmp_path, "--mode=train" if "resume" in line else "--mode=check", config=write_config(line))
  assert_clear(error)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("objective.width = 15", r"width of 15 does not divide into 2 heads"),
    ("objective.sampling.schedule = 'cosinus'", r"'cosinus' does not exist; did you mean 'cosine'\?"),
    ("objective.sampling.steps = 0", r"at least 1"),
    ("objective.mask_ratio = dict(lo=0.5)", r"config\.objective\.mask_ratio has no key 'lo'"),
    ("pretrained = dict()", r"config\.pretrained\.tokenizer is missing"),
    ("pretrained.tokenizer = '/nowhere/at/all'", r"/nowhere/at/all does not exist"),
    ("evals.samples.seed = 2**64", r"config\.evals\.samples\.seed is 18446744073709551616"),
    ("evals.samples.masks = ('middle',)", r"mask 'middle' does not exist"),
  ],
)
def test_wrong_keys_and_values_of_mage(line, message, tmp_path, write_config, trained):
  pretrained = f"pretrained.tokenizer = {str(trained / 'tokenizer')!r}"
  with pytest.raises(UserError, match=message) as error:
    run_main(tmp_path, "--mode=check", config=write_config(pretrained, line, stage="mage"))
  assert_clear(error)


@pytest.mark.parametrize(
  ("stages", "message"),
  [
    ("('tokenizer', 'mage')", r"config\.stages names 'mage', which has no section"),
    ("()", r"config\.stages is empty: name at least one"),
  ],
)
def test_wrong_stages(stages, message, tmp_path):
  file = tmp_path / "changed.py"
  file.write_text(
    "import ml_collections\n"
    "def get_config(arg=None):\n"
    f"  return ml_collections.ConfigDict(dict(stages={stages}, tokenizer=dict()))\n"
  )
  with pytest.raises(UserError, match=message):
    run_main(tmp_path, config=str(file))


@pytest.mark.parametrize(
  ("coordinator", "error", "message"),
  [
    ("nonsense", UserError, "--coordinator=nonsense: give host:port"),
    ("10.0.0.1:", UserError, "give host:port"),
    ("10.0.0.1:0", UserError, "give host:port"),
    ("10.0.0.1:65536", UserError, "give host:port"),
    (":8476", UserError, "give host:port"),
    ("::1:8476", UserError, "give host:port"),
    (
      "nowhere.invalid:8476",
      TransientError,
      "--coordinator=nowhere.invalid:8476: the host cannot be resolved",
    ),
    (f"{'x' * 64}.com:8476", TransientError, "the host cannot be resolved"),
  ],
)
def test_wrong_coordinators(coordinator, error, message, tmp_path, monkeypatch):
  monkeypatch.setattr(processes, "RESOLVE_SECONDS", 0.0)
  others = ("--process_count=2", "--process_index=1", "--mode=check")
  with pytest.raises(error, match=message) as raised:
    run_main(tmp_path, f"--coordinator={coordinator}", *others)
  assert_clear(raised)


# Pretrained models


def test_a_pretrained_model_of_another_objective(tmp_path, write_config, trained):
  config = write_config(f"pretrained.tokenizer = {str(trained / 'mage')!r}", stage="mage")
  with pytest.raises(UserError, match=r"pretrained\.tokenizer|does not fit") as error:
    run_main(tmp_path, "--mode=check", config=config)
  assert_clear(error)


def test_a_pretrained_model_of_another_shape(tmp_path, write_config, trained):
  config = write_config(
    f"pretrained.tokenizer = {str(trained / 'tokenizer')!r}",
    "objective.tokenizer.codebook_size = 48",
    stage="mage",
  )
  with pytest.raises(UserError, match=r"tokenizer") as error:
    run_main(tmp_path, "--mode=check", config=config)
  text = assert_clear(error)
  assert "48" in text and "32" in text


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("evals.few.type=loss", r"^config\.mage\.evals\.few\.every_steps is missing: set it to 1 or more$"),
    ("optimizer.main.warmup_steps=50", r"^config\.mage\.optimizer\.main\.warmup_steps is 50: it must be"),
    ("batch_size=12", r"^config\.mage\.batch_size=12 is not divisible"),
  ],
)
def test_errors_name_the_stage(override, message, tmp_path):
  with pytest.raises(UserError, match=message) as error:
    main.main([f"--config={tiny.FILE}", f"--workdir={tmp_path / 'run'}", f"--config.mage.{override}"])
  assert_clear(error)


def test_only_keys_of_the_config_get_the_name_of_the_stage():
  with pytest.raises(UserError) as error, main.name_stage("mage"):
    raise UserError("config has no key 'sed', see config.json and my_config.seed: set --config.seed=1")
  expected = "config.mage has no key 'sed', see config.json and my_config.seed: set --config.mage.seed=1"
  assert str(error.value) == expected


# Workdirs


@pytest.mark.parametrize("mode", ["train", "check", "eval"])
def test_a_workdir_of_another_configs_run(mode, tmp_path, trained):
  shutil.copytree(trained / "tokenizer", tmp_path / "run")
  before = sorted(p.name for p in (tmp_path / "run").iterdir())
  with pytest.raises(
    UserError, match=r"holds another config's run \(seed: 0 -> 1\).*another --workdir"
  ) as error:
    run_main(tmp_path, f"--mode={mode}", "--config.seed=1")
  text = assert_clear(error)
  assert ("delete" in text) == (mode == "train")
  assert ("repeat the --config and the overrides" in text) == (mode != "train")
  assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before


@pytest.mark.parametrize(
  ("changes", "flags"),
  [
    (("mage.total_steps=9",), ("tokenizer", "mage")),
    (("tokenizer.total_steps=9",), ("tokenizer",)),
    (("tokenizer.total_steps=9", "tokenizer.seed=1"), None),
  ],
)
def test_training_longer_has_a_way(changes, flags, tmp_path, trained):
  root = epath.Path(shutil.copytree(trained, tmp_path / "run"))
  (root / "mage" / "results.json").unlink()  # it is not finished
  with pytest.raises(UserError) as error:
    run_main(tmp_path, *(f"--config.{change}" for change in changes), config=tiny.FILE)
  resume = " ".join(f"--config.{stage}.resume={root / stage}" for stage in flags or ())
  text = assert_clear(error)
  assert (f"to train longer, give another --workdir and {resume}, or" in text) == (flags is not None)


def test_training_a_single_stage_longer_has_a_way(tmp_path, trained):
  shutil.copytree(trained / "tokenizer", tmp_path / "run")
  (tmp_path / "run" / "results.json").unlink()
  with pytest.raises(UserError, match=f"another --workdir and --config.resume={tmp_path / 'run'}, or"):
    run_main(tmp_path, "--config.total_steps=9")


def test_many_differences_are_counted(tmp_path, trained):
  shutil.copytree(trained / "tokenizer", tmp_path / "run")
  changes = ("batch_size=16", "total_steps=7", "data.source=digits", "ema.generator=0.5")
  with pytest.raises(UserError, match=r"holds another config's run \(.*; .*; .* and 1 more\)") as error:
    run_main(tmp_path, *(f"--config.{change}" for change in changes))
  assert_clear(error)


@pytest.mark.parametrize("workdir", ["/dev/null/x", "file", "file/x"])
@pytest.mark.parametrize("mode", ["train", "check"])
def test_a_workdir_that_cannot_be_written(mode, workdir, tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(UserError, match=r"workdir .* is not writable") as error:
    run_main(tmp_path, f"--mode={mode}", workdir=workdir)
  assert_clear(error)


def test_processes_may_check_a_new_workdir_at_once(tmp_path):
  def check(index):
    main.check_workdir(epath.Path(tmp_path / f"runs{index % 50}" / "run"), {}, "train")

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(check, range(1000)))
  assert not list(tmp_path.iterdir())


def test_a_wrong_config_does_not_claim_the_workdir(tmp_path):
  with pytest.raises(UserError, match="not divisible by the tokenizer's down-sampling factor"):
    run_main(tmp_path, "--mode=train", "--config.objective.image_size=(15, 16)")
  assert not (tmp_path / "run").exists()


def test_an_empty_workdir_name():
  # As `--workdir=$UNSET` gives it.
  with pytest.raises(UserError, match="workdir") as error:
    main.main([f"--config={tiny.FILE}:only=tokenizer", "--workdir=", "--mode=check"])
  assert_clear(error)


def test_a_workdir_with_slashes_at_its_end_is_the_same(tmp_path, trained, caplog):
  shutil.copytree(trained / "tokenizer", tmp_path / "run")
  before = (tmp_path / "run" / "results.json").read_text()
  main.main([f"--config={tiny.FILE}:only=tokenizer", f"--workdir={tmp_path}/run//"])
  assert (tmp_path / "run" / "results.json").read_text() == before
  assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_workdir_that_lost_its_config(tmp_path, trained):
  shutil.copytree(trained / "tokenizer", tmp_path / "run")
  (tmp_path / "run" / "config.json").unlink()
  with pytest.raises(UserError, match=r"holds a run without config\.json") as error:
    run_main(tmp_path)
  assert_clear(error)


@pytest.mark.parametrize("name", ["checkpoints", "config.json"])
def test_eval_of_what_was_not_trained(name, tmp_path, trained):
  if name == "checkpoints":
    (tmp_path / "run").mkdir()
    shutil.copy(trained / "tokenizer" / "config.json", tmp_path / "run")
  with pytest.raises(UserError, match=r"no checkpoint yet|does not exist|holds no") as error:
    run_main(tmp_path, "--mode=eval")
  assert_clear(error)


def test_a_checkpoint_of_another_shape_gives_two_columns(tmp_path, trained, write_config):
  shutil.copytree(trained / "tokenizer", tmp_path / "run")
  (tmp_path / "run" / "results.json").unlink()
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  config["objective"]["tokenizer"]["code_width"] = 6  # as if the code of the network had changed
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match=r"does not fit this config in \d+ places") as error:
    run_main(tmp_path, config=write_config("objective.tokenizer.code_width = 6"))
  rows = [line.split(maxsplit=1) for line in assert_clear(error).split("\n")[1:]]
  assert rows[0][0] == "parameter" and rows[0][1].split() == ["found", "expected"]
  assert any(name.endswith("codebook") and "[32, 4]" in rest and "[32, 6]" in rest for name, rest in rows)


# Tools


@pytest.mark.parametrize("out", ["/proc/x", "file", "file/x"])
@pytest.mark.parametrize("tool", ["tokenize", "sweep", "export", "convert", "bench"])
def test_folders_that_cannot_be_written(tool, out, tmp_path, trained):
  (tmp_path / "file").write_text("x")
  arguments = {
    "tokenize": ["--source=digits"],
    "convert": ["--format=mage", "--weights=nowhere"],
    "bench": ["step", f"--config={tiny.FILE}:only=tokenizer"],
  }.get(tool, [])
  model = [] if tool in ("convert", "bench") else [f"--model={trained / 'mage'}"]
  flag = "profile" if tool == "bench" else "out"
  with pytest.raises(UserError, match=f"--{flag}=.*: it is not a writable folder, give another") as error:
    importlib.import_module(f"maskgen.tools.{tool}").main([*arguments, *model, f"--{flag}={tmp_path / out}"])
  assert_clear(error)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--out=folder.png"], r"--out=folder\.png is a folder: give the name of a \.png file"),
    (["--out=/proc/x.png"], r"the folder /proc (is not writable|does not exist)"),
    (["--out=a.png", "--trajectory=folder.png"], r"--trajectory=folder\.png is a folder"),
    (["--out=a.png", "--seed=-1"], r"--seed: '-1' is not a whole number from 0 to 4294967295"),
    (["--out=a.png", "--seed=4294967296"], r"--seed: '4294967296' is not a whole number"),
    (["--out=a.png", f"--seed={2**64}"], r"--seed: '18446744073709551616' is not a whole number"),
    (["--out=a.png", "--seed=x"], r"--seed: 'x' is not a whole number"),
  ],
)
def test_wrong_files_and_seeds(arguments, message, tmp_path, trained, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "folder.png").mkdir()
  with pytest.raises(UserError, match=message) as error:
    generate.main([f"--model={trained / 'mage'}", *arguments])
  assert_clear(error)


# Models


@pytest.fixture(scope="module")
def mage(trained):
  return maskgen.load(trained / "mage")


@pytest.fixture(scope="module")
def tokenizer(trained):
  return maskgen.load(trained / "tokenizer")


def images(*shape, dtype=np.uint8):
  return np.zeros(shape, dtype)


BATCH = images(2, 16, 16, 3)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (images(16, 16, 3), r"shape \(16, 16, 3\): give a batch, \[b, h, w, c\], or a list of images"),
    (images(16, 16), r"give a batch"),
    ([], r"give a batch"),
    (images(0, 16, 16, 3), r"shape \(0, 16, 16, 3\): give at least one of at least one pixel"),
    ([images(16, 16, 3), images(16, 20, 3)], r"shapes \(16, 16, 3\) and \(16, 20, 3\): resize them to one"),
    (images(2, 16, 16, 1), r"3 channels"),
    (images(2, 3, 16, 16), r"3 channels"),
    (images(2, 32, 32, 3), r"32x32 pixels: this model takes 16x16, give model.preprocess"),
    (images(2, 16, 20, 3), r"16x20 pixels"),
    (images(2, 16, 16, 3, dtype=np.int64), r"int64: give uint8"),
    (images(2, 16, 16, 3, dtype=bool), r"bool: give uint8"),
    (images(2, 16, 16, 3, dtype=np.float32) + 255, r"\[255, 255\]: scale them to \[0, 1\]"),
    (images(2, 16, 16, 3, dtype=np.float32) - 0.1, r"\[-0\.1, -0\.1\]"),
    (images(2, 16, 16, 3, dtype=np.float32) * np.nan, r"nan"),
  ],
)
@pytest.mark.parametrize("method", ["encode", "reconstruct", "features"])
def test_wrong_images(method, given, message, mage):
  with pytest.raises(UserError, match=message) as error:
    getattr(mage, method)(given)
  assert_clear(error)


@pytest.mark.parametrize(
  ("mask", "message"),
  [
    (np.ones((2, 8, 8), bool), r"pixel_mask has shape \(2, 8, 8\): it must be \(2, 16, 16\)"),
    (np.ones((3, 16, 16), bool), r"pixel_mask has shape \(3, 16, 16\)"),
    (np.ones((2, 16, 16, 3), bool), r"pixel_mask has shape"),
    (np.full((2, 16, 16), 128, np.uint8), r"pixel_mask has values other than 0 and 1: give booleans"),
    (np.full((16, 16), 0.5), r"pixel_mask has values other than 0 and 1"),
    (np.diag(np.arange(16)), r"pixel_mask has values other than 0 and 1"),
    ([[True], [True, False]], r"pixel_mask is ragged: give booleans"),
  ],
)
def test_wrong_pixel_masks(mask, message, mage):
  with pytest.raises(UserError, match=message) as error:
    mage.inpaint(BATCH, mask)
  assert_clear(error)


@pytest.mark.parametrize(
  ("tokens", "message"),
  [
    (np.zeros((2, 15), int), r"int64\[2, 15\]: give integers of shape \[b, 16\]"),
    (np.zeros(16, int), r"\[b, 16\]"),
    (np.zeros((0, 16), int), r"int64\[0, 16\]"),
    (np.zeros((2, 4, 4), int), r"\[b, 16\]"),
    (np.zeros((2, 16)), r"float64\[2, 16\]"),
    (np.full((2, 16), 32), r"32\.\.32: this model's codes are 0\.\.31"),
    (np.full((2, 16), -1), r"-1\.\.-1"),
    ([[0], [0, 1]], r"tokens is ragged: give integers of shape \[b, 16\]"),
  ],
)
@pytest.mark.parametrize("method", ["decode", "logits"])
def test_wrong_tokens(method, tokens, message, mage):
  more = () if method == "decode" else (np.ones((2, 16), bool),)
  with pytest.raises(UserError, match=message) as error:
    getattr(mage, method)(tokens, *more)
  assert_clear(error)


@pytest.mark.parametrize("mask", [np.ones((2, 15), bool), np.full((2, 16), 2)])
def test_wrong_token_masks(mask, mage):
  with pytest.raises(UserError, match=r"token_mask has (shape|values)") as error:
    mage.logits(np.zeros((2, 16), int), mask)
  assert_clear(error)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(step=3), r"no option 'step'; did you mean 'steps'\?"),
    (dict(guidance=3.0), r"guidance is 3\.0: guidance needs a model with classes or captions"),
    (dict(schedule="cosinus"), r"schedule 'cosinus' does not exist; did you mean 'cosine'\?"),
    (dict(steps=0), r"at least 1"),
    (dict(steps=2.5), r"steps"),
    (dict(temperature="hot"), r"temperature"),
    (dict(batch=0), r"batch is 0: give a whole number, at least 1"),
    (dict(batch=1.5), r"batch is 1\.5: give a whole number"),
    (dict(seed=None), r"seed is None: give a whole number"),
    (dict(seed=1.5), r"seed is 1\.5: give a whole number"),
    (dict(seed=True), r"seed is True: give a whole number"),
    (dict(seed=2**32 + 5), r"seed is 4294967301: give a whole number from 0 to 2\*\*32 - 1"),
    (dict(seed=2**64), r"seed is 18446744073709551616: give a whole number"),
  ],
)
def test_wrong_sampling_options(options, message, mage):
  with pytest.raises(UserError, match=message) as error:
    mage.generate(**({"batch": 2} | options))
  assert_clear(error)
  if "batch" not in options:
    with pytest.raises(UserError, match=message):
      mage.inpaint(BATCH, np.ones((16, 16), bool), **options)


@pytest.mark.parametrize(
  ("method", "arguments"),
  [
    ("generate", ()),
    ("features", (BATCH,)),
    ("inpaint", (BATCH, np.ones((16, 16), bool))),
    ("logits", (np.zeros((2, 16), int), np.ones((2, 16), bool))),
  ],
)
def test_methods_that_a_model_does_not_have(method, arguments, tokenizer):
  with pytest.raises(UserError, match=rf"'tokenizer' has no '{method}': call one of .*reconstruct") as error:
    getattr(tokenizer, method)(*arguments)
  assert_clear(error)


# Tools


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--out=grid.jpg"], r"--out=.*grid\.jpg: give the name of a \.png file"),
    (["--out=missing/grid.png"], r"missing"),
    (["--out=grid.png", "--count=0"], r"--count=0: give at least 1"),
    (["--out=grid.png", "--count=x"], r"--count: invalid int value: 'x'"),
    (["--out=grid.png", "--steps=0"], r"at least 1"),
    (
      ["--out=grid.png", "--cont=1"],
      r"arguments: --cont=1; did you mean --count instead of --cont\?",
    ),
    (["--out=grid.png", "--coun=1"], r"unrecognized arguments: --coun=1"),
    ([], r"give --out=FILE\.png for one picture, or --out_dir=DIR"),
  ],
)
def test_wrong_arguments_of_generate(arguments, message, trained, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=message) as error:
    generate.main([f"--model={trained / 'mage'}", *arguments])
  assert_clear(error)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tool", [generate, export])
def test_tools_with_a_folder_that_is_not_a_model(tool, trained, tmp_path):
  out = f"--out={tmp_path / 'out.png'}"
  for model, message in (
    (tmp_path / "missing", "does not exist"),
    (tmp_path, "is not a model"),
    (trained, "holds several stages"),
  ):
    with pytest.raises(UserError, match=message) as error:
      tool.main([f"--model={model}", out])
    assert_clear(error)
  assert not list(tmp_path.iterdir())


def test_generate_with_a_model_that_cannot(trained, tmp_path):
  with pytest.raises(UserError, match="'tokenizer' has no 'generate'"):
    generate.main([f"--model={trained / 'tokenizer'}", f"--out={tmp_path / 'a.png'}"])


def test_export_to_where_nothing_can_be_written(trained, tmp_path):
  (tmp_path / "file").write_text("x")
  for out in (tmp_path / "file", tmp_path / "file" / "below"):
    with pytest.raises(UserError, match="file") as error:
      export.main([f"--model={trained / 'tokenizer'}", f"--out={out}"])
    assert_clear(error)


# As a user sees them


def test_processes_end_with_code_2_and_one_line(trained, tmp_path):
  (tmp_path / "file").write_text("x")
  tokenizer = f"--config={tiny.FILE}:only=tokenizer"
  shutil.copytree(trained / "tokenizer", tmp_path / "run")
  (tmp_path / "run" / "results.json").unlink()
  commands = {
    "did you mean 'quickstart.py'": ["maskgen.main", "--config=quickstrat.py", f"--workdir={tmp_path}"],
    "is not writable": ["maskgen.main", tokenizer, f"--workdir={tmp_path / 'file'}"],
    "is not divisible by 8": [
      "maskgen.main", tokenizer, f"--workdir={tmp_path / 'new'}", "--config.batch_size=12",
    ],
    "holds another config's run": [
      "maskgen.main", tokenizer, f"--workdir={tmp_path / 'run'}", "--config.batch_size=16",
    ],
    "is not a model": ["maskgen.tools.generate", f"--model={tmp_path}", f"--out={tmp_path / 'a.png'}"],
  }  # fmt: skip
  processes = [(message, tiny.python("-m", *command)) for message, command in commands.items()]
  for message, process in processes:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors and output == ""
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_a_failing_start_leaves_one_line(trained, tmp_path):
  """Even if threads that read or write checkpoints are already running."""
  shutil.copytree(trained / "tokenizer", tmp_path / "run")
  (tmp_path / "run" / "results.json").unlink()
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  config["objective"]["tokenizer"]["codebook_size"] = 48
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  process = tiny.python(
    "-m",
    "maskgen.main",
    f"--config={tiny.FILE}:only=tokenizer",
    f"--workdir={tmp_path / 'run'}",
    "--config.objective.tokenizer.codebook_size=48",
  )
  _, errors = process.communicate(timeout=300)
  assert process.returncode == 2
  assert "does not fit this config" in errors and "Traceback" not in errors
