"""Parses the text of an HLO module into computations and instructions."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_ARRAY = re.compile(r"\b([a-z]+\d*)[a-z\d]*\[([^\]]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")


@dataclasses.dataclass(frozen=True)
class Array:
  """The type of an array."""

  elements: int
  item_bytes: float  # half a byte for 4 bits
  in_hbm: bool

  def size_in(self, other: "Array") -> int:
    """Bytes of HBM for the same number of elements with the type and memory space of `other`."""
    return math.ceil(self.elements * other.item_bytes) if other.in_hbm else 0


def _parse_type(text: str) -> tuple[Array, ...]:
  """The arrays of a type, such as `(f32[8,4]{1,0:T(8,128)S(1)}, s32[])`; S(1) is a memory space, HBM is 0."""
  arrays = []
  for dtype, dims, layout in _ARRAY.findall(text):
    bits = re.search(r"\d+", dtype)
    elements = math.prod(int(size.lstrip("<=")) for size in dims.split(",") if size)
    item_bytes = int(bits[0]) / 8 if bits else float(dtype == "pred")  # tokens take no space
    arrays.append(Array(elements, item_bytes, not re.search(r"S\([1-9]", layout)))
  return tuple(arrays)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """`name = type opcode(arguments), rest`."""

  name: str
  type: str
  opcode: str
  arguments: str
  rest: str

  @functools.cached_property
  def arrays(self) -> tuple[Array, ...]:
    """Its results, with tuples flattened."""
    return _parse_type(self.type)

  @functools.cached_property
  def operands(self) -> list[str]:
    """The names of its operands."""
    return re.findall(r"%([\w.-]+)", self.arguments)

  @functools.cached_property
  def bytes(self) -> int:
    """The size of its results."""
    return math.ceil(sum(array.elements * array.item_bytes for array in self.arrays))

  @functools.cached_property
  def hbm_bytes(self) -> int:
    """The size of its results in HBM."""
    return math.ceil(sum(array.elements * array.item_bytes for array in self.arrays if array.in_hbm))

  @property
  def cycles(self) -> int:
    """The TPU compiler's estimate of its duration in cycles of the chip's clock; 0 without one."""
    found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
    return int(found[1]) if found else 0

  @property
  def target(self) -> str | None:
    """The target of a custom call."""
    found = re.search(r'custom_call_target="([^"]*)"', self.rest)
    return found[1] if found else None

  def called(self, role: str) -> str:
    """The name of the computation that it calls as `body`, `condition`, `calls` or `to_apply`."""
    found = re.search(rf"\b{role}=%?([\w.-]+)", self.rest)
    assert found, f"{self.opcode} {self.name} has no {role}"
    return found[1]

  def branches(self) -> list[str]:
    """The names of the computations that a `conditional` chooses from."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
    if listed:
      return re.findall(r"[\w.-]+", listed[1])
    return [self.called("true_computation"), self.called("false_computation")]


class Computation(Mapping[str, Instruction]):
  """Instructions by name, in order."""

  def __init__(self, name: str):
    self.name = name
    self.root: Instruction
    self._instructions: dict[str, Instruction] = {}
    self._users: dict[str, list[Instruction]] = {}

  def add(self, instruction: Instruction, root: bool) -> None:
    """Appends an instruction."""
    self._instructions[instruction.name] = instruction
    for operand in dict.fromkeys(instruction.operands):
      self._users.setdefault(operand, []).append(instruction)
    if root:
      self.root = instruction

  def __getitem__(self, name: str) -> Instruction:
    return self._instructions[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._instructions)

  def __len__(self) -> int:
    return len(self._instructions)

  @property
  def parameters(self) -> list[Instruction]:
    """Its parameters; their `arguments` are their numbers."""
    return [value for value in self.values() if value.opcode == "parameter"]

  def users(self, name: str) -> list[Instruction]:
    """The instructions with this operand."""
    return self._users.get(name, [])

  def behind(self, name: str) -> Instruction:
    """The instruction whose value this is a copy of."""
    value = self[name]
    while value.opcode in ("copy", "bitcast", "convert", "copy-start", "copy-done"):
      value = self[value.operands[0]]
    return value

  def element(self, name: str) -> int | None:
    """The index of the element of the computation's only parameter that a value is."""
    value = self.behind(name)
    if value.opcode != "get-tuple-element" or self[value.operands[0]].opcode != "parameter":
      return None
    index = re.search(r"index=(\d+)", value.rest)
    return int(index[1]) if index else None

  def is_sliced(self, name: str) -> bool:
    """Whether only one slice of a value is used."""
    users = self.users(name)
    while len(users) == 1 and users[0].opcode in ("bitcast", "reshape", "copy"):
      users = self.users(users[0].name)
    return len(users) == 1 and users[0].opcode == "dynamic-slice"


class Module:
  """Computations by name; the name of the entry is None."""

  def __init__(self, text: str):
    self._computations: dict[str | None, Computation] = {}
    self._loops: dict[str, tuple[Instruction, Computation]] = {}
    computation = None
    for line in text.splitlines():
      if computation is not None and (match := _INSTRUCTION.match(line)):
        root, name, kind, opcode, rest = match.groups()
        arguments, rest = _split_arguments(rest)
        instruction = Instruction(name, kind, opcode, arguments, rest)
        computation.add(instruction, bool(root))
        if opcode == "while":
          for role in ("body", "condition"):
            self._loops[instruction.called(role)] = instruction, computation
      elif match := _COMPUTATION.match(line):
        computation = Computation(match[2])
        self._computations[match[2]] = computation
        if match[1]:
          self._computations[None] = computation
    if None not in self._computations:
      raise ValueError("this is not the text of an HLO module: it has no entry computation")
    counts = [re.search(rf"\b{what}=(\d+)", text) for what in ("num_partitions", "replica_count")]
    self.num_devices = math.prod(int(count[1]) for count in counts if count)

  def __getitem__(self, name: str | None) -> Computation:
    return self._computations[name]

  @property
  def computations(self) -> list[Computation]:
    """All of them, the entry once."""
    return [value for name, value in self._computations.items() if name is not None]

  def loop_of(self, computation: Computation) -> tuple[Instruction, Computation] | None:
    """The loop whose body or condition a computation is, and the computation that runs it."""
    return self._loops.get(computation.name)


def _split_arguments(text: str) -> tuple[str, str]:
  """Splits the text after an opcode's opening parenthesis at the closing one."""
  depth = 1
  for match in re.finditer(r"[()]", text):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return text[: match.start()], text[match.end() :]
  return text, ""
