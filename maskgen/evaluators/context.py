"""What every evaluator is given, and what it gives back."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from maskgen.numerics.text import Captions

Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Context:
  """A run, as evaluators see it.

  Attributes:
    predict: prediction functions `fn(variables, batch, rng, **static)`, compiled, by name.
    batches: gives one pass over split "train" or "eval" with the evaluation preprocessing, as global
      arrays on the devices: "image" uint8 [b, h, w, c], "label" int32 [b] where the data has classes,
      "caption" int32 [b, length] where it has captions and they are tokenized, "valid" bool [b], False for
      padding. Every batch has the same size.
    fresh_variables: (seed, frozen) -> untrained variables of the same shapes beside these frozen parts.
    codebook_size: the number of codes, or None where the objective has no codebook.
    class_names: the classes, or None where the data has no labels.
    num_classes: how many classes `generate` and `inpaint` take a `label` of; 0 where they take none.
    captions: how the `caption` of `loss` and `generate` is read; None where they take none.
    image_tokens: how many tokens an image has that stand among words, of which `reconstruct` takes a
      `number`; 0 where it takes none.
  """

  predict: Mapping[str, Callable[..., Any]]
  batches: Callable[[str], Iterable[Batch]]
  fresh_variables: Callable[[int, Any], Any]
  codebook_size: int | None
  class_names: tuple[str, ...] | None
  num_classes: int = 0
  captions: Captions | None = None
  image_tokens: int = 0


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
  """A frozen dataclass with its options as fields; all processes call `run` together."""

  requires: ClassVar[tuple[str, ...]]

  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Evaluates `variables`; `rng` is a typed key."""
    ...
