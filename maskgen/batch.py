"""The arrays that an objective reads from a batch, to check data and to build shapes."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskgen.errors import UserError
from maskgen.numerics.text import Captions


class ArraySpec(NamedTuple):
  """One array of a batch.

  Attributes:
    shape: the shape without the leading axis.
    dtype: the name of the dtype.
    below: values are at least 0 and less than this.
  """

  shape: tuple[int, ...]
  dtype: str
  below: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSpec:
  """The arrays that the losses of an objective read from a batch, each with a leading axis b.

  The training step adds "key", one PRNG key per example.

  Attributes:
    image_shape: (h, w, c) of "image", and of the pictures behind cached tokens.
    num_tokens: the number of codes [n] in "tokens" that can replace an image; 0 if pixels are required.
    codebook_size: the number of different codes; 0 without tokens.
    views: the number of views of each record; with 2, a batch also has "image2" or "tokens2".
    num_classes: the number of classes of the integer "label" [b]; 0 if labels are not read.
    captions: how "caption" int32 [b, length] is tokenized; None if captions are not read.
    others: further arrays by key.
    whole_batch: whether examples are compared with all others of the batch, which rules out accumulation.
  """

  image_shape: tuple[int, int, int]
  num_tokens: int = 0
  codebook_size: int = 0
  views: int = 1
  num_classes: int = 0
  captions: Captions | None = None
  others: Mapping[str, ArraySpec] = dataclasses.field(default_factory=dict)
  whole_batch: bool = False

  @property
  def inputs(self) -> dict[str, ArraySpec]:
    """The alternative inputs, of which a batch has one."""
    found = {"image": ArraySpec(self.image_shape, "uint8", 256)}
    if self.num_tokens:
      code = np.min_scalar_type(self.codebook_size - 1).name
      found["tokens"] = ArraySpec((self.num_tokens,), code, self.codebook_size)
    return found

  def arrays(self, source: str = "image") -> dict[str, ArraySpec]:
    """All arrays of a batch of images, or of cached tokens with `source="tokens"`."""
    given = self.inputs[source]
    found = {source: given} | {f"{source}{view}": given for view in range(2, self.views + 1)}
    if self.num_classes:
      found["label"] = ArraySpec((), "int32", self.num_classes)
    if self.captions is not None:
      words = self.captions.opened.vocabulary_size
      found["caption"] = ArraySpec((self.captions.length,), "int32", words)
    return found | dict(self.others)

  def shapes(self, size: int, source: str = "image") -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of `size` examples, to trace functions of it."""
    return {
      name: jax.ShapeDtypeStruct((size, *array.shape), jnp.dtype(array.dtype))
      for name, array in self.arrays(source).items()
    }


def check_data(wanted: BatchSpec, data: Any, name: str, source: str) -> None:
  """Checks that a data set provides what an objective reads.

  Args:
    wanted: what the objective reads.
    data: a `data.pipeline.Data`, or a substitute with its `spec`, `image_shape`, `class_names`, `captions`
      and `lacks`.
    name: the objective's name, for errors.
    source: the data's source, for errors.

  Raises:
    UserError: if it does not.
  """
  spec, inputs = data.spec, wanted.inputs
  if spec.keys().isdisjoint(inputs):
    raise UserError(
      f"config.data provides {', '.join(sorted(spec))}, but objective '{name}' needs {' or '.join(inputs)}: "
      "change config.data.source"
    )
  if wanted.views == 2 and spec.keys().isdisjoint(f"{key}2" for key in inputs):
    other = ", or add 'second_crop' to it" if "image" in spec else ""
    raise UserError(
      f"config.data provides one view of each record, but objective '{name}' compares two: put 'two_views|' "
      f"in front of config.data.preprocess{other}"
    )
  if data.image_shape != wanted.image_shape:
    raise UserError(
      f"config.data provides images of shape {data.image_shape}, but config.objective takes "
      f"{wanted.image_shape}: change config.data.preprocess or config.objective.image_size"
    )
  if wanted.num_classes and "label" not in spec:
    remedy = data.lacks.get("label", "use data with classes")
    raise UserError(
      f"config.data.source={source} provides no labels, but objective '{name}' needs them: {remedy}"
    )
  found = len(data.class_names or ())
  if wanted.num_classes not in (0, found):
    raise UserError(
      f"config.data has {found} classes, but config.objective.classes is {wanted.num_classes}: make them "
      "equal"
    )
  if wanted.captions is not None and wanted.captions != data.captions:
    raise UserError(
      f"config.data provides {data.captions or 'no captions'}, but objective '{name}' reads "
      f"{wanted.captions}: use data with captions, and end preprocess and eval_preprocess with tokenize and "
      "this tokenizer and length"
    )
  for key, array in wanted.others.items():
    given = f"{spec[key].dtype}{list(spec[key].shape[1:])}" if key in spec else "nothing"
    if given != (needed := f"{array.dtype}{list(array.shape)}"):
      raise UserError(
        f"config.data provides {given} as '{key}', but objective '{name}' needs {needed} for each record: "
        "change config.data.source or config.data.preprocess"
      )
