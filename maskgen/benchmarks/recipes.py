"""Recipes of `configs/` as plain data, for machines that run benchmarks and cannot read config files.

Config files need ml-collections. `python -m maskgen.benchmarks.recipes` writes `recipes.json` anew after one
of them has changed.
"""

import json
import pathlib
from typing import Any

from maskgen import main as main_lib

FILE = pathlib.Path(__file__).with_name("recipes.json")
# The config, and its stage.
_CONFIGS: dict[str, tuple[str, str | None]] = {
  "mage_base": ("mage_base.py", None),
  "mage_large": ("mage_large.py", None),
  "vqgan": ("vqgan_imagenet.py", None),
  "mage_tiny": ("quickstart.py:debug", "mage"),
  "vqgan_tiny": ("quickstart.py:debug", "tokenizer"),
}
_KEYS = (
  "batch_size",
  "total_steps",
  "total_epochs",
  "objective",
  "optimizer",
  "ema",
  "pretrained",
  "sharding",
)


def read(name: str) -> dict[str, Any]:
  """The plain config of a recipe, without data and evaluations."""
  recipe: dict[str, Any] = json.loads(FILE.read_text())[name]
  return recipe | {"data": {"source": "random"}}


def current() -> dict[str, Any]:
  """All recipes, read from the config files."""
  chosen = {name: main_lib.choose_stage(path, {}, stage)[1] for name, (path, stage) in _CONFIGS.items()}
  plain: dict[str, Any] = json.loads(json.dumps(chosen))
  return {name: {key: config[key] for key in _KEYS if config.get(key)} for name, config in plain.items()}


if __name__ == "__main__":
  FILE.write_text(json.dumps(current(), indent=1) + "\n")
