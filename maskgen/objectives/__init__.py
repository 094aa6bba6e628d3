"""What is trained: one file per objective.

`config.objective.name` is the name of a module in this package or of your own (docs/extending.md). Its
`Objective` dataclass is built from the other keys of the section. The training loop, the evaluators and the
API use objectives only through the protocol below.
"""

import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax

from maskgen import config as config_lib
from maskgen import plugins, sharding, tree
from maskgen.batch import BatchSpec as BatchSpec
from maskgen.config import fields
from maskgen.errors import UserError, nearest
from maskgen.models.image_encoder import NETWORKS, EncoderPart
from maskgen.models.vqgan import VQGAN
from maskgen.numerics.text import Captions

Tree = Any
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
# (variables, batch, rng) -> arrays; variables = {"params": {group: tree}, "frozen": tree, "extra": tree}.
PredictFn = Callable[..., Any]


class Objective(Protocol):
  """A frozen dataclass whose fields are the keys of `config.objective`.

  Attributes:
    serving: the full name of the class that `maskgen.load` returns, a subclass of `maskgen.Model`, which is
      the default.
  """

  serving: ClassVar[str]

  def batch_spec(self) -> BatchSpec:
    """What the losses read from a batch."""

  @property
  def codebook_size(self) -> int:
    """The number of codes that `encode` chooses from; 0 without a tokenizer."""

  def tokenizer_params(self, variables: Tree) -> Tree:
    """The tokenizer's parameters among the model's variables; required unless `codebook_size` is 0."""

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """The shape (h, w, c) of the images that the model takes and generates."""

  @property
  def num_classes(self) -> int:
    """The number of classes of `label`; 0 if neither losses nor predictions take labels."""

  @property
  def captions(self) -> Captions | None:
    """How a `caption` is tokenized; None if neither losses nor predictions take captions."""

  # Optional: a property `image_encoder` that returns an `EncoderPart`, for everything that builds on an image
  # encoder, such as `classify`, `vilex` and layer decay; and a method `positions` that returns
  # `{path name: Positions}` for the tables of learned positions among the parameters, such as
  # `main/position`, so that `config.init_from` can interpolate them; and a property `averages`, the names of
  # parameter groups whose moving averages teach: `losses` finds them, as `config.ema` made them, in
  # `frozen["average"][GROUP]`; and `training_only`, the names of frozen parts that only `losses` reads, which
  # exports leave out.

  def pretrained_shapes(self) -> dict[str, Tree]:
    """For each required key of `config.pretrained`: the shapes of the variables it needs from that model."""

  def check_pretrained(self, name: str, config: Mapping[str, Any]) -> None:
    """Checks that the config of a pretrained model matches this objective.

    Raises:
      UserError: if it does not. Different models can have the same shapes.
    """

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    """Returns `{"params": {group: tree}, "frozen": tree, "extra": tree}`, with one parameter group per loss.

    `extra` is the model state: running statistics that receive no gradient.
    """

  def losses(
    self,
    params: Mapping[str, Tree],
    frozen: Tree,
    model_state: Tree,
    batch: Batch,
    rng: jax.Array,
    step: jax.Array,
    *,
    train: bool,
  ) -> tuple[dict[str, jax.Array], Metrics, Tree]:
    """One forward pass.

    Args:
      params: as returned by `init`.
      frozen: as returned by `init`.
      model_state: as returned by `init` or by the previous step.
      batch: the arrays of `batch_spec`, where images may also be float32 in [0, 1] and codes of any integer
        type; and `key`, one PRNG key per example, for randomness that must not depend on how the batch is
        split.
      rng: for randomness of the model, such as dropout.
      step: the number of completed updates, an int32 scalar.
      train: whether dropout and the like are on.

    Returns:
      One scalar loss per parameter group, metrics (scalars), and the new model state. Losses and metrics are
      averaged, logged as `train/loss/GROUP` and `train/NAME`, and shown on the console.
    """

  def predict_fns(self) -> dict[str, PredictFn]:
    """Functions `(variables, batch, rng, **options)` by name; an objective may add names to those below.

    Each value [b] that `loss` returns becomes a validation metric of that name: the evaluator `loss`
    averages it over the evaluation split. Users call any function with `model.call(name, batch)`.

    loss -> {name: [b]}; features -> [b, d]; patches -> [b, n, d], patch tokens, see `EncoderPart`, which has
    both; classify -> float32 [b, classes], probabilities;
    encode -> int32 [b, n]; code_vectors -> float32 [b, n, d], the tokenizer's vectors of these codes; decode
    (batch: tokens), reconstruct, generate and generate_uniform (batch: key [b]), inpaint (batch: image, mask
    [b, h, w], key) -> float32 [b, h, w, c] in [0, 1]; logits (batch: tokens, token_mask [b, n]) -> float32
    [b, n, codebook]; trajectory (batch: key) -> the intermediate results of `generate`: images
    [b, steps, h, w, c], and which tokens are unknown, bool [b, steps, h', w']; mask (batch: key [b], the keys
    of `losses`; variables are not used) -> bool [b, h', w'], True for each token that `losses` masks.

    An objective with sampling functions has a field `sampling`, a frozen dataclass that checks its values.
    Its fields are the options of these functions, its values their defaults.

    If `num_classes` is not 0, loss also takes `label` [b], and so do logits, generate, trajectory and
    inpaint; for these, a missing label or the label `num_classes` means no class. With `captions`, loss takes
    `caption` [b, length], and so does generate, where it is optional.

    ViLex differs: encode -> tokens float32 [b, n, d]; generate (batch: key; `vectors` [b, s, n, d] and
    `number` [b, s] for the images of a prompt; `words` [b, s + 1, m] and `num_words` [b, s + 1] for the words
    before, between and after them; `negative` [b, length], a negative prompt); reconstruct (batch: image;
    `number` [b, 1], key).
    """


def find(section: Mapping[str, Any], where: str = "config.objective", **others: type) -> type:
  """Returns the class of the objective that a config section names.

  Args:
    section: a section with the key `name`.
    where: the section's name for error messages.
    **others: classes for additional names.

  Raises:
    UserError: for an unknown name.
  """
  name = str(section.get("name"))
  if name in others:
    return others[name]
  module: Any = plugins.find_module(name, __name__, f"{where}.name", "Objective")
  return module.Objective


def build(section: Mapping[str, Any], where: str = "config.objective") -> Objective:
  """Builds the objective that a config section names.

  Args:
    section: a section with the key `name`.
    where: the section's name for error messages.

  Raises:
    UserError: for an unknown name or key, or a value that the objective rejects.
  """
  options = {key: value for key, value in section.items() if key != "name"}
  found: Objective = config_lib.build_dataclass(find(section, where), options, where)
  return found


def local_files(section: Mapping[str, Any]) -> dict[str, fields.Files]:
  """The local files from which an objective is built, by the values of its section that name them."""
  found = {}
  for _, field, value in fields.walk(find(section), section):
    find_files = field.metadata.get("local_files")
    if value and find_files and (named := find_files(value)):
      found[value] = named
  return found


def without_training_only(objective: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
  """The variables that prediction functions read, see `Objective`."""
  names = getattr(objective, "training_only", ())
  kept = {name: part for name, part in (variables.get("frozen") or {}).items() if name not in names}
  return {**variables, "frozen": kept} if names else dict(variables)


def find_encoder(section: Mapping[str, Any]) -> type:
  """Like `find`, for a section that `encoder_part` takes."""
  networks: dict[str, Any] = {name: encoder.section_type for name, encoder in NETWORKS.items()}
  return find(section, **networks)


def encoder_part(section: Mapping[str, Any], where: str) -> EncoderPart:
  """Returns the image encoder of a model.

  Args:
    section: the model's `config.objective`; or `name`, one of `NETWORKS`, and the fields of that network.
    where: the section's name in error messages.

  Raises:
    UserError: if the model has no image encoder.
  """
  name, options = section.get("name"), {key: value for key, value in section.items() if key != "name"}
  if name in NETWORKS:
    return EncoderPart(NETWORKS[name].from_section(options, where), "params/main")
  found = getattr(build(section, where), "image_encoder", None)
  if not isinstance(found, EncoderPart):
    raise UserError(
      f"{where}.name is '{name}', which has no image encoder: give a model that has one, such as MAGE"
    )
  return found


def check_image_size(size: Any) -> None:
  """Checks an objective's `image_size`.

  Raises:
    UserError: unless it is (height, width).
  """
  if not (isinstance(size, tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
    raise UserError(f"image_size is {size!r}: give (height, width) in pixels")


def check_tokenizer(found: VQGAN, expected: VQGAN) -> None:
  """Checks that a pretrained model's tokenizer is that of `config.objective`; raises like `check_same`."""
  check_same(found, expected, "its tokenizer", "config.objective.tokenizer")


def check_same(found: Any, expected: Any, what: str = "it", where: str = "config.objective") -> None:
  """Checks that networks of a pretrained model are those of a config, except for how they run.

  Args:
    found: the pretrained model's networks, a dataclass.
    expected: those of the config.
    what: the name of the former in error messages.
    where: the name of the latter.

  Raises:
    UserError: if they differ; it names a field.
  """
  for field, (theirs, ours) in differences(found, expected).items():
    raise UserError(f"{what} has {field}={theirs}, {where} has {ours}: make them equal")


def differences(found: Any, expected: Any) -> dict[str, tuple[Any, Any]]:
  """The fields in which dataclasses differ, except for how they run; None if one lacks the field."""
  theirs, ours = _described(found), _described(expected)
  pairs = {field: (theirs.get(field), ours.get(field)) for field in sorted(theirs.keys() | ours.keys())}
  return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}


def _described(value: Any, prefix: str = "") -> dict[str, Any]:
  """The fields of nested dataclasses by path, except for those that set how they run and their dtype."""
  if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
    parts = {str(i): one for i, one in enumerate(value)}
  elif dataclasses.is_dataclass(value):
    names = (
      name
      for name, field in fields.of(type(value)).items()
      if field.metadata.keys().isdisjoint(("operational", "precision"))
    )
    parts = {name: getattr(value, name) for name in names}
  else:
    return {prefix: value}
  kind = {f"{prefix}.kind".lstrip("."): type(value).__name__}
  return functools.reduce(
    lambda known, part: known | _described(part[1], f"{prefix}.{part[0]}".lstrip(".")), parts.items(), kind
  )


def check_sampling(objective: Objective, options: Mapping[str, Any]) -> None:
  """Checks options of sampling functions such as `generate`: the objective must accept them as `sampling`.

  Raises:
    UserError: for an unknown option, a value that the objective rejects, or an objective without `sampling`.
  """
  if not isinstance(options, Mapping):
    raise UserError(f"sampling is {options!r}: give options by name, such as dict(steps=8)")
  if not options:
    return
  whole: Any = objective
  defaults = getattr(whole, "sampling", None)
  if defaults is None:
    raise UserError(f"{', '.join(options)} given: this model does not generate images, leave it out")
  known = fields.of(type(defaults))
  for name in options:
    if name not in known:
      raise UserError(f"sampling has no option '{name}'{nearest(name, known)}")
  dataclasses.replace(whole, sampling=dataclasses.replace(defaults, **options))


def tokenizer_fingerprint(params: Tree) -> str:
  """Identifies a tokenizer by its parameters; stored in token caches and compared when training starts."""
  return tree.fingerprint({"params": {"generator": params}})


def compile_predict_fns(objective: Objective, mesh: jax.sharding.Mesh | None = None) -> dict[str, PredictFn]:
  """Returns the objective's jitted prediction functions; see `maskgen.config.fields.static`."""
  walked = fields.walk(type(objective), objective)
  marked = [(path[-1], f.metadata["at"], value) for path, f, value in walked if f.metadata.get("static")]
  static = tuple({name for name, at, _ in marked if not at})
  constants = {name: (*at, value) for name, at, value in marked if at}

  def jit(fn: PredictFn) -> PredictFn:
    parameters = inspect.signature(fn).parameters.values()
    traced = sharding.on_mesh(fn, mesh) if mesh else fn
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
      return jax.jit(traced)

    @functools.partial(jax.jit, static_argnames=(*static, "constant"))
    @functools.wraps(fn)
    def jitted(*args: Any, constant: tuple[tuple[str, float], ...] = (), **options: Any) -> Any:
      return traced(*args, **options, **dict(constant))

    @functools.wraps(jitted)
    def call(*args: Any, **options: Any) -> Any:
      constant = {
        name: float(value)
        for name, value in options.items()
        if isinstance(value, numbers.Real) and value in constants.get(name, ())
      }
      rest = {name: value for name, value in options.items() if name not in constant}
      return jitted(*args, constant=tuple(sorted(constant.items())), **rest)

    return call

  return {name: jit(fn) for name, fn in objective.predict_fns().items()}
