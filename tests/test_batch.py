"""What objectives read from a batch, and data that does not provide it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from maskgen.batch import ArraySpec, BatchSpec, check_data
from maskgen.errors import UserError
from maskgen.numerics.text import Captions

WORDS = Captions(text_tokenizer="list:a red blue cat", length=6)
FULL = BatchSpec(
  image_shape=(4, 6, 3),
  num_tokens=12,
  codebook_size=300,
  views=2,
  num_classes=5,
  captions=WORDS,
  others={"depth": ArraySpec((4, 6), "float32", 1)},
)


def data(wanted: BatchSpec, **changes):
  """A fake that provides what an objective reads, except for the changes."""
  given = dict(
    spec=wanted.shapes(1),
    image_shape=wanted.image_shape,
    class_names=tuple("abcdefgh"[: wanted.num_classes]) or None,
    captions=wanted.captions,
    lacks={},
  )
  return SimpleNamespace(**(given | changes))


def test_shapes_are_those_of_images_or_of_codes():
  def array(shape, dtype):
    return jax.ShapeDtypeStruct((2, *shape), dtype)

  rest = {
    "label": array((), jnp.int32),
    "caption": array((6,), jnp.int32),
    "depth": array((4, 6), jnp.float32),
  }
  images, codes = array((4, 6, 3), jnp.uint8), array((12,), jnp.uint16)
  assert FULL.shapes(2) == {"image": images, "image2": images, **rest}
  assert FULL.shapes(2, "tokens") == {"tokens": codes, "tokens2": codes, **rest}
  assert BatchSpec(image_shape=(4, 6, 3)).shapes(2) == {"image": images}
  check_data(FULL, data(FULL), "mine", "folder:x")


def without(*names):
  return dict(spec={name: leaf for name, leaf in FULL.shapes(1).items() if name not in names})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (without("image"), "objective 'mine' needs image or tokens"),
    (without("image2"), r"put 'two_views\|' in front of config.data.preprocess, or add 'second_crop' to it"),
    (
      dict(image_shape=(4, 4, 3)),
      r"provides images of shape \(4, 4, 3\), but config.objective takes \(4, 6, 3\)",
    ),
    (without("label"), "config.data.source=folder:x provides no labels, but objective 'mine' needs them"),
    (
      without("label") | dict(lacks={"label": "'x.jpg' is loose: move it"}),
      "provides no labels, but objective 'mine' needs them: 'x.jpg' is loose: move it",
    ),
    (dict(class_names=("a", "b")), "has 2 classes, but config.objective.classes is 5"),
    (dict(captions=None), "provides no captions, but objective 'mine' reads Captions"),
    (without("depth"), r"provides nothing as 'depth', but objective 'mine' needs float32\[4, 6\]"),
    (
      dict(spec=FULL.shapes(1) | {"depth": jax.ShapeDtypeStruct((1, 4), jnp.int32)}),
      r"provides int32\[4\] as 'depth'",
    ),
  ],
)
def test_data_that_does_not_fit_is_named(changes, message):
  with pytest.raises(UserError, match=message):
    check_data(FULL, data(FULL, **changes), "mine", "folder:x")
