"""The collectives and the HBM traffic of a compiled program, from the text of its optimized HLO.

The text is what `compiled.as_text()` returns for a partitioned program on TPU, GPU or CPU: it describes one
device.
"""

import dataclasses
import functools
import math
import re
from collections import Counter

import numpy as np

from maskgen.costs.hlo_text import Computation, Instruction, Module

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Between slices of a TPU system, a collective is a transfer through the host that names its kind.
_MESSAGES = {kind.replace("-", "_").upper(): kind for kind in KINDS} | {"ONE_TO_ONE": "collective-permute"}
# These name values without moving them; what a `recv` receives is written by its `recv-done`.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "recv"}
_FREE_CUSTOM_CALLS = ("AllocateBuffer", "ConcatBitcast")
_KERNEL = "tpu_custom_call"  # of Pallas
_SLICES = {"slice", "dynamic-slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # and the operand with the new values
_PASSING = {"bitcast", "convert", "copy", "reshape", "transpose"}
_LESS = {"LT": 0, "LE": 1, "GT": 0, "GE": 1}


@dataclasses.dataclass(frozen=True)
class Use:
  """A collective among the devices of each group, given as positions in the mesh of one slice.

  The groups of a collective-permute are pairs (source, target). Between slices there are no groups: a device
  communicates with its counterparts in the other slices.
  """

  groups: tuple[tuple[int, ...], ...]
  bytes: int  # of one execution
  count: int  # executions per step


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind in which a device takes part during a step."""

  uses: tuple[Use, ...]

  @property
  def count(self) -> int:
    """Executions per step."""
    return sum(use.count for use in self.uses)

  @property
  def bytes(self) -> int:
    """Bytes per step of the full arrays: the output of an all-gather, the input of other kinds."""
    return sum(use.count * use.bytes for use in self.uses)


@dataclasses.dataclass(frozen=True)
class Program:
  """The work of one device in a step: collectives by kind, HBM bytes read and written, and time.

  `network` contains the collectives between slices, over the data-centre network. `cycles` is the sum of the
  TPU compiler's estimates, 0 on other platforms; it has none for Pallas kernels, whose part of the traffic is
  `kernel_traffic`.
  """

  collectives: dict[str, Collective]
  network: dict[str, Collective]
  traffic: int
  cycles: int = 0
  kernel_traffic: int = 0


def analyse(text: str, unknown_trips: int | None = None) -> Program:
  """Reads the optimized HLO text of a partitioned program.

  The traffic is an estimate: it counts the operands and results of every instruction, except for those in
  on-chip memory. Slices that are read or updated in place count as slices, a `conditional` as its branch with
  the most traffic, and the body of a loop once per iteration.

  Args:
    text: what `compiled.as_text()` returns.
    unknown_trips: the number of iterations to assume for loops whose trip count is unknown.

  Raises:
    ValueError: naming a loop with an unknown trip count, unless `unknown_trips` is given.
  """
  cost = _Reader(Module(text), unknown_trips).cost(None)
  inside = {key: count for key, count in cost.collectives.items() if key[1]}
  between = {key: count for key, count in cost.collectives.items() if not key[1]}
  return Program(_by_kind(inside), _by_kind(between), cost.traffic, cost.cycles, cost.kernel_traffic)


_Key = tuple[str, tuple[tuple[int, ...], ...], int]  # of a collective: kind, groups, bytes


def _by_kind(collectives: dict[_Key, int]) -> dict[str, Collective]:
  uses: dict[str, list[Use]] = {}
  for (kind, groups, size), count in collectives.items():
    uses.setdefault(kind, []).append(Use(groups, size, count))
  return {kind: Collective(tuple(uses[kind])) for kind in KINDS if kind in uses}


@dataclasses.dataclass
class _Cost:
  traffic: int = 0
  cycles: int = 0
  kernel_traffic: int = 0
  collectives: Counter[_Key] = dataclasses.field(default_factory=Counter)  # executions

  def add(self, other: "_Cost", times: int = 1) -> None:
    self.traffic += times * other.traffic
    self.cycles += times * other.cycles
    self.kernel_traffic += times * other.kernel_traffic
    for key, count in other.collectives.items():
      self.collectives[key] += times * count


class _Reader:
  def __init__(self, module: Module, unknown_trips: int | None):
    self._module, self._unknown_trips = module, unknown_trips
    self._costs: dict[str | None, _Cost] = {}

  def cost(self, name: str | None) -> _Cost:
    """The cost of a computation that is executed, by default of the entry."""
    if name not in self._costs:
      computation = self._module[name]
      cost = _Cost()
      for instruction in computation.values():
        self._add(cost, instruction, computation)
      self._costs[name] = cost
    return self._costs[name]

  def _add(self, cost: _Cost, instruction: Instruction, computation: Computation) -> None:
    match instruction.opcode:
      case "while":
        cost.add(self.cost(instruction.called("body")), self._trips(instruction, computation))
      case "call":
        cost.add(self.cost(instruction.called("to_apply")))
      case "conditional":
        cost.add(max(map(self.cost, instruction.branches()), key=lambda branch: branch.traffic))
      case _:
        traffic = self._traffic(instruction, computation)
        cost.traffic += traffic
        cost.kernel_traffic += traffic if instruction.target == _KERNEL else 0
        cost.cycles += instruction.cycles
        self._add_collectives(cost, instruction, computation)

  # Loops

  def _trips(self, loop: Instruction, computation: Computation) -> int:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
      return int(known[1])
    trips = self._counted_trips(loop, computation)
    trips = self._unknown_trips if trips is None else trips
    if trips is None:
      raise ValueError(
        f"the loop {loop.name} has an unknown trip count: give the number of iterations to assume"
      )
    return trips

  def _counted_trips(self, loop: Instruction, computation: Computation) -> int | None:
    """The trip count of a loop that compares a counter with a constant."""
    condition = self._module[loop.called("condition")]
    body = self._module[loop.called("body")]
    compare = condition.root
    direction = re.search(r"direction=(\w+)", compare.rest)
    if compare.opcode != "compare" or direction is None or direction[1] not in _LESS:
      return None
    for counter, limit in (compare.operands, compare.operands[::-1]):
      index = condition.element(counter)
      end = self._constant(limit, condition)
      if index is None or end is None:
        continue
      start = self._initial(loop, index, computation)
      step = self._step(body, index)
      if start is None or not step:
        return None
      return max(math.ceil((end - start + _LESS[direction[1]] * np.sign(step)) / step), 0)
    return None

  def _step(self, body: Computation, index: int) -> int | None:
    """What an iteration adds to an element of a loop's state; None if unknown."""
    update = body.behind(body.root.operands[index])
    if body.element(update.name) == index:
      return 0
    if update.opcode not in ("add", "subtract"):
      return None
    left, right = update.operands
    if body.element(left) != index:
      left, right = right, left
    change = self._constant(right, body)
    if body.element(left) != index or change is None:
      return None
    return change if update.opcode == "add" else -change

  def _constant(self, name: str, computation: Computation) -> int | None:
    """The value as an integer if it is constant, otherwise None."""
    value = computation.behind(name)
    if value.opcode == "constant":
      return int(value.arguments) if re.fullmatch(r"-?\d+", value.arguments) else None
    index = computation.element(name)
    caller = self._module.loop_of(computation)
    if index is None or caller is None:
      return None
    loop, outer = caller
    if self._step(self._module[loop.called("body")], index) != 0:
      return None
    return self._initial(loop, index, outer)

  def _initial(self, loop: Instruction, index: int, computation: Computation) -> int | None:
    state = computation[loop.operands[0]]
    return self._constant(state.operands[index], computation) if state.opcode == "tuple" else None

  # Collectives

  def _add_collectives(
    self, cost: _Cost, instruction: Instruction, computation: Computation, fused: bool = False
  ) -> None:
    opcode, rest = instruction.opcode, instruction.rest
    if opcode in ("fusion", "async-start"):
      inner = self._module[instruction.called("calls")]
      starts = inner.root.target == "AsyncCollectiveStart"
      for part in inner.values():
        # The TPU compiler spreads a collective over several fusions, all of which name it; count the first.
        if starts or not _is_piece(part):
          self._add_collectives(cost, part, inner, fused=opcode == "fusion")
    elif message := re.search(r'_xla_megascale_transfer_type="(\w+)"', rest):
      kind = _MESSAGES[message[1]]
      if opcode == ("recv" if kind == "all-gather" else "send"):
        full = instruction.arrays[0]
        cost.collectives[kind, (), math.ceil(full.elements * full.item_bytes)] += 1
    elif (kind := opcode.removesuffix("-start")) in KINDS:
      groups = self._groups(rest)
      size = sum(computation[name].bytes for name in instruction.operands)
      if kind == "all-gather":
        size *= len(groups[0])
      elif kind == "all-reduce" and fused and computation.is_sliced(instruction.name):
        kind = "reduce-scatter"  # on TPU, it is a fusion of the two
      cost.collectives[kind, groups, size] += 1

  def _groups(self, attributes: str) -> tuple[tuple[int, ...], ...]:
    written = re.search(
      r"(?:replica_groups|source_target_pairs)=(\{\}|mesh\[[^{]*\{.*?\}|\{\{.*?\}\}|\[\S*)", attributes
    )
    if written is None:
      raise ValueError(f"the collective has no groups: {attributes}")
    return _parse_groups(written[1].rstrip(","), self._module.num_devices)

  # Traffic

  def _traffic(self, instruction: Instruction, computation: Computation) -> int:
    """The bytes that an instruction reads from and writes to HBM."""
    opcode, operands = instruction.opcode, [computation[name] for name in instruction.operands]
    if opcode in _FREE or instruction.target in _FREE_CUSTOM_CALLS:
      return 0
    if opcode == "fusion":
      return self._fused_traffic(instruction, operands)
    if opcode in ("slice-start", "dynamic-slice-start"):
      return instruction.arrays[len(operands)].size_in(operands[0].arrays[0])
    if opcode.endswith("-start") or opcode == "send":  # the end writes
      return sum(operand.hbm_bytes for operand in operands)
    if opcode.endswith("-done"):
      return instruction.hbm_bytes
    if opcode.endswith("-update"):
      return 0
    if opcode in _SLICES:
      rest = sum(operand.hbm_bytes for operand in operands[1:])
      return instruction.arrays[0].size_in(operands[0].arrays[0]) + instruction.hbm_bytes + rest
    if opcode in _UPDATES:
      update = operands[_UPDATES[opcode]]
      return update.hbm_bytes + update.arrays[0].size_in(operands[0].arrays[0])
    return sum(operand.hbm_bytes for operand in operands) + instruction.hbm_bytes

  def _fused_traffic(self, fusion: Instruction, operands: list[Instruction]) -> int:
    inner = self._module[fusion.called("calls")]
    total = 0.0
    for parameter in inner.parameters:
      given = operands[int(parameter.arguments)]
      if given.hbm_bytes:
        total += self._elements_read(inner, parameter) * given.arrays[0].item_bytes
    returned = inner.root.operands if inner.root.opcode == "tuple" else [inner.root.name]
    if len(returned) == len(fusion.arrays):
      for name, array in zip(returned, fusion.arrays, strict=True):
        if array.in_hbm:
          total += self._elements_written(inner, name) * array.item_bytes
    else:  # the start of a collective in pieces, which returns its operands and its result
      total += fusion.hbm_bytes
    return math.ceil(total)

  def _elements_read(self, computation: Computation, value: Instruction) -> int:
    whole = sum(array.elements for array in value.arrays)
    total = 0
    for user in computation.users(value.name):
      first = user.operands.index(value.name) == 0
      if user.opcode in _SLICES and first:
        total += user.arrays[0].elements
      elif user.opcode in _PASSING:
        total += self._elements_read(computation, user)
      elif user.opcode == "fusion":
        inner = self._module[user.called("calls")]
        total += sum(
          self._elements_read(inner, parameter)
          for parameter in inner.parameters
          if user.operands[int(parameter.arguments)] == value.name
        )
      elif not (
        (user.opcode in _UPDATES and first)
        or (user.opcode == "tuple" and value.opcode == "parameter")
        or _is_piece(user)
      ):
        return whole
    if value is computation.root and value.opcode != "parameter":
      return whole
    return min(total, whole)

  def _elements_written(self, computation: Computation, name: str) -> int:
    value = computation[name]
    if value.opcode in _UPDATES:
      return computation[value.operands[_UPDATES[value.opcode]]].arrays[0].elements
    if value.opcode == "bitcast":
      return self._elements_written(computation, value.operands[0])
    if value.opcode == "fusion" and len(value.arrays) == 1:
      inner = self._module[value.called("calls")]
      return self._elements_written(inner, inner.root.name)
    if value.opcode == "parameter" or _is_piece(value):
      return 0
    return sum(array.elements for array in value.arrays)


def _is_piece(instruction: Instruction) -> bool:
  """Whether it is a piece of a collective that the TPU compiler spread over several fusions."""
  if instruction.opcode == "custom-call":
    return (instruction.target or "").startswith("AsyncCollective")
  return instruction.opcode in KINDS and "chain_id=" in instruction.rest


# Consecutive numbers as an array of this shape, transposed by these axes.
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _iota(shape: str, order: str | None) -> np.ndarray:
  dims = [int(size) for size in shape.split(",")]
  axes = [int(axis) for axis in order.split(",")] if order else None
  return np.arange(math.prod(dims)).reshape(dims).transpose(axes)


@functools.cache
def _parse_groups(text: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
  """Parses groups of devices in HLO's notations.

  These are `{{0,1},{2,3}}`, `{}` for a single group of all, `[2,4]<=[4,2]T(1,0)` for the rows of a transposed
  iota, and `mesh['a'=4,'b'=2] {'a'}` for groups along some axes of a mesh, whose devices may be an iota:
  `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}`.
  """
  if text == "{}":
    return (tuple(range(num_devices)),)
  if text.startswith("{{"):
    return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text))
  if iota := re.fullmatch(rf"\[([\d,]+)\]<={_IOTA}", text):
    ids = _iota(*iota.groups()[1:]).reshape([int(size) for size in iota[1].split(",")])
  elif mesh := re.fullmatch(
    rf"mesh\[((?:'\w+'=\d+,?)+)\](?:, device_ids=\({_IOTA}\))? ?\{{((?:'\w+',?)+)\}}", text
  ):
    sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    inside = re.findall(r"'(\w+)'", mesh[4])
    order = [list(sizes).index(axis) for axis in sorted(sizes, key=inside.__contains__)]
    ids = _iota(mesh[2] or str(math.prod(sizes.values())), mesh[3])
    ids = ids.reshape(list(sizes.values())).transpose(order)
    ids = ids.reshape(-1, math.prod(sizes[axis] for axis in inside))
  else:
    raise ValueError(f"the groups of devices have an unknown notation: {text}")
  return tuple(map(tuple, ids.tolist()))
