"""Configs: wrong names never pass, right ones arrive typed."""

import dataclasses
import json
import pathlib
from types import SimpleNamespace

import ml_collections
import pytest

from maskgen import config as config_lib
from maskgen import main
from maskgen.config import fields
from maskgen.data.preprocess import parse_preprocess
from maskgen.errors import UserError, nearest
from maskgen.models.vqgan import VQGAN
from maskgen.training import optim
from maskgen.training.sections import find_type

CONFIGS = sorted(p.name for p in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))

FILE = """
import ml_collections
from maskgen.config import parse_arg

def get_config(arg=None):
  args = parse_arg(arg, debug=False, size=4, rate=0.5, name="a")
  config = ml_collections.ConfigDict()
  config.debug, config.size, config.rate, config.name = args.debug, args.size, args.rate, args.name
  config.shape = (1, 2)
  config.limit = ml_collections.config_dict.placeholder(float)
  config.data = dict(source="digits", split="train")
  return config
"""


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "some_config.py"
  path.write_text(FILE)
  return str(path)


# Arguments after the colon


def test_arguments_have_the_types_of_their_defaults():
  args = config_lib.parse_arg("debug,size=3,rate=1,name=7", debug=False, size=1, rate=0.1, name="a", kept=5)
  assert vars(args) == dict(debug=True, size=3, rate=1.0, name="7", kept=5)
  assert isinstance(args.rate, float)


@pytest.mark.parametrize("arg", [None, ""])
def test_no_argument_leaves_the_defaults(arg):
  assert vars(config_lib.parse_arg(arg, debug=False, size=1)) == dict(debug=False, size=1)


@pytest.mark.parametrize(
  ("arg", "message"),
  [
    ("debgu", r"':debgu' does not exist; did you mean 'debug'\?"),
    ("zzzz=1", r"':zzzz' does not exist; known: debug, path, rate, size"),
    ("size=1.5", r"':size' is '1.5': it takes values of type int, such as 4"),
    ("size=big", r"':size' is 'big'"),
    ("size", r"':size' is 'True'"),
    ("rate=True", r"':rate' is 'True'"),
    ("debug=1", r"':debug' is '1': it takes values of type bool"),
    ("path=/a,b", r"':b' does not exist; known: .*, or quote the comma: path='/a,b'$"),
  ],
)
def test_wrong_arguments_are_named(arg, message):
  with pytest.raises(UserError, match=message):
    config_lib.parse_arg(arg, debug=False, size=4, rate=0.5, path="")


@pytest.mark.parametrize(
  ("arg", "path"),
  [
    ("path='/a,b',debug", "/a,b"),
    ('debug,path="it\'s, here"', "it's, here"),
    ("path=/it's,debug", "/it's"),
    ("path=/a=b,,debug", "/a=b"),
    ("path=,debug", ""),
  ],
)
def test_texts_may_contain_commas(arg, path):
  assert config_lib.parse_arg(arg, path="/x", debug=False) == SimpleNamespace(path=path, debug=True)


# Files


def test_load_gives_a_locked_config(file):
  config = config_lib.load(f"{file}:size=8,debug")
  assert config.size == 8 and config.debug is True and config.name == "a"
  with pytest.raises((AttributeError, KeyError)):
    config.data.splt = "test"


def test_load_twice_gives_independent_configs(file):
  config_lib.load(file).size = 99
  assert config_lib.load(file).size == 4


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", ["{name}", "configs/{name}"])
def test_shipped_configs_are_found_from_any_folder(form, name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert config_lib.find_file(form.format(name=name)).is_file()


def test_a_file_elsewhere_is_not_replaced_by_a_shipped_one_of_its_name(tmp_path):
  with pytest.raises(UserError, match="does not exist"):
    config_lib.find_file(str(tmp_path / "quickstart.py"))


def test_a_missing_file_offers_the_nearest():
  with pytest.raises(UserError, match=r"quickstrat\.py does not exist; did you mean 'quickstart\.py'\?"):
    config_lib.load("configs/quickstrat.py")


STAGES = "import ml_collections\ndef get_config(arg): return ml_collections.ConfigDict({})"


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("a.py", "x = 1", r"has no function get_config\(arg\)"),
    ("a.py", "get_config = 3", r"has no function get_config\(arg\)"),
    ("a.py", "def get_config(): return None", r"has no function get_config\(arg\)"),
    ("a.py", "def get_config(:", "is not valid Python"),
    ("a.py", "x = '\0'", "a.py (is not valid Python|fails)"),
    ("a.py", "\nimport nothing_at_all", r"a\.py fails in line 2 \(ModuleNotFoundError: .*\): correct it"),
    ("a.py", "def get_config(arg):\n  raise ValueError('a\\nb')", r"fails in line 2 \(ValueError: a b\)"),
    ("a.py", "def get_config(arg): return None", "get_config of .* returns NoneType: let it return"),
    ("a.py", "def get_config(arg): return {}", "get_config of .* returns dict: let it return"),
    ("a.py", STAGES.format("dict(stages=3)"), "config.stages is 3: give a tuple"),
    ("a.py", STAGES.format("dict(stages=('a',), a=None)"), "config.a is None: give the config"),
    ("a.txt", "x = 1", "is not a Python file"),
  ],
)
def test_files_that_are_not_configs(name, text, message, tmp_path):
  (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=message):
    config_lib.load(str(tmp_path / name))


# Configs that build on others


def test_a_comma_survives_configs_that_build_on_others(tmp_path):
  (tmp_path / "base.py").write_text(
    "import ml_collections\nfrom maskgen.config import parse_arg\n\n\ndef get_config(arg):\n"
    "  return ml_collections.ConfigDict(dict(path=parse_arg(arg, path='').path))\n"
  )
  assert config_lib.load_beside(str(tmp_path / "mine.py"), "base.py", path="/a,b").path == "/a,b"


def test_a_config_builds_on_the_file_beside_it(tmp_path):
  (tmp_path / "mage_base.py").write_text(
    "import ml_collections\n\n\ndef get_config(arg):\n  return ml_collections.ConfigDict(dict(given=arg))\n"
  )
  mine = str(tmp_path / "mine.py")
  config = config_lib.load_beside(mine, "mage_base.py", "rate=2,size=4", size=3, debug=True)
  assert config.given == "size=3,debug=True,rate=2,size=4"
  config.new_key = 1  # it is not locked


@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_elsewhere_is_the_same_config(name, repository, tmp_path):
  """The files that it builds on stay in place."""
  copy = tmp_path / name
  copy.write_text((repository / "configs" / name).read_text())
  for arg in ("", ":debug"):
    assert config_lib.load(f"{copy}{arg}") == config_lib.load(f"configs/{name}{arg}")


def test_stages_share_no_section():
  """Two stages of a config may share a section; a change in one stage does not affect the other."""
  config = config_lib.load("configs/mage_class_cond.py:tiny", {"mage.checkpoint.save_steps": "7"})
  assert config.mage.checkpoint.save_steps == 7
  assert config.mage_class_cond.checkpoint.save_steps != 7


@pytest.mark.parametrize("name", ["mage_base", "mage_large", "probe_mage", "fewshot_mage"])
def test_sizes_that_do_not_exist_are_named(name):
  with pytest.raises(UserError, match=r"':size=bsae' does not exist; did you mean 'base'\?"):
    config_lib.load(f"configs/{name}.py:size=bsae")


def test_recipes_of_mage_augment_as_the_reference():
  """`main_linprobe.py`, `util/datasets.py` and the flags of `main_finetune.py` in the authors' repository."""
  probe, *finetune = (
    config_lib.load(f"configs/{name}_mage.py").data for name in ("probe", "finetune", "fewshot")
  )
  assert probe.preprocess == "decode(3)|random_resized_crop(256, (0.2, 1.0), 'bicubic', clamp=True)|flip_lr"
  for data in (probe, *finetune):
    assert data.eval_preprocess == "decode(3)|resize_small(292, 'bicubic')|center_crop(256)"
  for data in finetune:
    _, crop, _, augment = parse_preprocess(data.preprocess).ops
    arguments = dict(scale=(0.2, 1.0), method="bicubic", clamp=False)
    assert arguments.items() <= crop.arguments.items()
    arguments = dict(layers=2, magnitude=9.0, std=0.5, increasing=True, method="bicubic")
    assert augment.arguments == arguments | {"fill": tuple(round(255 * x) for x in (0.485, 0.456, 0.406))}


# Overrides


def test_overrides_take_the_type_of_what_they_replace(file):
  config = config_lib.load(
    file, {"size": "16", "rate": "2", "name": "5", "shape": "[3, 4]", "data.split": "test", "debug": "True"}
  )
  assert config.size == 16 and config.name == "5" and config.shape == (3, 4) and config.debug is True
  assert config.rate == 2.0 and isinstance(config.rate, float)
  assert config.data.split == "test" and config.data.source == "digits"


@pytest.mark.parametrize(("text", "value"), [("3.5", 3.5), ("None", None)])
def test_overrides_of_nothing_take_anything(file, text, value):
  assert config_lib.load(file, {"limit": text}).limit == value


@pytest.mark.parametrize(
  ("key", "text", "message"),
  [
    ("siez", "1", r"config has no key 'siez'; did you mean 'size'\?"),
    ("dat.source", "x", r"config has no key 'dat'; did you mean 'data'\?"),
    ("size.a", "1", r"config\.size has no key 'a'"),
    ("data", "x", r"config\.data is a group of keys: set one of data\.source, data\.split"),
    ("size", "1.5", r"config\.size is '1\.5': it takes values of type int, such as 4"),
    ("size", "", r"config\.size is ''"),
    ("shape", "3", r"config\.shape is '3': it takes values of type tuple"),
    ("debug", "yes", r"config\.debug is 'yes': it takes values of type bool"),
    ("", "1", "has no key ''"),
  ],
)
def test_wrong_overrides_are_named(file, key, text, message):
  with pytest.raises(UserError, match=message):
    config_lib.load(file, {key: text})


# Plain configs


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("arg", ["", ":debug", ":tiny"])
def test_shipped_configs_survive_json(name, arg):
  config = config_lib.to_dict(config_lib.load(f"configs/{name}{arg}"))
  assert json.loads(json.dumps(config)) == config
  assert not config_lib.difference(config, json.loads(json.dumps(config)))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("arg", ["", ":debug", ":tiny", ":debug,tiny"])
def test_shipped_configs_have_only_keys_that_are_read(name, arg):
  config = config_lib.to_dict(config_lib.load(f"configs/{name}{arg}"))
  for stage in config.get("stages", [None]):
    section = config if stage is None else config[stage]
    run = config_lib.build_dataclass(config_lib.RunConfig, section, "config")
    assert run.batch_size == section["batch_size"]


def test_to_dict_is_plain():
  nested = ml_collections.ConfigDict(dict(a=dict(b=(1, [2, dict(c=3)]))))
  plain = config_lib.to_dict(nested)
  assert plain == {"a": {"b": [1, [2, {"c": 3}]]}}
  assert type(plain["a"]) is dict and type(plain["a"]["b"][1][1]) is dict


# Dataclasses from sections


@dataclasses.dataclass(frozen=True)
class Inner:
  depth: int = 1

  def __post_init__(self):
    if self.depth < 1:
      raise UserError("the depth is too small")


@dataclasses.dataclass(frozen=True)
class Outer:
  width: int
  inner: Inner = Inner()
  shape: tuple = ()
  free: dict = dataclasses.field(default_factory=dict)
  made: int = dataclasses.field(default=0, init=False)


def test_build_dataclass_nests_and_makes_tuples():
  section = {"width": 3, "inner": {"depth": 2}, "shape": [[1, [2]], 3], "free": {"x": 1}}
  built = config_lib.build_dataclass(Outer, section, "config.outer")
  assert built == Outer(3, Inner(2), ((1, (2,)), 3), {"x": 1})


@pytest.mark.parametrize(
  ("section", "message"),
  [
    ({"width": 1, "shap": 1}, r"^config\.outer has no key 'shap'; did you mean 'shape'\?$"),
    ({"width": 1, "inner": {"dept": 1}}, r"^config\.outer\.inner has no key 'dept'; did you mean 'depth'\?$"),
    ({"width": 1, "inner": {"depth": 0}}, r"config\.outer\.inner: the depth is too small$"),
    ({"inner": {}}, r"^config\.outer needs the key 'width'$"),
    ({"width": 1, "made": 2}, "has no key 'made'"),
  ],
)
def test_build_dataclass_is_strict(section, message):
  with pytest.raises(UserError, match=message):
    config_lib.build_dataclass(Outer, section, "config.outer")


def test_what_the_caller_gives_cannot_be_set_in_the_section():
  assert config_lib.build_dataclass(Outer, {}, "config.outer", width=5).width == 5
  with pytest.raises(UserError, match="has no key 'width'"):
    config_lib.build_dataclass(Outer, {"width": 1}, "config.outer", width=5)


def test_nearest_offers_one_close_name_or_all():
  assert nearest("digts", ["digits", "folder"]) == "; did you mean 'digits'?"
  assert nearest("qqq", ["b", "a"]) == "; known: a, b"
  assert nearest("qqq", []) == ""


# Durations


@dataclasses.dataclass
class Lengths:
  total_steps: int | None = None
  total_epochs: float | None = None


@pytest.mark.parametrize(
  ("lengths", "default", "expected"),
  [
    (Lengths(total_steps=7), None, 7),
    (Lengths(total_epochs=3), None, 75),
    (Lengths(total_epochs=0.5), None, 12),
    (Lengths(total_epochs=0), 9, 0),
    (Lengths(), 9, 9),
    (Lengths(total_steps=0), 9, 0),
  ],
)
def test_durations_become_steps(lengths, default, expected):
  # 100 examples in batches of 4 are 25 steps an epoch.
  assert config_lib.duration(lengths, "total", 4, 100, default=default) == expected


@pytest.mark.parametrize(
  ("lengths", "message"),
  [(Lengths(1, 1.0), "are both set"), (Lengths(), "needs the key 'total_steps' or 'total_epochs'")],
)
def test_a_duration_is_given_once(lengths, message):
  with pytest.raises(UserError, match=message):
    config_lib.duration(lengths, "total", 4, 100)


# Renamed keys


@dataclasses.dataclass(frozen=True)
class Renamed:
  width: int = fields.renamed(1, was="channels")
  inner: Inner = Inner()


def test_a_renamed_key_is_read_and_warned_of_once(caplog):
  for _ in range(2):
    assert config_lib.build_dataclass(Renamed, {"channels": 3}, "config.net") == Renamed(3)
  assert [record.getMessage() for record in caplog.records] == [
    "config.net.channels is now called 'width': rename the key"
  ]
  assert config_lib.build_dataclass(Renamed, {"width": 3}, "config.net") == Renamed(3)


def test_a_renamed_key_is_strict():
  with pytest.raises(UserError, match=r"^config\.net has both 'channels' and its new name 'width': remove"):
    config_lib.build_dataclass(Renamed, {"channels": 3, "width": 3}, "config.net")
  with pytest.raises(UserError, match=r"config\.net\.width is 'a': it takes values of type int"):
    config_lib.build_dataclass(Renamed, {"channels": "a"}, "config.net")


# Differences


OLD = {"seed": 1, "data": {"source": "digits"}, "mesh": {"data": -1}, "log_every_steps": 5}


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({}, []),
    ({"seed": 2}, ["seed: 1 -> 2"]),
    ({"data": {"source": "synthetic"}}, ["data.source: digits -> synthetic"]),
    ({"new": 3}, ["new: (absent) -> 3"]),
    ({"mesh": {"data": 2}, "log_every_steps": 9, "accumulation": 2}, []),
    ({"checkpoint": {"keep": 9}, "profile": {"steps": 3}, "sharding": [["a", []]]}, []),
    ({"evals": {"loss": {"type": "loss"}}}, []),
    # A key elsewhere that is only called like an operational one counts.
    ({"data": {"source": "digits", "inner": {"mesh": 1}}}, ["data.inner.mesh: (absent) -> 1"]),
  ],
)
@pytest.mark.parametrize("staged", [False, True])
def test_difference_names_what_changes_numbers(changes, expected, staged):
  new = OLD | changes
  if staged:
    expected = [f"first.{line}" for line in expected]
    stages = {"stages": ["first"]}
    assert config_lib.difference(stages | {"first": OLD}, stages | {"first": new}) == expected
  else:
    assert config_lib.difference(OLD, new) == expected


def test_what_flags_override():
  overrides = {"mage.batch_size": "8", "mage.log_every_steps": "7", "mage.evals.x.type": "loss"}
  file = "configs/quickstart.py"
  defaults, config = (config_lib.to_dict(config_lib.load(file, given)) for given in ({}, overrides))
  assert config_lib.overridden(defaults, defaults) == {}
  found = config_lib.overridden(defaults, config)
  assert found == {
    "mage.batch_size": (defaults["mage"]["batch_size"], 8),
    "mage.log_every_steps": (defaults["mage"]["log_every_steps"], 7),
    "mage.evals.x.type": (None, "loss"),
  }


def test_difference_sees_removed_keys_and_empty_groups():
  assert config_lib.difference({"a": 1, "b": 2}, {"a": 1}) == ["b: 2 -> (absent)"]
  assert config_lib.difference({"ema": {}}, {"ema": {"main": 0.9}})


@pytest.mark.parametrize(
  ("old", "new", "expected"),
  [
    ({"name": "diffusion"}, {"name": "diffusion", "unet": {"remat": "full"}}, []),
    (
      {"name": "diffusion", "unet": {"width": 8}},
      {"name": "diffusion", "unet": {"width": 9, "remat": "full"}},
      ["objective.unet.width: 8 -> 9"],
    ),
    # Sections within an objective's section, which name their own class.
    (
      {"name": "vilex", "encoder": {"name": "vit"}, "decoder": {"name": "diffusion", "unet": {}}},
      {
        "name": "vilex",
        "encoder": {"name": "vit", "remat": "full", "scan": True},
        "decoder": {"name": "diffusion", "unet": {"remat": "dots"}, "text_encoder": {"attention": "xla"}},
        "attention": "xla",
      },
      [],
    ),
    (
      {"name": "vilex", "decoder": {"name": "diffusers"}},
      {"name": "vilex", "decoder": {"name": "diffusers", "remat": "full"}},
      [],
    ),
    ({"dtype": "float32"}, {"dtype": "bfloat16"}, ["objective.dtype: float32 -> bfloat16"]),
    # A class that does not have the field, or that does not exist.
    ({}, {"unet": {"remat": "full"}}, ["objective.unet.remat: (absent) -> full"]),
    ({"name": "unknown"}, {"name": "unknown", "remat": "full"}, ["objective.remat: (absent) -> full"]),
  ],
)
def test_how_nested_networks_are_run_does_not_matter(old, new, expected):
  old, new = ({"objective": {"name": "mage"} | section} for section in (old, new))
  assert config_lib.difference(old, new, find_type) == expected


def test_a_workdir_continues_with_other_remat(tmp_path):
  config = {"objective": {"name": "diffusion", "unet": {"width": 8}}, "seed": 1}
  (tmp_path / "config.json").write_text(json.dumps(config | {"version": "0.1"}))
  main.check_same_run(tmp_path, config, "train")
  changed = {"name": "diffusion", "unet": {"width": 8, "remat": "full"}}
  main.check_same_run(tmp_path, config | {"objective": changed}, "train")
  with pytest.raises(UserError, match=r"holds another config's run \(seed: 1 -> 2\)"):
    main.check_same_run(tmp_path, config | {"seed": 2}, "train")


@pytest.mark.parametrize("written", ["channels", "width"])
@pytest.mark.parametrize("given", ["channels", "width"])
@pytest.mark.parametrize("stage", ["", "second"])
def test_an_override_finds_a_renamed_key(written, given, stage, tmp_path):
  run = f"dict(objective=dict({written}=3), data=dict())"
  config = f"dict(stages=('{stage}',), {stage}={run})" if stage else run
  file = tmp_path / "renamed.py"
  file.write_text(
    f"import ml_collections\ndef get_config(arg=None):\n  return ml_collections.ConfigDict({config})\n"
  )

  def find(path, section):
    return Renamed if path == ("objective",) else None

  key = f"{stage}.objective.{given}".lstrip(".")
  found = config_lib.load(str(file), {key: "4"}, find)
  section = found[stage].objective if stage else found.objective
  assert section.to_dict() == {written: 4}
  with pytest.raises(UserError, match=rf"{given} is 'a': it takes values of type int"):
    config_lib.load(str(file), {key: "a"}, find)


def test_overrides_add_sections_of_an_objective_and_no_others():
  file = "configs/diffusion_digits.py:debug"
  assert config_lib.load(file, {"objective.inner.depth": "2"}).objective.inner.depth == 2
  with pytest.raises(UserError, match=r"config\.data has no key 'inner'"):
    config_lib.load(file, {"data.inner.depth": "2"})


def test_a_renamed_key_makes_no_difference():
  def find(path, section):
    return Renamed if path == ("objective",) else None

  old, new = ({"objective": {name: 3, "inner": {"depth": 2}}} for name in ("channels", "width"))
  assert not config_lib.difference(old, new, find)
  new["objective"]["width"] = 4
  assert config_lib.difference(old, new, find) == ["objective.width: 3 -> 4"]


def test_an_absent_key_has_its_default():
  old, new = ({"objective": {"name": "mage", **section}} for section in ({}, {"width": 768, "dropout": 0.0}))
  assert config_lib.difference(old, new, find_type) == ["objective.dropout: 0.1 -> 0.0"]


def test_a_classifier_is_compared_however_its_config_says_it():
  """Restated fields are the encoder's, of a MAGE only its encoder counts, layer decay is multipliers."""
  encoder = {"image_size": [16, 16], "width": 16}
  old = {"name": "classify", "classes": 10, **encoder, "remat": "full"}
  new = {"name": "classify", "classes": 10, "encoder": {"name": "mage", **encoder, "decoder_width": 8}}
  rules = [list(rule) for rule in reversed(optim.layer_decay(0.7, 3))]
  optimizers = {"learning_rate": 1e-3, "multipliers": rules}, {"learning_rate": 1e-3, "layer_decay": 0.7}
  before, after = (
    {"objective": objective, "optimizer": {"main": optimizer}, "pretrained": {name: "runs/mage"}}
    for objective, optimizer, name in zip((old, new), optimizers, ("mage", "encoder"), strict=True)
  )
  assert not config_lib.difference(before, after, find_type)
  new["encoder"]["width"], rules[0][1] = 32, 0.8
  assert config_lib.difference(before, after, find_type) == [
    "objective.encoder.width: 16 -> 32",
    "optimizer.main.layer_decay: None -> 0.7",
    f"optimizer.main.multipliers: {rules} -> []",
  ]


@pytest.mark.parametrize("written", [{"steps": 3}, {"sampling": {"steps": 3}}], ids=["beside", "within"])
@pytest.mark.parametrize("given", ["steps", "sampling.steps"])
def test_an_override_finds_a_moved_key(written, given, tmp_path):
  section = {"type": "generation", "every_steps": 1} | written
  run = {"objective": {"name": "mage"}, "data": {}, "optimizer": {}, "evals": {"made": section}}
  file = tmp_path / "moved.py"
  file.write_text(
    f"import ml_collections\ndef get_config(arg=None):\n  return ml_collections.ConfigDict({run})\n"
  )
  found = config_lib.load(str(file), {f"evals.made.{given}": "4"}, find_type).evals.made.to_dict()
  evaluator = find_type(("evals", "made"), found)
  assert fields.current_names(evaluator, found)["sampling"] == {"steps": 4}


def test_values_of_a_wrong_type_in_a_section_are_named():
  for key, value, kind in (
    ("channels", "a", "int"),
    ("channels", 16.0, "int"),
    ("normalize_codes", 1, "bool"),
    ("multipliers", 3, "tuple"),
    ("dtype", 3, "str"),
  ):
    with pytest.raises(UserError, match=rf"net\.{key} is {value!r}: it takes values of type {kind}"):
      config_lib.build_dataclass(VQGAN, {key: value}, "net")
