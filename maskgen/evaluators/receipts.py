"""Receipts: what numbers were computed from, so that others can compare them and compute them again.

A receipt is a JSON object. Most of it are facts, which must be the same when the numbers are computed again:
hashes of models, data and networks, and all options. `versions`, `layout` and `command` say in which
surroundings that was; the numbers are then the same up to rounding. docs/evaluation.md describes the keys.
"""

import dataclasses
import json
import logging
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from maskgen import compile_cache, files
from maskgen.errors import UserError
from maskgen.evaluators.context import Evaluator
from maskgen.evaluators.statistics_files import versions

log = logging.getLogger("maskgen")

FILE = "receipts.json"
SURROUNDINGS = ("versions", "layout", "command")
# What a run's receipt says of an evaluation beside its options.
NOT_OPTIONS = ("type", "numbers", "networks", "versions")
# The largest relative difference between numbers that were computed in other surroundings.
TOLERANCE = 1e-6
_AGAIN = "restore what it was made from, or evaluate again"


def of_evaluator(evaluator: Evaluator) -> dict[str, Any]:
  """The options of an evaluator, its feature networks, and what its method `facts` adds, if it has one."""
  declared: Any = evaluator
  names = [field.name for field in dataclasses.fields(declared) if field.init and field.name != "context"]
  options: dict[str, Any] = {name: getattr(evaluator, name) for name in names}
  if "sampling" in options:
    options["sampling"] = declared.context.full_sampling(options["sampling"])
  if networks := declared.context.networks:
    options["networks"] = networks
  return {**options, **(evaluator.facts() if hasattr(evaluator, "facts") else {})}


def surroundings(**layout: Any) -> dict[str, Any]:
  """The versions, the layout of devices and processes with further details of it, and the command."""
  devices = jax.devices()
  return {
    "versions": versions(),
    "layout": {
      "platform": devices[0].platform,
      "device": devices[0].device_kind,
      "machine": compile_cache.machine(),
      "devices": len(devices),
      "processes": jax.process_count(),
      "matmul_precision": jax.config.values["jax_default_matmul_precision"],
      **layout,
    },
    "command": shlex.join(["python", *sys.orig_argv[1:]]),
  }


def plain(receipt: Mapping[str, Any]) -> dict[str, Any]:
  """A receipt as it is read from a file."""
  found: dict[str, Any] = json.loads(_to_json(receipt))
  return found


def _to_json(receipt: Mapping[str, Any]) -> str:
  return json.dumps(receipt, indent=2, default=str)


def write(folder: epath.Path, receipt: Mapping[str, Any]) -> None:
  """Writes `receipts.json` in process 0."""
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    files.replace(folder / FILE, _to_json(receipt))


def read(path: epath.Path, needs: Mapping[str, type]) -> dict[str, Any]:
  """Reads a receipt.

  Args:
    path: of the JSON file.
    needs: the types of its parts by name, with a dot between nested ones.

  Raises:
    UserError: if it is damaged, or lacks one of them.
  """
  if not path.exists():
    raise UserError(f"{path} does not exist, which records what numbers come from: evaluate again")
  receipt = files.read_json(path, _AGAIN)
  for name, kind in {**needs, "versions": dict, "layout": dict, "command": str}.items():
    part: Any = receipt
    for key in name.split("."):
      part = part.get(key) if isinstance(part, dict) else None
    if not isinstance(part, kind):
      raise UserError(f"{path} lacks '{name}', which a receipt has: {_AGAIN}")
  return receipt


def check(recorded: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
  """Checks that facts are those of a receipt.

  Args:
    recorded: the facts of the receipt.
    found: what they are now, in the order in which they are compared.
    where: names the receipt.

  Raises:
    UserError: naming the first that differs.
  """
  theirs, ours = dict(_flatten(recorded)), dict(_flatten(plain(found)))
  for key in dict.fromkeys((*ours, *theirs)):
    if key not in theirs:
      raise UserError(f"{where} lacks '{key}', which a receipt has: {_AGAIN}")
    if key not in ours:
      raise UserError(f"{where} has '{key}', which does not apply to what it was made from: {_AGAIN}")
    if theirs[key] != ours[key]:
      raise UserError(f"{where}: {key} is {_show(theirs[key])}, but now {_show(ours[key])}: {_AGAIN}")


def check_numbers(
  recorded: Mapping[str, Any], found: Mapping[str, float], elsewhere: Sequence[str], where: str
) -> None:
  """Compares the numbers of a receipt with those that were computed again.

  Numbers that the receipt lacks, as one of an older version may, are logged.

  Args:
    recorded: the numbers of the receipt.
    found: the others.
    elsewhere: see `elsewhere`; without any the numbers must be equal in every bit.
    where: names the receipt.

  Raises:
    UserError: naming the first that differs or is no longer measured.
  """
  for name, value in recorded.items():
    if name not in found:
      raise UserError(f"{where} has {name}, which is not what its evaluation measures: {_AGAIN}")
    if not _equal(value, found[name], TOLERANCE if elsewhere else 0.0):
      again = f"{found[name]!r} when computed again"
      reason = f" (made with {', '.join(elsewhere)})" if elsewhere else ""
      raise UserError(f"{where}: {name} is {value!r}, but {again}{reason}: {_AGAIN}")
  if lacking := sorted(found.keys() - recorded.keys()):
    log.warning("%s lacks %s, which its evaluation also measures now", where, ", ".join(lacking))


def elsewhere(receipt: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """Why numbers that are computed now may differ from those of a receipt by rounding.

  Args:
    receipt: the receipt.
    now: the present `surroundings`.

  Returns:
    Phrases such as `jax 0.8.0 instead of 0.9.0`; empty on CPUs in the same layout with the same versions.
  """
  now = plain(now)
  found = []
  for part in ("layout", "versions"):
    theirs, ours = dict(_flatten(receipt[part])), dict(_flatten(now[part]))
    found += [
      f"{key} {_show(theirs.get(key))} instead of {_show(ours.get(key))}"
      for key in dict.fromkeys((*ours, *theirs))
      if theirs.get(key) != ours.get(key)
    ]
  if not found and now["layout"]["platform"] != "cpu":
    found.append(f"a {now['layout']['device']}, which may order sums differently")
  return found


def _equal(a: Any, b: float, tolerance: float) -> bool:
  if not isinstance(a, int | float) or isinstance(a, bool):
    return False
  return a == b or math.isclose(a, b, rel_tol=tolerance) or (math.isnan(a) and math.isnan(b))


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
  """The values of nested objects by dotted names; lists are values."""
  if isinstance(value, Mapping) and value:
    for key, inner in value.items():
      yield from _flatten(inner, f"{name}.{key}".lstrip("."))
  else:
    yield name, value


def _show(value: Any) -> str:
  text = str(value)
  is_hash = len(text) == 64 and text.isalnum()
  return f"{text[:12]}..." if is_hash else repr(value) if value in ("", None) else text
