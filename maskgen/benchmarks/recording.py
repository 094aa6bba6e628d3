"""Where the time of a compiled function goes, from what the profiler recorded."""

import glob
import re
from collections import Counter, defaultdict

import jax

# A fusion is of the first kind of which it has an operation; what has none of these is "other", such as
# elementwise arithmetic and reductions.
_KINDS = {
  "matmul": re.compile(r"dot|gemm|matmul|fmha|ragged-dot"),
  "convolution": re.compile(r"conv(?!ert)"),
  "collective": re.compile(r"all-reduce|all-gather|all-to-all|reduce-scatter|collective"),
}
_MOVES = {"copy", "transpose", "reshape", "slice", "concatenate", "pad", "broadcast"} | {
  *("dynamic-slice", "dynamic-update-slice", "gather", "reverse", "copy-start", "copy-done"),
}
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota"}
# Their time is that of the operations in them.
_CONTROL = {"while", "call", "conditional"}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = .*? ([a-z][\w-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


def kinds_of_operations(hlo: str) -> dict[str, str]:
  """Reads the text of a compiled module.

  Returns:
    For the name of each operation its kind: "matmul", "convolution", "collective", "copy" or "other"; none
    for control flow.
  """
  opcodes: dict[str, set[str]] = defaultdict(set)  # of each computation
  instructions: dict[str, tuple[str, str]] = {}  # opcode, or target of a custom call; computation it calls
  computation = ""
  for line in hlo.splitlines():
    if found := _INSTRUCTION.match(line):
      name, opcode = found.groups()
      called, target = _CALLED.search(line), _TARGET.search(line)
      instructions[name] = (target[1] if target else opcode, called[1] if called else "")
      opcodes[computation].add(instructions[name][0])
    elif found := _COMPUTATION.match(line):
      computation = found[1]
  return {
    name: _kind({opcode} | (opcodes[called] if opcode == "fusion" else set()))
    for name, (opcode, called) in instructions.items()
    if opcode not in _CONTROL
  }


def _kind(opcodes: set[str]) -> str:
  for kind, pattern in _KINDS.items():
    if any(pattern.search(opcode) for opcode in opcodes):
      return kind
  return "copy" if opcodes - {"fusion"} <= _MOVES | _FREE else "other"


def shares(folder: str, hlo: str) -> dict[str, float]:
  """The share of each kind of operation in the newest recording in a folder.

  Args:
    folder: what `jax.profiler.trace` was given.
    hlo: the text of the compiled module that ran.

  Returns:
    Shares of the time of all its operations, the largest first.
  """
  kinds = kinds_of_operations(hlo)
  file = max(glob.glob(f"{folder}/plugins/profile/*/*.xplane.pb"))
  seconds: Counter[str] = Counter()
  for plane in jax.profiler.ProfileData.from_file(file).planes:
    for line in plane.lines:
      for event in line.events:
        name = dict(event.stats).get("hlo_op")
        if name in kinds:
          seconds[kinds[name]] += event.duration_ns * 1e-9
  return {kind: value / seconds.total() for kind, value in seconds.most_common()}
