"""docs/recipes.md says of every full-size recipe what is published, and the configs are what it says."""

import json
import pathlib
import re

import pytest

from maskgen import config as config_lib
from maskgen.training import optim
from maskgen.training.pretrained import complete

ROOT = pathlib.Path(__file__).parents[1]


def read_rows() -> list[tuple[str, str, str, str]]:
  """Config, key, published value and value here of each row."""
  rows, config = [], ""
  for line in (ROOT / "docs/recipes.md").read_text().splitlines():
    if title := re.fullmatch(r"## `(configs/.*\.py)`", line):
      config = title[1]
    elif line.startswith("| `"):
      _, key, published, here, _, _ = (c.strip().replace(r"\|", "|") for c in re.split(r"(?<!\\)\|", line))
      rows.append((config, key.strip("`"), published, here))
  return rows


ROWS = read_rows()


@pytest.mark.parametrize("file", sorted({row[0] for row in ROWS}))
def test_recipes_are_as_documented(file):
  config = complete(config_lib.to_dict(config_lib.load(file)))
  for _, key, published, here in (row for row in ROWS if row[0] == file):
    assert here != published, f"{key} is the same in both columns"
    stated = here or published
    assert re.fullmatch("`.*`", stated), f"{key} has no value"
    value = find(config, key)
    assert normal(value) == normal(eval(stated.strip("`"), {"dict": dict})), key


def test_every_full_size_config_has_a_table():
  without = {"quickstart", "diffusion_digits", "vilex_digits", "folder_256", "mage_cifar"}  # all our own
  without |= {"arena"}  # as mage_cifar
  without |= {"emoji", "vilex_emoji"}  # likewise
  without |= {"mage_text_cond", "mage_c_large", "vilex_sd21", "vilex_sdxl"}  # as another
  tables = {pathlib.Path(row[0]).stem for row in ROWS}
  assert tables == {path.stem for path in (ROOT / "configs").glob("*.py")} - without


def find(config: dict, key: str):
  """The value of a dotted key; of a key of an optimizer that the config does not set, its default."""
  *parents, name = key.split(".")
  for parent in parents:
    config = config[parent]
  return config[name] if parents[:1] != ["optimizer"] else config.get(name, getattr(optim.Optimizer, name))


def normal(value):
  return json.loads(json.dumps(value))
