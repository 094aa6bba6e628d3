"""Preprocessing written as a chain of ops: `decode(3)|resize(16)|pad(1)|random_crop(16)`."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

from maskgen import plugins
from maskgen.data import augment, captions, rand_augment  # noqa: F401  (they register their ops)
from maskgen.data.cpu_tf import tf
from maskgen.data.ops import OPS
from maskgen.data.picture import Picture
from maskgen.errors import UserError

Record: TypeAlias = "dict[str, tf.Tensor]"

TWO_VIEWS = "two_views"


class OpCall(NamedTuple):
  """One op with its arguments."""

  name: str
  args: list[Any]
  kwargs: dict[str, Any]

  @property
  def key(self) -> str:
    """The key of the record's entry that the op processes."""
    return next(iter(inspect.signature(OPS[self.name]).parameters))

  @property
  def arguments(self) -> dict[str, Any]:
    """All arguments by name, including defaults."""
    bound = _signature(self.name).bind(*self.args, **self.kwargs)
    bound.apply_defaults()
    return bound.arguments


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """A parsed chain of ops.

  Attributes:
    text: the chain of ops as written.
    ops: the ops.
    views: the number of views to make of each record: "image", "image2", ...
  """

  text: str
  ops: tuple[OpCall, ...]
  views: int

  def __call__(self, record: Record, seed: tf.Tensor, draw: tf.Tensor) -> Record:
    """Preprocesses one view.

    Args:
      record: as returned by a source.
      seed: int64 [2], the second entry below 2^32; each random op derives its own seed from it.
      draw: int64 scalar, the number of earlier draws of this record.

    Raises:
      UserError: during tracing, if the record lacks a key that an op needs, or an op rejects its arguments.
    """
    record = dict(record)
    for number, op in enumerate(self.ops):
      name, args, kwargs = op
      if op.key not in record:
        raise UserError(
          f"{name} in preprocessing '{self.text}' needs '{op.key}', but the data has only "
          f"{', '.join(sorted(record))}: remove the op, or give data with {op.key}s"
        )
      given = {"seed": seed + tf.constant([0, number << 32], tf.int64), "draw": draw}
      parameters = inspect.signature(OPS[name]).parameters
      kwargs = kwargs | {key: value for key, value in given.items() if key in parameters}
      try:
        made = OPS[name](record[op.key], *args, **kwargs)
      except (TypeError, ValueError) as error:
        raise self.wrong(name, error) from error
      record |= made if isinstance(made, dict) else {op.key: made}
    return {k: v.pixels() if isinstance(v, Picture) else v for k, v in record.items()}

  def wrong(self, name: str, error: Exception) -> UserError:
    """Returns the error for an op that rejects its arguments."""
    return UserError(f"{name} in preprocessing '{self.text}': {error}; {_form(name)}")


def parse_preprocess(text: str) -> Preprocess:
  """Parses a chain of ops: names from `OPS`, joined by `|` and applied from left to right.

  `decode` precedes all other ops on images. The prefix `two_views|` makes two views of each record.
  Arguments are Python literals.

  Raises:
    UserError: if the syntax, an op or an argument is wrong.
  """
  try:
    expression = ast.parse(text.strip(), mode="eval").body
  except SyntaxError as error:
    raise _malformed(text, error.msg) from error
  nodes = list(_split(expression))
  two_views = ast.unparse(nodes[0]) == TWO_VIEWS
  ops = tuple(_parse_op(node, text) for node in nodes[two_views:])
  on_images = [op.name for op in ops if op.key == "image"]
  if on_images and on_images[0] != "decode":
    raise UserError(f"preprocessing '{text}' starts with {on_images[0]}: put 'decode|' before it")
  return Preprocess(text, ops, 2 if two_views else 1)


def _split(node: ast.expr) -> Iterator[ast.expr]:
  """Yields the operands of `|`, which Python parses as a binary operator."""
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
    yield from _split(node.left)
    yield from _split(node.right)
  else:
    yield node


def _parse_op(node: ast.expr, text: str) -> OpCall:
  call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
  name = ast.unparse(call.func)
  if not all(part.isidentifier() for part in name.split(".")):
    raise _malformed(text, f"not an op: '{ast.unparse(node)}'")
  if name == TWO_VIEWS:
    raise UserError(f"{TWO_VIEWS} in preprocessing '{text}' takes no arguments and comes first")
  module, _, function = name.rpartition(".")
  if module and name not in OPS:
    plugins.find_module(module, None, f"preprocessing '{text}': module")
  if name not in OPS:
    known = sorted(known for known in OPS if "." not in known)
    close = difflib.get_close_matches(function, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}{_signature(close[0])}?" if close else f"known: {', '.join(known)}"
    raise UserError(f"op '{name}' in preprocessing '{text}' is unknown; {hint}")
  try:
    args = [_literal(arg) for arg in call.args]
    kwargs = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
    _signature(name).bind(*args, **kwargs)
  except (TypeError, ValueError) as error:
    raise UserError(f"{name} in preprocessing '{text}': {error}; {_form(name)}") from error
  return OpCall(name, args, kwargs)


def _literal(node: ast.expr) -> object:
  try:
    return ast.literal_eval(node)
  except ValueError as error:
    raise ValueError(f"'{ast.unparse(node)}' is not a number, string or tuple") from error


def _signature(name: str) -> inspect.Signature:
  """The signature of an op without the parameters that the pipeline supplies."""
  _, *parameters = inspect.signature(OPS[name]).parameters.values()
  kept = [p for p in parameters if p.name not in ("seed", "draw")]
  return inspect.Signature([p.replace(annotation=p.empty) for p in kept])


def _form(name: str) -> str:
  return f"the form is {name}{_signature(name)}"


def _malformed(text: str, reason: str) -> UserError:
  return UserError(f"preprocessing '{text}' is malformed ({reason}): write it as 'decode|op(argument)|op'")
