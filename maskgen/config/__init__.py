"""Configs: files that return a `ConfigDict`, and the dataclasses that its sections become."""

from maskgen.config.build import DTYPES, build_dataclass, check_at_least, check_dtype, duration
from maskgen.config.changes import difference
from maskgen.config.loading import find_file, load, parse_arg, to_dict
from maskgen.config.schema import Checkpointing, Mesh, Profile, RunConfig

__all__ = [
  "DTYPES",
  "Checkpointing",
  "Mesh",
  "Profile",
  "RunConfig",
  "build_dataclass",
  "check_at_least",
  "check_dtype",
  "difference",
  "duration",
  "find_file",
  "load",
  "parse_arg",
  "to_dict",
]
