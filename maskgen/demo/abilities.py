"""What a model offers on the page, and what it does for a request.

A request is a JSON object whose values nobody has checked yet; pictures are PNG files in base64.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from maskgen import images
from maskgen.config import fields as config_fields
from maskgen.demo import pictures
from maskgen.errors import UserError, counted
from maskgen.numerics import editing
from maskgen.serving import Model

if TYPE_CHECKING:
  from maskgen.demo.gallery import Gallery

MOST_IMAGES = 8
MOST_TEXT = 1000  # characters of a prompt
_GUESSES = 5
_SHOWN = 40  # characters of a wrong value
_HALF = 128  # mask values from this on are white


class Slider(NamedTuple):
  """The values of a sampling option that the page offers; whole numbers if `least` is one."""

  least: int | float
  most: int | float
  step: int | float


SLIDERS = {
  "steps": Slider(1, 64, 1),
  "temperature": Slider(0.0, 20.0, 0.1),
  **dict.fromkeys(("guidance", "image_guidance", "text_guidance"), Slider(0.0, 12.0, 0.1)),
}


class Job(NamedTuple):
  """A request that has been checked.

  Attributes:
    program: the method, sizes and options that decide which compiled program computes it.
    work: computes it and returns a JSON object.
  """

  program: tuple[Any, ...]
  work: Callable[[], dict[str, Any]]


def describe(model: Model, name: str, gallery: "Gallery | None" = None) -> dict[str, Any]:
  """What the page needs to know of a model, and whether there are pictures to compare, as a JSON object."""
  objective: Any = model.objective
  fns = objective.predict_fns()
  methods = [method for method in _READERS if method in fns and hasattr(model, method)]
  arguments = inspect.signature(model.generate).parameters if "generate" in methods else {}
  if "images" in arguments:
    methods.remove("reconstruct")  # the page has prompts of one image for it
  if gallery is not None:
    methods.append("nearest")
  classes = objective.num_classes if "label" in arguments else 0
  prompt = "prompt" in arguments and ("images" in arguments or objective.captions is not None)
  sampling = getattr(objective, "sampling", None)
  options = []
  for option, slider in SLIDERS.items():
    if hasattr(sampling, option) and (option != "guidance" or classes or prompt):
      value = getattr(sampling, option)
      options.append({"name": option, "value": value, **slider._asdict(), "most": max(slider.most, value)})
  return {
    "name": name,
    "size": objective.image_shape[:2],
    "methods": methods,
    "classes": list(model.classes or map(str, range(classes))) if classes else [],
    "prompt": prompt,
    "negative_prompt": prompt and "negative_prompt" in arguments,
    "images": "images" in arguments,
    "tokens": objective.tokens if "images" in arguments else 0,
    "options": options,
    "most_images": MOST_IMAGES,
    "most_side": pictures.MOST_SIDE,
    "most_text": MOST_TEXT,
  }


class Served(NamedTuple):
  """A model, its description by `describe`, and pictures to compare others with."""

  model: Any
  offered: Mapping[str, Any]
  gallery: "Gallery | None" = None


def read(served: Served, method: str, given: Mapping[str, Any]) -> Job:
  """Checks a request.

  Args:
    served: what computes it.
    method: one of `served.offered["methods"]`.
    given: the request.

  Raises:
    UserError: if a value is not what the page would send.
  """
  return _READERS[method](served, _Fields(given))


class _Fields:
  """Takes the values of a request one by one, each checked; `close` refuses what nobody took."""

  def __init__(self, given: Mapping[str, Any]):
    self.left = dict(given)

  def number(self, name: str, least: int | float, most: int | float, default: Any = None) -> Any:
    """A number in a range, whole if `least` is, or the default."""
    value = self.left.pop(name, None)
    if value is None:
      return default
    whole = isinstance(least, int)
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
      shown = repr(value)[:_SHOWN]
      raise UserError(f"{name} is {shown}: give a {'whole ' * whole}number from {least} to {most}")
    return value if whole else float(value)

  def text(self, name: str) -> str | None:
    """A text that is not empty, or None."""
    value = self.left.pop(name, None)
    if value is not None and (not isinstance(value, str) or len(value) > MOST_TEXT):
      raise UserError(f"{name} is not a text of at most {MOST_TEXT} characters: shorten it")
    return (value or "").strip() or None

  def picture(self, name: str, mode: str = "RGB") -> Image.Image:
    return pictures.decode(self.left.pop(name, None), name, mode)

  def close(self) -> None:
    if self.left:
      raise UserError(f"the request has the unknown field '{min(self.left)[:_SHOWN]}': leave it out")


def _read_sampling(served: Served, fields: _Fields) -> dict[str, Any]:
  """The arguments that all methods with a seed take."""
  arguments: dict[str, Any] = {"seed": fields.number("seed", 0, 2**32 - 1, 0)}
  if served.offered["classes"]:
    arguments["label"] = fields.number("label", 0, len(served.offered["classes"]) - 1)
  for name in ("prompt", "negative_prompt"):
    if served.offered[name]:
      arguments[name] = fields.text(name)
  for option in served.offered["options"]:
    arguments[option["name"]] = fields.number(option["name"], option["least"], option["most"])
  return {name: value for name, value in arguments.items() if value is not None}


def _generate(served: Served, fields: _Fields) -> Job:
  count = fields.number("count", 1, MOST_IMAGES, 1)
  arguments = _read_sampling(served, fields)
  if served.offered["images"]:
    arguments |= _read_images(served, fields)
  fields.close()

  def work() -> dict[str, Any]:
    if "images" in arguments:
      arguments["images"] = [pictures.fit(picture, served.model) for picture in arguments["images"]]
    return _images(served.model.generate(batch=count, **arguments))

  return Job(_program(served, "generate", count, arguments), work)


def _trajectory(served: Served, fields: _Fields) -> Job:
  count = fields.number("count", 1, MOST_IMAGES, 1)
  which = fields.number("which", 0, count - 1, 0)
  arguments = _read_sampling(served, fields)
  fields.close()

  def work() -> dict[str, Any]:
    steps, unknown = served.model.trajectory(batch=count, **arguments)
    return _images(images.shade(steps[which], unknown[which]))

  return Job(_program(served, "trajectory", count, arguments), work)


def _inpaint(served: Served, fields: _Fields) -> Job:
  count = fields.number("count", 1, MOST_IMAGES, 1)
  picture = fields.picture("image", "L" if served.model.objective.image_shape[-1] == 1 else "RGB")
  hole = np.asarray(fields.picture("hole", "L")) >= _HALF
  grow = fields.number("grow", 0, pictures.MOST_SIDE, 0)
  feather = fields.number("feather", 0, pictures.MOST_SIDE, 0)
  arguments = _read_sampling(served, fields)
  fields.close()
  pixels = np.asarray(picture).reshape(*picture.size[::-1], -1)
  if hole.shape != pixels.shape[:2]:
    raise UserError("image and hole differ in size: give one pixel of the hole for each of the image")
  if not hole.any():
    raise UserError("there is nothing to fill: paint a hole first")

  def work() -> dict[str, Any]:
    grown = editing.grow(hole, grow)
    if grown.all():
      raise UserError("no pixel of the picture is left: paint a smaller hole, or make a new picture")
    batch = np.broadcast_to(pixels, (count, *pixels.shape))
    return _images(served.model.inpaint(batch, grown, feather=feather, **arguments))

  return Job(_program(served, "inpaint", count, arguments), work)


def _reconstruct(served: Served, fields: _Fields) -> Job:
  picture = fields.picture("image")
  fields.close()

  def work() -> dict[str, Any]:
    return _images(served.model.reconstruct(pictures.fit(picture, served.model)[None]))

  return Job(_program(served, "reconstruct", 1, {}), work)


def _classify(served: Served, fields: _Fields) -> Job:
  picture = fields.picture("image")
  fields.close()

  def work() -> dict[str, Any]:
    shares = served.model.classify(pictures.fit(picture, served.model)[None])[0]
    names = served.model.classes or [str(i) for i in range(len(shares))]
    best = np.argsort(-shares, kind="stable")[:_GUESSES]
    return {"guesses": [{"name": names[i], "share": float(shares[i])} for i in best]}

  return Job(_program(served, "classify", 1, {}), work)


def _nearest(served: Served, fields: _Fields) -> Job:
  picture = fields.picture("image")
  fields.close()
  gallery = served.gallery
  assert gallery is not None  # the method is offered only then
  return Job(("nearest",), lambda: {"guesses": gallery.nearest(picture)})


_READERS: dict[str, Callable[[Served, _Fields], Job]] = {
  "generate": _generate,
  "trajectory": _trajectory,
  "inpaint": _inpaint,
  "reconstruct": _reconstruct,
  "classify": _classify,
  "nearest": _nearest,
}


def _read_images(served: Served, fields: _Fields) -> dict[str, Any]:
  """The images of a prompt, and how many tokens of each are used, by default as many as fit."""
  given = fields.left.pop("images", [])
  if not isinstance(given, list) or len(given) > MOST_IMAGES:
    raise UserError(f"images is not a list of at most {counted(MOST_IMAGES, 'picture')}: leave some out")
  if not given:
    return {}
  opened = [pictures.decode(one, "images") for one in given]
  return {"images": opened, "num_tokens": fields.number("num_tokens", 1, served.offered["tokens"])}


def _images(made: np.ndarray) -> dict[str, Any]:
  return {"images": [pictures.encode(image) for image in made]}


def _program(served: Served, method: str, count: int, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
  """See `Job.program`, and `maskgen.config.fields.static` for the options."""
  sampling = getattr(served.model.objective, "sampling", None)
  marked = config_fields.of(type(sampling)) if sampling else {}
  chosen = []
  for name, field in marked.items():
    if name in arguments and field.metadata.get("static"):
      value, constants = arguments[name], field.metadata["at"]
      if not constants or value in (*constants, getattr(sampling, name)):
        chosen.append((name, value))
  return (method, count, *chosen, *sorted(arguments))
