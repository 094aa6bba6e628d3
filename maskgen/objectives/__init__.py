"""What is trained: one file per objective.

`config.objective.name` names a module here, or one of yours (docs/extending.md); its `Objective` dataclass
is built from the rest of the section. The training loop, evaluators and API know objectives by the protocol
below alone.
"""

import dataclasses
import functools
import inspect
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
    serving: the class that `maskgen.load` returns, by its full name; a subclass of `maskgen.Model`, which is
      the default.
  """

  serving: ClassVar[str]

  def batch_spec(self) -> BatchSpec:
    """What its losses read from a batch."""

  @property
  def codebook_size(self) -> int:
    """The number of codes that `encode` chooses from; 0 without a tokenizer."""

  def tokenizer_params(self, variables: Tree) -> Tree:
    """The tokenizer's parameters among the model's variables; needed unless `codebook_size` is 0."""

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """The images (h, w, c) it takes and makes."""

  @property
  def num_classes(self) -> int:
    """How many classes a `label` counts; 0 where neither losses nor predictions take one."""

  @property
  def captions(self) -> Captions | None:
    """How a `caption` is tokenized; None where neither losses nor predictions take one."""

  # Optional: `image_encoder`, a property that returns an `EncoderPart`, lets `classify`, `vilex`, layer decay
  # and whatever else builds on an image encoder take this objective's. `positions`, a method that returns
  # `{path name: Positions}` of the parameters that are tables of learned positions, such as `main/position`,
  # lets `config.init_from` interpolate them.

  def pretrained_shapes(self) -> dict[str, Tree]:
    """For each name that `config.pretrained` must give: the part of that model's variables it needs."""

  def check_pretrained(self, name: str, config: Mapping[str, Any]) -> None:
    """Checks by its config that a pretrained model is of the kind that this objective was told of.

    Raises:
      UserError: if it is not; shapes alone would not always tell.
    """

  def init(self, rng: jax.Array, pretrained: Mapping[str, Tree]) -> dict[str, Tree]:
    """Makes `{"params": {group: tree}, "frozen": tree, "extra": tree}`; one parameter group per loss.

    `extra` is the model state: running statistics that no gradient reaches.
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
      params: as made by `init`.
      frozen: as made by `init`.
      model_state: as made by `init`, or by the step before.
      batch: the arrays of `batch_spec`, of which images may also be float32 in [0, 1], and codes of any
        integer type; `key` one PRNG key per example, for randomness that must not depend on how the batch is
        split.
      rng: for randomness of the model, such as dropout.
      step: completed updates, int32 scalar.
      train: whether dropout and the like are on.

    Returns:
      One scalar loss per parameter group, metrics (scalars), and the new model state. Losses and metrics are
      averaged and logged as `train/loss/GROUP` and `train/NAME`, and shown on the console.
    """

  def predict_fns(self) -> dict[str, PredictFn]:
    """Functions `(variables, batch, rng, **options)` under names shared by all objectives, or of its own.

    Each value [b] that `loss` returns becomes a validation metric under its name: the evaluator `loss`
    averages it over the evaluation split. Users call any function by `model.call(name, batch)`.

    loss -> {name: [b]}; features -> [b, d]; classify -> float32 [b, classes], probabilities;
    encode -> int32 [b, n]; decode (batch: tokens), reconstruct, generate and generate_uniform (batch: key
    [b]), inpaint (batch: image, mask [b, h, w], key) -> float32 [b, h, w, c] in [0, 1]; logits (batch:
    tokens, token_mask [b, n]) -> float32 [b, n, codebook]; trajectory (batch: key) -> what `generate` goes
    through: images [b, steps, h, w, c], and which tokens are unknown, bool [b, steps, h', w'];
    mask (batch: key [b], the keys of `losses`; needs no variables) -> bool [b, h', w'], True for each token
    that `losses` masks.

    An objective whose functions sample has a field `sampling`, a frozen dataclass that checks itself. Its
    fields are defaults for the options of these functions, and the only options that they have.

    Where `num_classes` is not 0, loss takes `label` [b] as well, and so do logits, generate, trajectory and
    inpaint, for which `num_classes` stands for no class, as does its absence. Where there are `captions`,
    loss takes `caption` [b, length], and so does generate, which can do without.

    A visual lexicon has its own: encode -> tokens float32 [b, n, d]; generate (batch: key; `vectors`
    [b, s, n, d] and `number` [b, s] for the images of a prompt, `words` [b, s + 1, m] and `num_words`
    [b, s + 1] for what is said before, between and behind them; `negative` [b, length], a negative prompt),
    reconstruct (batch: image; `number` [b, 1], key).
    """


def find(section: Mapping[str, Any], **others: type) -> type:
  """Returns the class of the objective that a config section names.

  Args:
    section: a section with the key `name`.
    **others: classes by further names that the section may give.

  Raises:
    UserError: for an unknown name.
  """
  name = str(section.get("name"))
  if name in others:
    return others[name]
  module: Any = plugins.find_module(name, __name__, "config.objective.name", "Objective")
  return module.Objective


def build(section: Mapping[str, Any]) -> Objective:
  """Builds the objective that a config section names.

  Raises:
    UserError: for an unknown name or key, or a value that the objective refuses.
  """
  options = {key: value for key, value in section.items() if key != "name"}
  found: Objective = config_lib.build_dataclass(find(section), options, "config.objective")
  return found


def find_encoder(section: Mapping[str, Any]) -> type:
  """As `find`, of a section that `encoder_part` takes."""
  return find(section, **{name: encoder.section_type for name, encoder in NETWORKS.items()})


def encoder_part(section: Mapping[str, Any], where: str) -> EncoderPart:
  """Finds the image encoder of a model.

  Args:
    section: the model's `config.objective`; or `name`, one of `NETWORKS`, and the fields of that network.
    where: the section's name for error messages.

  Raises:
    UserError: if the model has no image encoder.
  """
  name, options = section.get("name"), {key: value for key, value in section.items() if key != "name"}
  if name in NETWORKS:
    return EncoderPart(NETWORKS[name].from_section(options, where), "params/main")
  try:
    found = getattr(build(section), "image_encoder", None)
  except UserError as error:
    raise UserError(f"{where} describes no model: {error}") from None
  if not isinstance(found, EncoderPart):
    raise UserError(
      f"{where}.name is '{name}', which has no image encoder: give a model that has, such as MAGE"
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
  """Checks that the tokenizer of a pretrained model is that of `config.objective`; errors as `check_same`."""
  check_same(found, expected, "its tokenizer", "config.objective.tokenizer")


def check_same(found: Any, expected: Any, what: str = "it", where: str = "config.objective") -> None:
  """Checks that networks of a pretrained model are those of a config, but for how they are run.

  Args:
    found: the pretrained model's networks, a dataclass.
    expected: those of the config.
    what: what to call the former in errors.
    where: what to call the latter.

  Raises:
    UserError: naming a field that differs.
  """
  for field, (theirs, ours) in differences(found, expected).items():
    raise UserError(f"{what} has {field}={theirs}, {where} has {ours}: make them equal")


def differences(found: Any, expected: Any) -> dict[str, tuple[Any, Any]]:
  """The fields in which dataclasses differ, but for how they are run; None where one lacks a field."""
  theirs, ours = _described(found), _described(expected)
  pairs = {field: (theirs.get(field), ours.get(field)) for field in sorted(theirs.keys() | ours.keys())}
  return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}


def _described(value: Any, prefix: str = "") -> dict[str, Any]:
  """The fields of nested dataclasses by their path, but for how they are run and in which type."""
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
  """Checks options of `generate` and the like: the objective has to accept them as its `sampling`.

  Raises:
    UserError: for an unknown option, a value that the objective refuses, or an objective without `sampling`.
  """
  if not isinstance(options, Mapping):
    raise UserError(f"sampling is {options!r}: give options by name, such as dict(steps=8)")
  if not options:
    return
  whole: Any = objective
  defaults = getattr(whole, "sampling", None)
  if defaults is None:
    raise UserError(f"{', '.join(options)} given: this model does not sample images, leave it out")
  known = fields.of(type(defaults))
  for name in options:
    if name not in known:
      raise UserError(f"sampling has no option '{name}'{nearest(name, known)}")
  dataclasses.replace(whole, sampling=dataclasses.replace(defaults, **options))


def tokenizer_fingerprint(params: Tree) -> str:
  """Identifies a tokenizer by its parameters: token caches store it, and training compares it."""
  return tree.fingerprint({"params": {"generator": params}})


def compile_predict_fns(objective: Objective, mesh: jax.sharding.Mesh | None = None) -> dict[str, PredictFn]:
  """The objective's prediction functions, jitted for a mesh; see `maskgen.config.fields.static`."""
  walked = fields.walk(type(objective), objective)
  static = tuple({path[-1] for path, field, _ in walked if field.metadata.get("static")})

  def jit(fn: PredictFn) -> PredictFn:
    parameters = inspect.signature(fn).parameters.values()
    options = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    fn = sharding.on_mesh(fn, mesh) if mesh else fn
    return jax.jit(fn, static_argnames=static if options else ())

  return {name: jit(fn) for name, fn in objective.predict_fns().items()}
