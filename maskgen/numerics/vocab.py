"""Token ids: image codes, class ids and the mask token share one embedding table."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Vocab:
  """The vocabulary of a masked generative encoder.

  Ids 0 .. codebook-1 are image codes, followed by `classes` class ids; the last id is [MASK].

  Attributes:
    codebook: number of image codes.
    classes: number of class ids; the class position holds one of them.
    null_class: the class id, counted from 0, that means "no class".
  """

  codebook: int
  classes: int = 1
  null_class: int = 0

  @property
  def null_class_id(self) -> int:
    """The id at the class position of an unconditional model."""
    return self.codebook + self.null_class

  @property
  def mask_id(self) -> int:
    """The id of [MASK]."""
    return self.codebook + self.classes

  @property
  def size(self) -> int:
    """The number of rows of the embedding table."""
    return self.codebook + self.classes + 1
