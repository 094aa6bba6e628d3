"""What every evaluator is given, and what it gives back."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from maskgen import objectives
from maskgen.numerics.text import Captions

Batch = Mapping[str, jax.Array]
Call = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Context:
  """A run, as evaluators see it.

  Attributes:
    objective: what is trained, to ask what its prediction functions take and give.
    predict: prediction functions `fn(variables, batch, rng, **static)`, compiled, by name.
    batches: gives one pass over split "train" or "eval" with the evaluation preprocessing, as global
      arrays on the devices: "image" uint8 [b, h, w, c], "label" int32 [b] where the data has classes,
      "caption" int32 [b, length] where it has captions and they are tokenized, "valid" bool [b], False for
      padding. Every batch has the same size.
    fresh_variables: (seed, frozen) -> untrained variables of the same shapes beside these frozen parts.
    class_names: the classes, or None where the data has no labels.
  """

  objective: Any
  predict: Mapping[str, Callable[..., Any]]
  batches: Callable[[str], Iterable[Batch]]
  fresh_variables: Callable[[int, Any], Any]
  class_names: tuple[str, ...] | None

  @property
  def codebook_size(self) -> int:
    """The number of codes that `encode` chooses from; 0 without a tokenizer."""
    return self.objective.codebook_size

  @property
  def num_classes(self) -> int:
    """How many classes `generate` and `inpaint` take a `label` of; 0 where they take none."""
    return self.objective.num_classes

  @property
  def captions(self) -> Captions | None:
    """How the `caption` of `loss` and `generate` is read; None where they take none."""
    return self.objective.captions

  def check_sampling(self, options: Mapping[str, Any]) -> None:
    """Checks options of `generate` and the like: fields of the objective's `sampling`, its defaults.

    Raises:
      UserError: for an unknown option, or a value that the objective refuses.
    """
    objectives.check_sampling(self.objective, options)


@dataclasses.dataclass(frozen=True)
class Report:
  """The result of one evaluation.

  Attributes:
    numbers: metrics by name.
    pictures: uint8 [h, w, 3] by name.
  """

  numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
  pictures: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Evaluator(Protocol):
  """A frozen dataclass with its options as fields; all processes call `run` together.

  Attributes:
    requires: prediction functions that `run` calls.
  """

  requires: ClassVar[tuple[str, ...]]

  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Evaluates `variables`; `rng` is a typed key."""

  def trace(self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Calls what `run` calls, with shapes; by default each function of `requires` with an evaluation batch.

    Args:
      call: (name of a prediction function, batch of shapes, **options) -> shapes of what it returns.
      batch: the shapes of an evaluation batch.
    """
