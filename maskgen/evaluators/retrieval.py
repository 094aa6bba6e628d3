"""Retrieval of captions by images, and of images by captions (Radford et al. 2021, appendix E)."""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np

from maskgen.config import check_at_least
from maskgen.evaluators.batches import collect
from maskgen.evaluators.context import Context, Report
from maskgen.evaluators.neighbours import nearest

_AT = (1, 5)


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Recall among the first pictures of the evaluation split and their captions.

  Captions that are equal count once, and all of their pictures are right.

  Metrics (fractions in [0, 1]), for k of 1 and 5:
    `image_to_text_recallK`: the share of images whose caption is among the k nearest ones.
    `text_to_image_recallK`: the share of captions with one of their images among the k nearest.
    Both with the ending `_chance`: of k drawn at random.

  Attributes:
    num_images: the number of images, at most those of the split.
  """

  requires: ClassVar[tuple[str, ...]] = ("embed_image", "embed_text")

  context: Context
  num_images: int = 1000

  def __post_init__(self):
    check_at_least(self, 2, "num_images")

  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Evaluates; `rng` is a typed key that is not used."""

    def embed(batch):
      image, text = (self.context.predict[name](variables, batch, rng) for name in self.requires)
      return {"image": image, "text": text, "caption": batch["caption"]}

    found = collect(self.context, "eval", embed, self.num_images)
    _, first, number = np.unique(found["caption"], axis=0, return_index=True, return_inverse=True)
    return Report(recalls(found["image"], found["text"][first], number.reshape(-1)))


def recalls(images: np.ndarray, texts: np.ndarray, number: np.ndarray) -> dict[str, float]:
  """The metrics.

  Args:
    images: float32 [n, p], of length 1.
    texts: float32 [m, p], of length 1.
    number: int [n], the text of each image; each text has one.
  """
  numbers: dict[str, float] = {}
  for k in _AT:
    by_image = nearest(images, texts, min(k, len(texts)))[1]
    by_text = number[nearest(texts, images, min(k, len(images)))[1]]
    numbers |= {
      f"image_to_text_recall{k}": float((by_image == number[:, None]).any(axis=1).mean()),
      f"image_to_text_recall{k}_chance": min(k / len(texts), 1.0),
      f"text_to_image_recall{k}": float((by_text == np.arange(len(texts))[:, None]).any(axis=1).mean()),
      f"text_to_image_recall{k}_chance": float(_found_by_chance(np.bincount(number), len(images), k).mean()),
    }
  return numbers


def _found_by_chance(right: np.ndarray, images: int, k: int) -> np.ndarray:
  """The probability that k of all images, drawn without replacement, contain one of `right` [m] ones."""
  drawn = np.arange(min(k, images))
  missed = (images - right[:, None] - drawn[None]).clip(0) / (images - drawn[None])
  return 1.0 - missed.prod(axis=1)
