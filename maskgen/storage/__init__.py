"""Models on disk: checkpoints, frozen parts and exports; parameters are just trees here.

A workdir holds `config.json`, `checkpoints/STEP/` and, where the objective has frozen parts, `frozen/`,
written once. An export holds `config.json`, `weights.safetensors` and its checksum. Either has `assets/` if
its config names local files. Arrays are stored flat,
under their path names (`params/main/encoder/...`), so that a part of a model can be read without knowing the
rest.
"""

from maskgen.pretrained import CHECKPOINTS, locate
from maskgen.storage.assets import use_assets_if_gone, write_assets
from maskgen.storage.checkpoints import DAMAGED, Checkpoints, open_to_read
from maskgen.storage.frozen import read_frozen, read_frozen_arrays, write_frozen
from maskgen.storage.models import (
  CONFIG,
  averages,
  find_section,
  found_first,
  is_export,
  load_config,
  load_variables,
  model_section,
  read_chosen,
  resolve,
  write_export,
)
from maskgen.storage.tensors import WEIGHTS, to_host

__all__ = [
  "CHECKPOINTS",
  "CONFIG",
  "DAMAGED",
  "WEIGHTS",
  "Checkpoints",
  "averages",
  "find_section",
  "found_first",
  "is_export",
  "load_config",
  "load_variables",
  "locate",
  "model_section",
  "open_to_read",
  "read_chosen",
  "read_frozen",
  "read_frozen_arrays",
  "resolve",
  "to_host",
  "use_assets_if_gone",
  "write_assets",
  "write_export",
  "write_frozen",
]
