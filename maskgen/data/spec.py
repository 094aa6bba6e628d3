"""Preprocessing as a string: `decode(3)|resize(16)|pad(1)|random_crop(16)`."""

import ast
import dataclasses
import difflib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

from maskgen import plugins
from maskgen.data import augment, captions, rand_augment  # noqa: F401  (they register their ops)
from maskgen.data.cpu_tf import tf
from maskgen.data.ops import OPS
from maskgen.data.picture import Picture
from maskgen.errors import UserError

Record = dict[str, tf.Tensor]

TWO_VIEWS = "two_views"


class Stage(NamedTuple):
  """One op with its arguments."""

  name: str
  args: list[Any]
  kwargs: dict[str, Any]

  @property
  def key(self) -> str:
    """The part of a record that the op works on."""
    return next(iter(inspect.signature(OPS[self.name]).parameters))

  @property
  def arguments(self) -> dict[str, Any]:
    """Every argument by name, defaults included."""
    bound = _signature(self.name).bind(*self.args, **self.kwargs)
    bound.apply_defaults()
    return bound.arguments


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """A parsed specification.

  Attributes:
    spec: the text.
    stages: the ops.
    views: how many times a record is to be preprocessed, as "image", "image2" and so on.
  """

  spec: str
  stages: tuple[Stage, ...]
  views: int

  def __call__(self, record: Record, seed: tf.Tensor, draw: tf.Tensor) -> Record:
    """Preprocesses one view.

    Args:
      record: as a source gives it.
      seed: int64 [2], the second below 2^32; each random op gets one of its own from it.
      draw: int64 scalar, how many times this record was drawn before.

    Raises:
      UserError: when traced, if the record lacks what an op needs, or an op refuses its arguments.
    """
    record = dict(record)
    for number, stage in enumerate(self.stages):
      name, args, kwargs = stage
      if stage.key not in record:
        raise UserError(
          f"{name} in preprocessing '{self.spec}' needs '{stage.key}', and the data has only "
          f"{', '.join(sorted(record))}: remove the op, or give data with {stage.key}s"
        )
      given = {"seed": seed + tf.constant([0, number << 32], tf.int64), "draw": draw}
      parameters = inspect.signature(OPS[name]).parameters
      kwargs = kwargs | {key: value for key, value in given.items() if key in parameters}
      try:
        record[stage.key] = OPS[name](record[stage.key], *args, **kwargs)
      except (TypeError, ValueError) as error:
        raise UserError(f"{name} in preprocessing '{self.spec}': {error}; {_form(name)}") from error
    return {k: v.pixels() if isinstance(v, Picture) else v for k, v in record.items()}


def parse_spec(spec: str) -> Preprocess:
  """Parses a specification: ops of `OPS`, joined by `|` and applied from left to right.

  `decode` comes before all other ops on images. `two_views|` in front makes two views of each record.
  Arguments are Python literals.

  Raises:
    UserError: on a wrong form, op or argument.
  """
  try:
    expression = ast.parse(spec.strip(), mode="eval").body
  except SyntaxError as error:
    raise _malformed(spec, error.msg) from error
  nodes = list(_split(expression))
  two_views = ast.unparse(nodes[0]) == TWO_VIEWS
  stages = tuple(_parse_stage(node, spec) for node in nodes[two_views:])
  on_images = [stage.name for stage in stages if stage.key == "image"]
  if on_images and on_images[0] != "decode":
    raise UserError(f"preprocessing '{spec}' starts with {on_images[0]}: put 'decode|' before it")
  return Preprocess(spec, stages, 2 if two_views else 1)


def _split(node: ast.expr) -> Iterator[ast.expr]:
  """Yields the operands of `|`, which Python parses as its own operator."""
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
    yield from _split(node.left)
    yield from _split(node.right)
  else:
    yield node


def _parse_stage(node: ast.expr, spec: str) -> Stage:
  call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
  name = ast.unparse(call.func)
  if not all(part.isidentifier() for part in name.split(".")):
    raise _malformed(spec, f"not an op: '{ast.unparse(node)}'")
  if name == TWO_VIEWS:
    raise UserError(f"{TWO_VIEWS} in preprocessing '{spec}' takes no arguments and comes first")
  module, _, function = name.rpartition(".")
  if module and name not in OPS:
    plugins.find_module(module, None, f"preprocessing '{spec}': module")
  if name not in OPS:
    known = sorted(known for known in OPS if "." not in known)
    close = difflib.get_close_matches(function, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}{_signature(close[0])}?" if close else f"known: {', '.join(known)}"
    raise UserError(f"op '{name}' in preprocessing '{spec}' is unknown; {hint}")
  try:
    args = [_literal(arg) for arg in call.args]
    kwargs = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
    _signature(name).bind(*args, **kwargs)
  except (TypeError, ValueError) as error:
    raise UserError(f"{name} in preprocessing '{spec}': {error}; {_form(name)}") from error
  return Stage(name, args, kwargs)


def _literal(node: ast.expr) -> object:
  try:
    return ast.literal_eval(node)
  except ValueError as error:
    raise ValueError(f"'{ast.unparse(node)}' is not a number, string or tuple") from error


def _signature(name: str) -> inspect.Signature:
  """The signature as a specification uses it, without what the pipeline gives."""
  _, *parameters = inspect.signature(OPS[name]).parameters.values()
  kept = [p for p in parameters if p.name not in ("seed", "draw")]
  return inspect.Signature([p.replace(annotation=p.empty) for p in kept])


def _form(name: str) -> str:
  return f"the form is {name}{_signature(name)}"


def _malformed(spec: str, reason: str) -> UserError:
  return UserError(f"preprocessing '{spec}' is malformed ({reason}): write it as 'decode|op(argument)|op'")
