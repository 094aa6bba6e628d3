"""Grids of images to look at."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from maskgen import images as images_lib
from maskgen import sheet
from maskgen.evaluators.batches import first_batch, gather, generate, make_keys, place, valid_rows
from maskgen.evaluators.context import Context

_COLUMNS = 16
_CLASSES = 16
_NAMED_SIDE, _NAME_WIDTH = 64, 128  # pixels; images are at least this large
_HOLE_COLOUR = (255, 0, 255)  # magenta: rare in images

# The (rows, columns) that an inpainting mask hides in an image of height h and width w.
MASKS: dict[str, Callable[[int, int], tuple[slice, slice]]] = {
  "center": lambda h, w: (slice(h // 4, h - h // 4), slice(w // 4, w - w // 4)),
  "right": lambda h, w: (slice(None), slice(w // 2, None)),
  "lower": lambda h, w: (slice(h // 2, None), slice(None)),
  "corner": lambda h, w: (slice(h // 2, None), slice(w // 2, None)),
}


def named(rows: Mapping[str, np.ndarray], columns: int = 0) -> np.ndarray:
  """Draws rows of images below each other, each after its name.

  Args:
    rows: images [n, h, w, c] each, uint8 or float in [0, 1], by name.
    columns: the number of images after which the rows wrap, by default n.

  Returns:
    uint8 [H, W, 3].
  """
  count = len(next(iter(rows.values())))
  columns = min(columns or count, count)
  lines = []
  for start in range(0, count, columns):
    for name, images in rows.items():
      shown = images_lib.to_uint8(images[start : start + columns])
      blank = np.full((columns - len(shown), *shown.shape[1:]), 255, np.uint8)
      large = [images_lib.enlarge(one, _NAMED_SIDE) for one in (*shown, *blank)]
      row = images_lib.grid(np.stack(large), columns)
      lines.append(np.concatenate([sheet.page(name, len(row), _NAME_WIDTH), row], axis=1))
  return np.concatenate(lines)


def reconstructions(context: Context, variables: Any, rng: jax.Array, count: int) -> np.ndarray:
  """Draws the first `count` evaluation images (at most one batch) above their reconstructions."""
  batch = first_batch(context)
  results = context.predict["reconstruct"](variables, batch, rng)
  rows = {"images": batch["image"], "reconstructions": results}
  return named({name: valid_rows(batch, images)[:count] for name, images in rows.items()}, _COLUMNS)


def generated(
  context: Context, variables: Any, rng: jax.Array, count: int, seed: int, **options: Any
) -> np.ndarray:
  """Draws about `count` generated images; with classes, a row for each of at most 16 classes."""
  classes = context.num_classes
  rows = min(classes, _CLASSES)
  columns = max(count // rows, 1) if classes else None
  draws = generate(
    context.predict["generate"],
    variables,
    rng,
    like=first_batch(context),
    seed=seed,
    num_images=columns * rows if columns else count,
    num_classes=rows,
    **options,
  )
  images = np.concatenate([gather(x)[:n] for x, n in draws])
  if columns:
    # Image i is of class i % rows.
    by_class = images.reshape(columns, rows, *images.shape[1:]).swapaxes(0, 1)
    names = dict(enumerate(context.class_names or ()))
    return named({f"{i} {names.get(i, '')}": row for i, row in enumerate(by_class)})
  return images_lib.grid(images)


def inpainted(
  context: Context,
  variables: Any,
  rng: jax.Array,
  count: int,
  seed: int,
  masks: Sequence[str],
  **options: Any,
) -> np.ndarray:
  """Draws three named rows for each mask: the images, the images with the hole, the filled images.

  Class-conditional models are given the labels of the images.
  """
  batch = first_batch(context)
  shape = batch["image"].shape[:3]
  originals = images_lib.to_uint8(valid_rows(batch, batch["image"])[:count])
  if originals.shape[-1] == 1:
    originals = np.repeat(originals, 3, axis=-1)  # so that the hole shows in colour
  stacks = []
  for name in masks:
    hole = np.zeros(shape, bool)
    hole[:, *MASKS[name](*shape[1:])] = True
    inputs = {
      "image": batch["image"],
      "mask": place(batch, hole),
      "key": make_keys(batch, seed),
    }
    if context.num_classes:
      inputs["label"] = batch["label"]
    results = context.predict["inpaint"](variables, inputs, rng, **options)
    filled = images_lib.to_uint8(valid_rows(batch, results)[:count])
    filled = np.broadcast_to(filled, originals.shape)
    holed = np.where(hole[0, ..., None], np.array(_HOLE_COLOUR, np.uint8), originals)
    stacks.append(named({"images": originals, f"hole: {name}": holed, "filled": filled}, _COLUMNS))
  return np.concatenate(stacks)
