"""Configs: files that return a `ConfigDict`, and the dataclasses built from its sections."""

from maskgen.config.build import (
  DTYPES,
  MAX_SEED,
  build_dataclass,
  check_at_least,
  check_dtype,
  check_seed,
  check_share,
  duration,
)
from maskgen.config.changes import difference, overridden
from maskgen.config.loading import (
  choose,
  find_file,
  load,
  load_beside,
  parse_arg,
  shipped,
  split_path,
  to_dict,
  without_origin,
)
from maskgen.config.rules import BLOCK_RULES, TRANSFORMER_RULES
from maskgen.config.schema import Checkpointing, Mesh, Profile, RunConfig
from maskgen.config.words import words_beside

__all__ = [
  "BLOCK_RULES",
  "DTYPES",
  "MAX_SEED",
  "TRANSFORMER_RULES",
  "Checkpointing",
  "Mesh",
  "Profile",
  "RunConfig",
  "build_dataclass",
  "check_at_least",
  "check_dtype",
  "check_seed",
  "check_share",
  "choose",
  "difference",
  "duration",
  "find_file",
  "load",
  "load_beside",
  "overridden",
  "parse_arg",
  "shipped",
  "split_path",
  "to_dict",
  "without_origin",
  "words_beside",
]
