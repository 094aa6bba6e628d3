"""The time of a compiled function by kind of operation, from a profile."""

import glob
import re
from collections import Counter

import jax

from maskgen.costs.hlo_text import Module

# A fusion has the first of these kinds that one of its operations has; "other" is everything else, such as
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
# Their time is that of the operations that they run.
_CONTROL = {"while", "call", "conditional"}


def kinds_of_operations(hlo: str) -> dict[str, str]:
  """Reads the text of a compiled module.

  Returns:
    The kind of each operation by name: "matmul", "convolution", "collective", "copy" or "other"; control flow
    is not included.
  """
  module = Module(hlo)
  kinds = {}
  for computation in module.computations:
    for name, instruction in computation.items():
      inner = module[instruction.called("calls")].values() if instruction.opcode == "fusion" else ()
      if instruction.opcode not in _CONTROL:
        kinds[name] = _kind({each.target or each.opcode for each in (instruction, *inner)})
  return kinds


def _kind(opcodes: set[str]) -> str:
  for kind, pattern in _KINDS.items():
    if any(pattern.search(opcode) for opcode in opcodes):
      return kind
  return "copy" if opcodes - {"fusion"} <= _MOVES | _FREE else "other"


def shares(folder: str, hlo: str) -> dict[str, float]:
  """The share of each kind of operation in the newest profile in a folder.

  Args:
    folder: the argument of `jax.profiler.trace`.
    hlo: the text of the compiled module that ran.

  Returns:
    Shares of the total time of its operations, the largest first.
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
