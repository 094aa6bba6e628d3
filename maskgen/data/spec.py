"""Preprocessing as a string: `decode(3)|resize(16)|pad(1)|random_crop(16)`."""

import ast
import difflib
import inspect
from collections.abc import Callable, Iterator
from typing import NamedTuple

from maskgen.data.cpu_tf import tf
from maskgen.data.ops import OPS
from maskgen.errors import UserError

Record = dict[str, tf.Tensor]
Preprocess = Callable[[Record, tf.Tensor], Record]


class _Stage(NamedTuple):
  name: str
  args: list
  kwargs: dict


def parse_spec(spec: str) -> Preprocess:
  """Turns a specification into a function of a record and a seed (int64 [2]).

  The ops, those of `ops.py`, are joined by `|` and applied to record["image"] from left to right,
  each random one with a seed of its own; `decode` comes first. Arguments are Python literals.

  Raises:
    UserError: on a wrong form, op or argument; when traced, on arguments that an op refuses.
  """
  try:
    expression = ast.parse(spec.strip(), mode="eval").body
  except SyntaxError as error:
    raise _malformed(spec, error.msg) from error
  stages = [_parse_stage(node, spec) for node in _split(expression)]
  if stages[0].name != "decode":
    raise UserError(f"preprocessing '{spec}' starts with {stages[0].name}: put 'decode|' before it")

  def preprocess(record: Record, seed: tf.Tensor) -> Record:
    image = record["image"]
    for number, (name, args, kwargs) in enumerate(stages):
      if "seed" in inspect.signature(OPS[name]).parameters:
        kwargs = {**kwargs, "seed": tf.random.experimental.stateless_fold_in(seed, number)}
      try:
        image = OPS[name](image, *args, **kwargs)
      except (TypeError, ValueError) as error:
        raise UserError(f"{name} in preprocessing '{spec}': {error}; {_form(name)}") from error
    return {**record, "image": image}

  return preprocess


def _split(node: ast.expr) -> Iterator[ast.expr]:
  """Yields the operands of `|`, which Python parses as its own operator."""
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
    yield from _split(node.left)
    yield from _split(node.right)
  else:
    yield node


def _parse_stage(node: ast.expr, spec: str) -> _Stage:
  call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
  if not isinstance(call.func, ast.Name):
    raise _malformed(spec, f"not an op: '{ast.unparse(node)}'")
  name = call.func.id
  if name not in OPS:
    close = difflib.get_close_matches(name, OPS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}{_signature(close[0])}?" if close else f"known: {', '.join(sorted(OPS))}"
    raise UserError(f"op '{name}' in preprocessing '{spec}' is unknown; {hint}")
  try:
    args = [_literal(arg) for arg in call.args]
    kwargs = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
    _signature(name).bind(*args, **kwargs)
  except (TypeError, ValueError) as error:
    raise UserError(f"{name} in preprocessing '{spec}': {error}; {_form(name)}") from error
  return _Stage(name, args, kwargs)


def _literal(node: ast.expr) -> object:
  try:
    return ast.literal_eval(node)
  except ValueError as error:
    raise ValueError(f"'{ast.unparse(node)}' is not a number, string or tuple") from error


def _signature(name: str) -> inspect.Signature:
  """The signature as a specification uses it, without image and seed."""
  signature = inspect.signature(OPS[name])
  kept = [p for p in signature.parameters.values() if p.name not in ("image", "seed")]
  return inspect.Signature([p.replace(annotation=p.empty) for p in kept])


def _form(name: str) -> str:
  return f"the form is {name}{_signature(name)}"


def _malformed(spec: str, reason: str) -> UserError:
  return UserError(f"preprocessing '{spec}' is malformed ({reason}): write it as 'decode|op(argument)|op'")
