"""A trained model that a user can call."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskgen import images, objectives
from maskgen.errors import UserError, nearest
from maskgen.images import to_float
from maskgen.numerics import editing, sampling
from maskgen.objectives import vilex
from maskgen.serving import lexicon


class Model:
  """A trained model. Which methods work depends on what was trained; the others say so.

  Images go in as uint8 in 0..255 or floats in [0, 1], [b, h, w, c].

  Attributes:
    config: the plain config the model was trained with; `config["objective"]` builds it.
    objective: the objective built from it.
    variables: `{"params": {group: tree}, "frozen": tree, "extra": tree}`, averages in place.
  """

  def __init__(self, config: Mapping[str, Any], objective: objectives.Objective, variables: Any):
    self.config = config
    self.objective = objective
    self.variables = variables
    self._fns = objectives.compile_predict_fns(objective)

  def encode(self, images: np.ndarray, num_tokens: int | None = None) -> np.ndarray:
    """The codes of images, int32 [b, n], row by row of the token grid.

    Of a visual lexicon the tokens of images, float32 [b, k, d], k being num_tokens, by default all: vectors
    that can stand among words. The first tokens say what matters most.
    """
    if num_tokens is not None or isinstance(self.objective, vilex.Objective):
      number = lexicon.check_number(self._lexicon, num_tokens)
      return self._call("encode", {"image": self._images(images)})[:, :number]
    return self._call("encode", {"image": self._images(images)})

  def decode(self, tokens: np.ndarray) -> np.ndarray:
    """The images of codes int32 [b, n]; float32 [b, h, w, c] in [0, 1]."""
    return self._call("decode", {"tokens": self._tokens(tokens)})

  def reconstruct(
    self, images: np.ndarray, num_tokens: int | None = None, seed: int = 0, **options: Any
  ) -> np.ndarray:
    """Images through the tokenizer and back, in the dtype they came in.

    A visual lexicon draws them anew from num_tokens of their tokens, by default all; another seed makes
    variations. Its options are those of `generate`.
    """
    checked = self._images(images)
    batch: dict[str, Any] = {"image": checked}
    if num_tokens is not None or options or isinstance(self.objective, vilex.Objective):
      number = np.full((len(checked), 1), lexicon.check_number(self._lexicon, num_tokens), np.int32)
      batch |= {"number": number, "key": _keys(seed, len(checked))}
    return _like(checked, self._call("reconstruct", batch, **self._options(options)))

  def interpolate(
    self, first: np.ndarray, second: np.ndarray, count: int = 5, seed: int = 0, **options: Any
  ) -> np.ndarray:
    """Images between two of a visual lexicon, [h, w, c] or tokens [k, d]; float32 [count, h, w, c].

    All are made of the same noise. Of two numbers of tokens the smaller one counts.
    """
    start, end = (self._vectors(image)[0] for image in (first, second))
    start, end = start[: len(end)], end[: len(start)]
    between = [lexicon.between(start, end, share) for share in lexicon.shares(count)]
    made = [self.generate(seed, 1, images=[tokens], **options) for tokens in between]
    return np.concatenate(made)

  def features(self, images: np.ndarray) -> np.ndarray:
    """Representations, float32 [b, d]: the mean of the last encoder block's tokens, normalised.

    Of a visual lexicon they are those of its encoder, for a ViT after its last normalisation.
    """
    return self._call("features", {"image": self._images(images)})

  def classify(self, images: np.ndarray) -> np.ndarray:
    """The probability of each class, float32 [b, classes], in the order of the training data's classes."""
    return self._call("classify", {"image": self._images(images)})

  def logits(self, tokens: np.ndarray, token_mask: np.ndarray) -> np.ndarray:
    """What the model predicts at every position.

    Args:
      tokens: int [b, n].
      token_mask: bool [b, n]; True hides the token from the model.

    Returns:
      float32 [b, n, codebook].
    """
    tokens = self._tokens(tokens)
    token_mask = _mask(token_mask, tokens.shape, "token_mask")
    return self._call("logits", {"tokens": tokens, "token_mask": token_mask})

  def generate(
    self,
    seed: int = 0,
    batch: int | None = None,
    label: int | Sequence[int] | np.ndarray | None = None,
    prompt: str | Sequence[str] | None = None,
    images: Sequence[np.ndarray] | None = None,
    num_tokens: lexicon.Numbers = None,
    negative_prompt: str | None = None,
    **options: Any,
  ) -> np.ndarray:
    """New images, float32 [batch, h, w, c] in [0, 1]; image i depends on the seed, i and its label or prompt.

    Args:
      seed: of the randomness.
      batch: how many; by default one per label or prompt, or 16; for a visual lexicon one, or one per row of
        its images.
      label: a class, or one per image, of a model that was trained with classes; None for no class.
      prompt: a text, or one per image, for a model that was trained with captions; None for no text. For a
        visual lexicon one text, with "{}" where an image is to stand, see `maskgen.serving.lexicon.lay_out`.
      images: those of the prompt of a visual lexicon: each [h, w, c], or its tokens [k, d] from `encode`; or
        with a leading axis b, one for each image that is made.
      num_tokens: of all of them, or a list of one for each; by default as many as there are, or as fit.
      negative_prompt: for a visual lexicon, a text that guidance leads away from.
      **options: the fields of the `Sampling` of `maskgen.numerics.sampling`, or of `numerics.diffusion` for a
        diffusion model, or of `models.vilex` for a visual lexicon; by default those of the config.
    """
    plain = images is None and num_tokens is None and negative_prompt is None
    if plain and not isinstance(self.objective, vilex.Objective):
      return self._call("generate", self._wanted(seed, batch, label, prompt), **self._options(options))
    objective = self._lexicon
    vectors = [self._vectors(image) for image in lexicon.in_turn(objective, images)]
    if prompt is not None and not isinstance(prompt, str):
      raise UserError(f"prompt is {prompt!r}: give one text for all images that are made")
    rows = max([len(tokens) for tokens in vectors], default=1)
    wanted = self._wanted(seed, rows if batch is None else batch, label)
    batch = len(wanted["key"])
    wanted |= lexicon.lay_out_batch(objective, prompt or "", vectors, num_tokens, batch)
    if negative_prompt is not None:
      wanted["avoided"] = np.repeat(objective.texts.read([negative_prompt]), batch, axis=0)
    return self._call("generate", wanted, **self._options(options))

  def trajectory(
    self, seed: int = 0, batch: int | None = None, label: Any = None, prompt: Any = None, **options: Any
  ) -> tuple[np.ndarray, np.ndarray]:
    """How the images of `generate`, with the same arguments, come into being.

    Returns:
      Images float32 [batch, steps, h, w, c] in [0, 1] after each step, in which unknown tokens are as drawn
      last; and which tokens are unknown, bool [batch, steps, h', w'].
    """
    return self._call("trajectory", self._wanted(seed, batch, label, prompt), **self._options(options))

  def inpaint(
    self,
    images: np.ndarray,
    pixel_mask: np.ndarray,
    seed: int = 0,
    label: int | Sequence[int] | np.ndarray | None = None,
    prompt: str | Sequence[str] | None = None,
    *,
    feather: int = 0,
    **options: Any,
  ) -> np.ndarray:
    """Makes the masked pixels anew; all others keep their values.

    Images may have any size: the model fills a window around the hole, scaled to its own size and back.

    Args:
      images: [b, h, w, c], or one image [h, w, c].
      pixel_mask: bool [b, h, w] or [h, w], True where pixels are to be made anew.
      seed: of the randomness; image i depends on the seed and i alone.
      label: as for `generate`.
      prompt: likewise.
      feather: width in pixels of a band around the hole that is made anew, too, and fades into the image.
      **options: as for `generate`.

    Returns:
      Images of the shape and dtype that came in.
    """
    single = np.ndim(images) == 3
    checked = self._pixels(np.asarray(images)[None] if single else images)
    shape = checked.shape[:3]
    if 0 in shape:
      raise UserError(f"images have shape {checked.shape}: give at least one of at least one pixel")
    pixel_mask = np.asarray(pixel_mask)
    if pixel_mask.ndim == 2 and pixel_mask.shape == shape[1:]:
      pixel_mask = np.broadcast_to(pixel_mask, shape)
    pixel_mask = _mask(pixel_mask, shape, "pixel_mask")
    if not isinstance(feather, int) or feather < 0:
      raise UserError(f"feather is {feather!r}: give a whole number of pixels")
    wanted, options = self._wanted(seed, len(checked), label, prompt), self._options(options)
    floats = np.asarray(to_float(jnp.asarray(checked)))
    result = _like(checked, self._fill(floats, pixel_mask, wanted, feather, options))
    return result[0] if single else result

  def outpaint(
    self,
    images: np.ndarray,
    top: int | float = 0,
    right: int | float = 0,
    bottom: int | float = 0,
    left: int | float = 0,
    seed: int = 0,
    **options: Any,
  ) -> np.ndarray:
    """Continues images beyond their sides.

    Args:
      images: [b, h, w, c], or one image [h, w, c].
      top: what is added there: an int in pixels, or a float as a share of h or w, as for the others.
      right: see `top`.
      bottom: see `top`.
      left: see `top`.
      seed: of the randomness.
      **options: as for `inpaint`, `label` and `feather` among them.

    Returns:
      Larger images, of the dtype that came in.
    """
    single = np.ndim(images) == 3
    checked = self._pixels(np.asarray(images)[None] if single else images)
    canvas, added = editing.extend(checked, (top, right, bottom, left))
    result = self.inpaint(canvas, added, seed, **options)
    return result[0] if single else result

  def _fill(
    self,
    images: np.ndarray,
    holes: np.ndarray,
    wanted: Mapping[str, Any],
    feather: int,
    options: dict[str, Any],
  ) -> np.ndarray:
    """Fills holes bool [b, h, w] of float32 images [b, h, w, c] of any size, each in a window of its own."""
    size = self.objective.image_shape[:2]
    factor = math.isqrt(math.prod(size) // self.num_tokens)
    grown = [editing.grow(hole, feather) for hole in holes]
    windows = [editing.choose_window(hole, size, factor) for hole in grown]
    cuts = [w.cut(image, hole, size) for w, image, hole in zip(windows, images, grown, strict=True)]
    image, mask = (np.stack(part) for part in zip(*cuts, strict=True))
    made = self._call("inpaint", {"image": image, "mask": mask, **wanted}, **options)
    parts = zip(windows, images, made, holes, strict=True)
    return np.stack([w.paste(image, new, editing.opacity(hole, feather)) for w, image, new, hole in parts])

  def _call(self, name: str, batch: Mapping[str, Any], **options: Any) -> Any:
    made = self._function(name)(self.variables, batch, jax.random.key(0), **options)
    return jax.tree.map(np.asarray, made)

  def _function(self, name: str) -> objectives.PredictFn:
    if name not in self._fns:
      raise UserError(
        f"a model of objective '{self.config['objective']['name']}' cannot {name}; it can "
        f"{', '.join(sorted(self._fns))}"
      )
    return self._fns[name]

  def _pixels(self, given: np.ndarray) -> np.ndarray:
    """Images of any size."""
    return images.check_images(given, channels=self.objective.image_shape[-1])

  def _images(self, given: np.ndarray) -> np.ndarray:
    shape, checked = self.objective.image_shape, self._pixels(given)
    if checked.shape[1:] != shape:
      raise UserError(
        f"images are {checked.shape[1]}x{checked.shape[2]} pixels: this model takes "
        f"{shape[0]}x{shape[1]}, resize them"
      )
    return checked

  def _tokens(self, tokens: np.ndarray) -> np.ndarray:
    tokens = np.asarray(tokens)
    count, codes = self.num_tokens, self.objective.codebook_size
    if tokens.ndim != 2 or tokens.shape[1] != count or not np.issubdtype(tokens.dtype, np.integer):
      raise UserError(f"tokens are {tokens.dtype}{list(tokens.shape)}: give integers of shape [b, {count}]")
    if tokens.size and (tokens.min() < 0 or tokens.max() >= codes):
      raise UserError(
        f"tokens range over {tokens.min()}..{tokens.max()}: this model's codes are 0..{codes - 1}"
      )
    return tokens.astype(np.int32)

  @functools.cached_property
  def num_tokens(self) -> int:
    """The number of codes of an image."""
    images = jax.ShapeDtypeStruct((1, *self.objective.image_shape), jnp.uint8)
    tokens = jax.eval_shape(self._function("encode"), self.variables, {"image": images}, None)
    return tokens.shape[1]

  @property
  def _lexicon(self) -> vilex.Objective:
    if not isinstance(self.objective, vilex.Objective):
      raise UserError(
        f"a model of objective '{self.config['objective']['name']}' knows no tokens of images: leave images, "
        "num_tokens, negative_prompt and options out, or give a model trained by the vilex objective"
      )
    return self.objective

  def _vectors(self, image: np.ndarray) -> np.ndarray:
    """The tokens [b, k, d] of an image of a prompt, see `generate`; b is 1 for an image without that axis."""
    given, objective = np.asarray(image), self._lexicon
    is_tokens = given.ndim > 1 and given.shape[-1] == sum(objective.renderer.model.text_widths)
    if is_tokens and given.ndim < 4:
      lexicon.check_number(objective, given.shape[-2])
      return given.reshape(-1, *given.shape[-2:])
    return self.encode(given if given.ndim == 4 else given[None])

  def _wanted(self, seed: int, batch: int | None, label: Any, prompt: Any = None) -> dict[str, Any]:
    """A batch of images to be made, see `generate`."""
    if batch is None:
      several = [given for given in (label, prompt) if given is not None and np.ndim(given)]
      batch = np.size(several[0]) if several else 16
    if batch < 1:
      raise UserError(f"batch is {batch}: give at least 1")
    return {"key": _keys(seed, batch), **self._label(label, batch), **self._caption(prompt, batch)}

  def _caption(self, prompt: Any, batch: int) -> dict[str, np.ndarray]:
    """The part of a batch that says what is to be seen."""
    if prompt is None:
      return {}
    captions = self.objective.captions
    if captions is None:
      raise UserError("prompt is given: this model was trained without captions, leave it out")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not all(isinstance(one, str) for one in prompts):
      raise UserError(f"prompt is {prompt!r}: give a text, or one per image")
    if len(prompts) not in (1, batch):
      raise UserError(
        f"prompt has {len(prompts)} entries for {batch} images: give one per image, or a single one"
      )
    ids = captions.read(prompts)
    return {"caption": np.broadcast_to(ids, (batch, captions.length))}

  def _label(self, label: Any, batch: int) -> dict[str, np.ndarray]:
    """The part of a batch that says which classes are wanted."""
    if label is None:
      return {}
    classes, labels = self.objective.num_classes, np.asarray(label)
    if not classes:
      raise UserError("label is given: this model was trained without classes, leave it out")
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim > 1:
      raise UserError(f"label is {labels.dtype}{list(labels.shape)}: give an integer, or one per image")
    if labels.ndim and len(labels) != batch:
      raise UserError(
        f"label has {len(labels)} entries for {batch} images: give one per image, or a single one"
      )
    if labels.min() < 0 or labels.max() >= classes:
      raise UserError(f"label ranges over {labels.min()}..{labels.max()}: classes are 0..{classes - 1}")
    return {"label": np.broadcast_to(labels, (batch,)).astype(np.int32)}

  def _options(self, options: dict[str, Any]) -> dict[str, Any]:
    defaults = getattr(self.objective, "sampling", sampling.Sampling())
    known = [field.name for field in dataclasses.fields(defaults)]
    guided = self.objective.num_classes or self.objective.captions is not None
    for name in options:
      if name not in known:
        raise UserError(f"sampling has no option '{name}'{nearest(name, known)}")
      if name.startswith("guidance") and not guided:
        raise UserError(f"{name} is given: this model was trained without classes to guide to, leave it out")
    dataclasses.replace(defaults, **options)  # which checks them
    return options


def _keys(seed: int, batch: int) -> jax.Array:
  """One key per image, whatever the batch."""
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(batch))


def _mask(mask: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
  mask = np.asarray(mask)
  if mask.shape != shape:
    raise UserError(f"{name} has shape {mask.shape}: it must be {shape}, the size of what it masks")
  if mask.dtype != bool:
    raise UserError(f"{name} is {mask.dtype}: give booleans, True where masked")
  return mask


def _like(given: np.ndarray, made: np.ndarray) -> np.ndarray:
  return images.to_uint8(made) if given.dtype == np.uint8 else made
