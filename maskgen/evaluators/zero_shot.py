"""Zero-shot classification: images by the nearest class name (Radford et al. 2021, section 3.1)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from maskgen.errors import UserError
from maskgen.evaluators.batches import collect, first_batch, gather, place
from maskgen.evaluators.context import Call, Context, Report
from maskgen.evaluators.neighbours import normalized

_TOP = 5


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Accuracy over the evaluation split, without any training on its labels.

  A class is the mean of the embeddings of its prompts, one from each template.

  Metrics (fractions in [0, 1]):
    `top1`; `top5` if there are more than 5 classes.
    `top1_chance`, `top5_chance`: of guesses that know nothing, 1 and 5 over the number of classes.
    `top1_constant`: of always naming the most frequent class of the split.

  Attributes:
    templates: prompts in which "{}" stands for the name of a class.
  """

  requires: ClassVar[tuple[str, ...]] = ("embed_image", "embed_text")

  context: Context
  templates: tuple[str, ...] = ("{}",)

  def __post_init__(self):
    if self.context.class_names is None:
      remedy = self.context.lacks.get("label", "remove this evaluation")
      raise UserError(f"the data has no labels: {remedy}")
    if not self.templates or any(template.count("{}") != 1 for template in self.templates):
      raise UserError(f"templates is {self.templates}: give texts with '{{}}' once, for the class")
    _ = self._prompts  # this checks their words

  @property
  def _prompts(self) -> np.ndarray:
    """The prompts of all classes, int32 [classes * templates, length]."""
    assert self.context.captions is not None and self.context.class_names is not None
    texts = [template.replace("{}", name) for name in self.context.class_names for template in self.templates]
    return self.context.captions.read(texts)

  def trace(self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    shape = (batch["valid"].shape[0], self._prompts.shape[1])
    call("embed_image", {"image": batch["image"]})
    call("embed_text", {"caption": jax.ShapeDtypeStruct(shape, jnp.int32)})

  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Evaluates; `rng` is a typed key that is not used."""
    classes, count = self._classes(variables, rng), len(self.context.class_names or ())

    def embed(batch):
      return {
        "image": self.context.predict["embed_image"](variables, {"image": batch["image"]}, rng),
        "label": batch["label"],
      }

    found = collect(self.context, "eval", embed)
    likeliest = np.argsort(-found["image"] @ classes.T, axis=1, kind="stable")
    hits = likeliest[:, :_TOP] == found["label"][:, None]
    numbers = {
      "top1": float(hits[:, 0].mean()),
      "top1_chance": 1 / count,
      "top1_constant": float(np.bincount(found["label"]).max() / len(hits)),
    }
    if count > _TOP:
      numbers |= {"top5": float(hits.any(axis=1).mean()), "top5_chance": _TOP / count}
    return Report(numbers)

  def _classes(self, variables: Any, rng: jax.Array) -> np.ndarray:
    """An embedding of each class, float32 [classes, p], of length 1."""
    prompts, like = self._prompts, first_batch(self.context)
    size, parts = like["valid"].shape[0], []
    for start in range(0, len(prompts), size):
      rows = (start + np.arange(size)) % len(prompts)  # the surplus repeats the first ones
      batch = {"caption": place(like, prompts[rows])}
      parts.append(gather(self.context.predict["embed_text"](variables, batch, rng)))
    found = np.concatenate(parts)[: len(prompts)]
    return normalized(found.reshape(-1, len(self.templates), found.shape[-1]).mean(axis=1))
