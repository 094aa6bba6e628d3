"""Warm starts: the parameters of another model, and nothing else of it, in the place of fresh ones."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from maskgen import objectives, sharding, storage, tree
from maskgen.errors import UserError
from maskgen.models.image_encoder import EncoderPart
from maskgen.numerics.positions import Positions, interpolate
from maskgen.storage.tensors import place

TAKEN, INTERPOLATED, ADAPTED, FRESH = "taken", "interpolated", "adapted", "fresh"
ABSENT = "fresh: the source has none"
UNUSED = "not used"
REFUSED = "refused"
Row = tuple[str, str, str]


class WarmStart:
  """What a run takes from another model: parameters of the same path name and shape.

  A table of positions of another grid is interpolated, and the kernel of an image encoder that reads pixels
  is adapted to another number of channels. Any other difference is refused unless the config leaves the
  parameter fresh, or the source lacks its whole group, as an export may lack a discriminator. A source that
  is an image encoder alone becomes that of the objective, and everything else stays fresh. `report` says what
  became of every parameter of either side.
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
    part = getattr(objective, "image_encoder", None)
    self._pixels = _pixels(part)
    # Where the source's parameters are here; for a whole model, in the same place.
    self._source_prefix = self._prefix = ""
    config = storage.load_config(path)
    if "objective" in config:
      source = objectives.build(config["objective"])
      self._source_positions = _positions(source)
      self._differences = objectives.differences(source, objective)
    elif part is not None and part.params.startswith("params/"):
      alone = objectives.encoder_part(storage.model_section(config), "its config.json")
      self._differences = objectives.differences(alone.encoder.network, part.encoder.network)
      self._source_prefix, self._prefix = (_prefix(one) for one in (alone, part))
      self._source_positions = {f"{self._prefix}position": alone.encoder.positions}
    self._sizes: dict[str, int] = {}
    self._outcomes: dict[str, str] = {}
    storage.read_chosen(path, self._compare)

  def take(self) -> dict[str, jax.Array]:
    """Reads the parameters that are taken, by path name, each onto its devices."""
    found = storage.read_chosen(self._path, self._targets)
    arrays = self._here(found)
    for name, array in arrays.items():
      if self._outcomes[name].startswith(INTERPOLATED):
        table = interpolate(array, self._source_positions[name], self._positions[name])
        arrays[name] = place(table, self._params[name])
      elif self._outcomes[name].startswith(ADAPTED):
        kernel = adapt_channels(np.asarray(array), self._params[name].shape[-2])
        arrays[name] = place(kernel, self._params[name])
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
    theirs = self._here(stored)
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
      if not name.startswith(self._prefix):
        return ABSENT
      group = f"{name.split('/')[0]}/"
      return REFUSED if any(other.startswith(group) for other in theirs) else ABSENT
    expected, found = self._params[name], theirs[name]
    old, new = self._source_positions.get(name), self._positions.get(name)
    if old and new and old != new:
      fits = old.leading == new.leading and found.shape[1:] == expected.shape[1:]
      return f"{INTERPOLATED} from {_grid(old)} to {_grid(new)}" if fits else REFUSED
    if name == self._pixels and found.shape != expected.shape:
      fits = _without_channels(found) == _without_channels(expected)
      return f"{ADAPTED} from {found.shape[-2]} to {expected.shape[-2]} channels" if fits else REFUSED
    return TAKEN if (found.shape, found.dtype) == (expected.shape, expected.dtype) else REFUSED

  def _targets(self, stored: Mapping[str, Any]) -> dict[str, Any]:
    """What to read, and where to: tables that are interpolated in their own shape, onto all devices."""
    theirs, targets = self._here(stored), {}
    for name, outcome in self._outcomes.items():
      there = f"params/{self._source_prefix}{name.removeprefix(self._prefix)}"
      if outcome == TAKEN:
        targets[there] = self._params[name]
      elif outcome.startswith((INTERPOLATED, ADAPTED)):
        everywhere = sharding.replicated(self._params[name].sharding.mesh)
        shape, dtype = theirs[name].shape, self._params[name].dtype
        targets[there] = jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
    return targets

  def _here(self, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters among stored arrays, by their path names here, without `params/`."""
    prefix = f"params/{self._source_prefix}"
    found = {name: leaf for name, leaf in stored.items() if name.startswith(prefix)}
    return {f"{self._prefix}{name.removeprefix(prefix)}": leaf for name, leaf in found.items()}

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


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
  """A kernel [h, w, c, d] for images of another number of channels.

  More channels repeat the old ones, fewer get their mean. The sum over channels keeps its scale, so that
  pictures whose channels are equal keep their output, for more channels if c divides their number.
  """
  old = kernel.shape[-2]
  if channels < old:
    found = kernel.mean(axis=-2, keepdims=True).repeat(channels, axis=-2)
  else:
    found = kernel[..., np.arange(channels) % old, :]
  return (found * (old / channels)).astype(kernel.dtype)


def _prefix(part: EncoderPart) -> str:
  """In front of the path names of an encoder's parameters, without `params/`."""
  return f"{part.params.removeprefix('params/')}/"


def _pixels(part: EncoderPart | None) -> str:
  """The path name of the kernel that reads pixels; empty for none."""
  return f"{_prefix(part)}{part.encoder.pixels}" if part is not None and part.encoder.pixels else ""


def _without_channels(kernel: Any) -> tuple[int, ...]:
  return (*kernel.shape[:-2], *kernel.shape[-1:])


def _grid(positions: Positions) -> str:
  return "x".join(map(str, positions.grid))
