"""Warm starts: the parameters of another model, and nothing else of it, in the place of fresh ones."""

import re
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from maskgen import objectives, sharding, storage, tree
from maskgen.errors import UserError
from maskgen.numerics.positions import Positions, interpolate
from maskgen.storage.tensors import place

TAKEN, INTERPOLATED, FRESH = "taken", "interpolated", "fresh"
ABSENT = "fresh: the source has none"
UNUSED = "not used"
REFUSED = "refused"
Row = tuple[str, str, str]


class WarmStart:
  """What a run takes from another model: parameters of the same path name and shape.

  A table of positions of another grid is interpolated. Any other difference is refused unless the config
  leaves the parameter fresh, or the source lacks its whole group, as an export may lack a discriminator.
  `report` says what became of every parameter of either side.
  """

  def __init__(self, path: epath.Path, objective: objectives.Objective, params: Any, fresh: str = ""):
    """Compares names and shapes; reads no array.

    Args:
      path: of the source, a workdir or an export.
      objective: of the run.
      params: of the run, by group: a tree of shapes with shardings.
      fresh: a regular expression, searched in the names of parameters; those are left fresh. Empty for none.

    Raises:
      UserError: if the source is not a model or does not fit.
    """
    self._path, self._fresh = path, fresh
    self._params, self._positions = tree.flatten(params), _positions(objective)
    self._source_positions: Mapping[str, Positions] = {}
    self._differences: Mapping[str, tuple[Any, Any]] = {}
    config = storage.load_config(path)
    if "objective" in config:
      source = objectives.build(config["objective"])
      self._source_positions = _positions(source)
      self._differences = objectives.differences(source, objective)
    self._sizes: dict[str, int] = {}
    self._outcomes: dict[str, str] = {}
    storage.read_chosen(path, self._compare)

  def take(self) -> dict[str, jax.Array]:
    """Reads the parameters that are taken, by path name, each onto its devices."""
    found = storage.read_chosen(self._path, self._targets)
    arrays = {name.removeprefix("params/"): array for name, array in found.items()}
    for name, array in arrays.items():
      if self._outcomes[name].startswith(INTERPOLATED):
        table = interpolate(array, self._source_positions[name], self._positions[name])
        arrays[name] = place(table, self._params[name])
    return arrays

  def report(self, frozen: Any = None) -> str:
    """A table of what became of the parameters, and of what else is different in the source.

    Args:
      frozen: the run's frozen parts, to be compared, or None.
    """
    rows = [("parameter", "size", "what becomes of it"), *self._rows(self._outcomes)]
    rows += [] if frozen is None else self._frozen_rows(frozen)
    lines = [tree.table(rows)]
    for field, (theirs, ours) in self._differences.items():
      if theirs is not None and ours is not None:
        lines.append(f"  its {field} is {theirs}, here it is {ours}")
    return "\n".join(lines)

  def _compare(self, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Decides what becomes of each parameter; chooses none to be read."""
    theirs = _params(stored)
    names = sorted(self._params.keys() | theirs.keys())
    if not self._params.keys() & theirs.keys():
      raise UserError("it has none of the parameters of this objective: give a model of the same kind")
    if self._fresh and not any(re.search(self._fresh, name) for name in self._params):
      raise UserError(
        f"config.init_fresh='{self._fresh}' matches no parameter, such as {next(iter(self._params))}: "
        "correct it, or leave it out"
      )
    self._sizes = {name: tree.count((theirs | self._params)[name]) for name in names}
    self._outcomes = {name: self._outcome(name, theirs) for name in names}
    refused = [name for name, outcome in self._outcomes.items() if outcome == REFUSED]
    found = {name: theirs[name] for name in refused if name in theirs}
    remedy = "change config.objective, or name in config.init_fresh what is to start fresh"
    tree.check_same(found, {name: self._params[name] for name in refused}, "it", remedy)
    return {}

  def _outcome(self, name: str, theirs: Mapping[str, Any]) -> str:
    if name not in self._params:
      return UNUSED
    if self._fresh and re.search(self._fresh, name):
      return FRESH
    if name not in theirs:
      group = f"{name.split('/')[0]}/"
      return REFUSED if any(other.startswith(group) for other in theirs) else ABSENT
    expected, found = self._params[name], theirs[name]
    old, new = self._source_positions.get(name), self._positions.get(name)
    if old and new and old != new:
      fits = old.leading == new.leading and found.shape[1:] == expected.shape[1:]
      return f"{INTERPOLATED} from {_grid(old)} to {_grid(new)}" if fits else REFUSED
    return TAKEN if (found.shape, found.dtype) == (expected.shape, expected.dtype) else REFUSED

  def _targets(self, stored: Mapping[str, Any]) -> dict[str, Any]:
    """What to read, and where to: tables that are interpolated in their own shape, onto all devices."""
    theirs, targets = _params(stored), {}
    for name, outcome in self._outcomes.items():
      if outcome == TAKEN:
        targets[f"params/{name}"] = self._params[name]
      elif outcome.startswith(INTERPOLATED):
        everywhere = sharding.replicated(self._params[name].sharding.mesh)
        shape, dtype = theirs[name].shape, self._params[name].dtype
        targets[f"params/{name}"] = jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
    return targets

  def _rows(self, outcomes: Mapping[str, str], depth: int = 2) -> list[Row]:
    """One row for each module whose parameters all have one outcome; names are cut after `depth` parts."""
    modules: dict[str, dict[str, str]] = {}
    for name, outcome in outcomes.items():
      modules.setdefault("/".join(name.split("/")[:depth]), {})[name] = outcome
    rows: list[Row] = []
    for module, inner in modules.items():
      outcome, *others = set(inner.values())
      if others:
        rows += self._rows(inner, depth + 1)
      else:
        rows.append((module, f"{sum(self._sizes[name] for name in inner):,}", outcome))
    return rows

  def _frozen_rows(self, frozen: Any) -> list[Row]:
    """Whether the frozen parts that both have are the same."""
    theirs = storage.read_frozen_arrays(storage.locate(self._path)[0])
    rows: list[Row] = []
    for part in frozen:
      ours = storage.to_host(tree.flatten({"frozen": {part: frozen[part]}}))
      if ours and ours.keys() <= theirs.keys():
        same = tree.fingerprint(ours) == tree.fingerprint({name: theirs[name] for name in ours})
        outcome = "as in the source" if same else "another than the source was trained with"
        rows.append((f"frozen/{part}", f"{tree.count(ours):,}", outcome))
    return rows


def _positions(objective: objectives.Objective) -> Mapping[str, Positions]:
  found: Mapping[str, Positions] = getattr(objective, "positions", dict)()
  return found


def _params(stored: Mapping[str, Any]) -> dict[str, Any]:
  """The parameters among stored arrays, by path name without `params/`."""
  return {name.removeprefix("params/"): leaf for name, leaf in stored.items() if name.startswith("params/")}


def _grid(positions: Positions) -> str:
  return "x".join(map(str, positions.grid))
