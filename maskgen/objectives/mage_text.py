"""Text-conditional MAGE: the condition is the features of a caption.

The text encoder is trained with the decoder. The paper's condition is a class (Li et al. 2023, appendix A.2).
Letters: b batch, l positions of a caption, c the width of its features.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from maskgen.models.text_encoder import TextEncoder
from maskgen.numerics.text import Captions
from maskgen.objectives import Batch, Tree, mage_conditional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(mage_conditional.Conditional):
  """Text-conditional MAGE: the condition is a text encoder's output at every position of the caption.

  Attributes:
    captions: how captions are tokenized.
    text_encoder: its width is set to `condition_width`, its vocabulary and number of positions are set from
      `captions`.
  """

  condition_key: ClassVar[str] = "caption"

  captions: Captions = dataclasses.field()  # type: ignore[misc]  # a ClassVar in the base class
  text_encoder: TextEncoder = TextEncoder()

  @property
  def reader(self) -> TextEncoder:
    """The text encoder."""
    return self.text_encoder.clone(
      vocabulary_size=self.captions.opened.vocabulary_size,
      positions=self.captions.length,
      width=self.condition_width,
    )

  def _init_condition(self, rng: jax.Array) -> dict[str, Tree]:
    ids, end = jnp.zeros((1, self.captions.length), jnp.int32), jnp.zeros((1,), jnp.int32)
    return {"text_encoder": self.reader.init(rng, ids, end)["params"]}

  def _condition(self, params: Mapping[str, Tree], batch: Batch) -> jax.Array:
    ids = batch["caption"]
    end = (ids == self.captions.opened.end_id).argmax(axis=1)
    encoded: Any = self.reader.apply({"params": params["main"]["text_encoder"]}, ids, end)
    return encoded.last

  def _no_condition(self, params: Mapping[str, Tree]) -> jax.Array:
    return self._condition(params, {"caption": jnp.asarray(self.captions.read([""]))})
