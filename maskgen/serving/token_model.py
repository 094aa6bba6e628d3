"""Masked generative models."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from maskgen import images as images_lib
from maskgen.numerics import editing
from maskgen.serving import requests
from maskgen.serving.generative import GenerativeModel
from maskgen.serving.requests import Label
from maskgen.serving.tokenizer import Tokenizer


class TokenModel(GenerativeModel, Tokenizer):
  """A masked generative model such as MAGE: it generates, edits and encodes images as tokens.

  model = maskgen.load("runs/quickstart/mage")
  images = model.generate(seed=0, batch=16)
  edited = model.inpaint(images, hole)  # hole: bool [h, w], True for pixels to regenerate
  """

  def logits(self, tokens: np.ndarray, token_mask: np.ndarray) -> np.ndarray:
    """Returns the model's logits at every position.

    Args:
      tokens: int [b, n].
      token_mask: bool [b, n]; True hides the token from the model.

    Returns:
      float32 [b, n, codebook].
    """
    tokens = self.check_tokens(tokens)
    token_mask = images_lib.check_mask(token_mask, tokens.shape, "token_mask")
    return self._each("logits", {"tokens": tokens, "token_mask": token_mask})

  def trajectory(
    self,
    seed: int = 0,
    batch: int | None = None,
    label: Label | None = None,
    prompt: str | Sequence[str] | None = None,
    **options: Any,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the intermediate results of `generate`, with the same arguments.

    Returns:
      Images float32 [batch, steps, h, w, c] in [0, 1] after each step, in which unknown tokens have their
      most recent samples; and which tokens are unknown, bool [batch, steps, h', w'].
    """
    return self._each("trajectory", self.request(seed, batch, label, prompt), **self._options(options))

  def inpaint(
    self,
    images: images_lib.Pictures,
    pixel_mask: np.ndarray,
    seed: int = 0,
    label: Label | None = None,
    prompt: str | Sequence[str] | None = None,
    *,
    feather: int = 0,
    **options: Any,
  ) -> np.ndarray:
    """Regenerates the masked pixels; all others keep their values.

    Images may have any size: the model fills a window around the hole, scaled to its own size and back.

    Args:
      images: [b, h, w, c], or one image [h, w, c].
      pixel_mask: [b, h, w] or [h, w]; True, 1 or 255 for pixels to regenerate.
      seed: random seed; image i depends only on the seed and i.
      label: as for `generate`.
      prompt: likewise.
      feather: width in pixels of a band around the hole that is also regenerated and blended into the image.
      **options: as for `generate`.

    Returns:
      Images of the same shape and dtype.
    """
    checked, single = self._batch(images)
    shape = checked.shape[:3]
    mask = images_lib.regular(pixel_mask, "pixel_mask", "give booleans, True where masked")
    if mask.shape in (shape[1:], (*shape[1:], 1)):
      mask = np.broadcast_to(mask, (len(checked), *mask.shape))
    mask, feather = (
      images_lib.check_mask(mask, shape, "pixel_mask"),
      requests.whole("feather", feather, least=0),
    )
    request, options = self.request(seed, len(checked), label, prompt), self._options(options)
    floats = np.asarray(images_lib.to_float(jnp.asarray(checked)))
    filled = images_lib.like(checked, self._fill(floats, mask, request, feather, options))
    return filled[0] if single else filled

  def outpaint(
    self,
    images: images_lib.Pictures,
    top: int | float = 0,
    right: int | float = 0,
    bottom: int | float = 0,
    left: int | float = 0,
    seed: int = 0,
    **options: Any,
  ) -> np.ndarray:
    """Extends images beyond their sides.

    Args:
      images: [b, h, w, c], or one image [h, w, c].
      top: the size of the extension: an int in pixels, or a float as a fraction of h (or w).
      right: see `top`.
      bottom: see `top`.
      left: see `top`.
      seed: random seed.
      **options: as for `inpaint`, including `label` and `feather`.

    Returns:
      Larger images of the same dtype.
    """
    checked, single = self._batch(images)
    canvas, added = editing.extend(checked, (top, right, bottom, left))
    filled = self.inpaint(canvas, added, seed, **options)
    return filled[0] if single else filled

  def _batch(self, images: images_lib.Pictures) -> tuple[np.ndarray, bool]:
    """Images of any size as a batch, and whether a single image was given."""
    given = images_lib.as_array(images, channels=self.objective.image_shape[-1])
    return self.check_images(given[None] if given.ndim == 3 else given, any_size=True), given.ndim == 3

  def _fill(
    self,
    images: np.ndarray,
    holes: np.ndarray,
    request: Mapping[str, Any],
    feather: int,
    options: dict[str, Any],
  ) -> np.ndarray:
    """Fills holes bool [b, h, w] of float32 images [b, h, w, c] of any size, each in its own window."""
    size = self.objective.image_shape[:2]
    factor = math.isqrt(math.prod(size) // self.num_tokens)
    grown = [editing.grow(hole, feather) for hole in holes]
    windows = [editing.choose_window(hole, size, factor) for hole in grown]
    cuts = [w.cut(image, hole, size) for w, image, hole in zip(windows, images, grown, strict=True)]
    image, mask = (np.stack(part) for part in zip(*cuts, strict=True))
    made = self._each("inpaint", {"image": image, "mask": mask, **request}, **options)
    parts = zip(windows, images, made, holes, strict=True)
    return np.stack([w.paste(image, new, editing.opacity(hole, feather)) for w, image, new, hole in parts])
