"""The context that every evaluator receives, and the report that it returns."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from maskgen import objectives
from maskgen.numerics.text import Captions

Batch = Mapping[str, jax.Array]
Call = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Context:
  """The parts of a run that evaluators use.

  Attributes:
    objective: the objective, which describes the inputs and outputs of its prediction functions.
    predict: compiled prediction functions `fn(variables, batch, rng, **static)` by name.
    batches: returns one pass over the split "train" or "eval" with the evaluation preprocessing, as global
      arrays on the devices: "image" uint8 [b, h, w, c]; "label" int32 [b] if the data has classes; "caption"
      int32 [b, length] if it has captions and they are tokenized; "valid" bool [b], False for padding. All
      batches have the same size.
    fresh_variables: (seed, frozen) -> untrained variables of the same shapes, with these frozen parts.
    class_names: the classes, or None if the data has no labels.
    lacks: why it has none, if some records could have some: `{"label": problem and remedy}`.
    num_train: the number of images of the split "train", if it is known.
    networks: the feature networks that the evaluator has opened, by name, as receipts describe them: how
      pictures are prepared ("protocol") and the hash of the weights ("weights").
  """

  objective: Any
  predict: Mapping[str, Callable[..., Any]]
  batches: Callable[[str], Iterable[Batch]]
  fresh_variables: Callable[[int, Any], Any]
  class_names: tuple[str, ...] | None
  lacks: Mapping[str, str] = dataclasses.field(default_factory=dict)
  num_train: int | None = None
  networks: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

  @property
  def codebook_size(self) -> int:
    """The number of codes that `encode` chooses from; 0 without a tokenizer."""
    return self.objective.codebook_size

  @property
  def num_classes(self) -> int:
    """The number of classes of `label` for `generate` and `inpaint`; 0 if they take no labels."""
    return self.objective.num_classes

  @property
  def captions(self) -> Captions | None:
    """How the `caption` of `loss` and `generate` is tokenized; None if they take no captions."""
    return self.objective.captions

  def check_sampling(self, options: Mapping[str, Any]) -> None:
    """Checks options of sampling functions such as `generate`: fields of the objective's `sampling`.

    Raises:
      UserError: for an unknown option, or a value that the objective rejects.
    """
    objectives.check_sampling(self.objective, options)

  def full_sampling(self, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of sampling functions that are called with these, the objective's own included."""
    defaults = getattr(self.objective, "sampling", None)
    return ({} if defaults is None else dataclasses.asdict(defaults)) | dict(options)


@dataclasses.dataclass(frozen=True)
class Report:
  """The result of one evaluation.

  Attributes:
    numbers: metrics by name.
    pictures: uint8 [h, w, 3] by name.
    tables: rows by name, at least one, with the same columns.
  """

  numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
  pictures: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  tables: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)


class Evaluator(Protocol):
  """A frozen dataclass whose fields are its options; all processes call `run` together.

  Attributes:
    requires: the prediction functions that `run` calls.
  """

  requires: ClassVar[tuple[str, ...]]

  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Evaluates `variables`; `rng` is a typed key."""

  def trace(self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Makes the calls of `run` with shapes; by default, each function in `requires` with an evaluation batch.

    Args:
      call: (name of a prediction function, batch of shapes, **options) -> shapes of what it returns.
      batch: the shapes of an evaluation batch.
    """

  def memory(
    self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct], num_images: Mapping[str, int]
  ) -> int:
    """The memory of a host that `run` needs for what it collects, in bytes; by default 0, for a few batches.

    A run that does not have it is refused before its first step.

    Args:
      call: see `trace`.
      batch: likewise.
      num_images: the number of images of each split.
    """

  def facts(self) -> Mapping[str, Any]:
    """What its metrics depend on beside its options, for receipts; by default nothing. A collective call.

    Everything is JSON: how images were labelled, what they were compared with. Feature networks that are
    opened with the context are recorded without it.
    """
