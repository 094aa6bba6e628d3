"""How well images are reconstructed from their ViLex tokens, by number of tokens, and from their captions."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from maskgen import images as images_lib
from maskgen.config import fields
from maskgen.errors import UserError
from maskgen.evaluators import classifiers, frechet, pictures
from maskgen.evaluators.batches import gather, key_shapes, make_keys, one_blas_thread, place, valid_rows
from maskgen.evaluators.context import Batch, Call, Context, Report
from maskgen.evaluators.feature_spaces import Space, name_of, open_space
from maskgen.evaluators.reconstruction import compare
from maskgen.numerics.prompts import TailDrop
from maskgen.numerics.text import Captions

_TRAINING = 4096  # real images that the classifier is trained on


def check_tokens(context: Context, numbers: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the numbers of tokens to evaluate in ascending order, by default powers of two and all.

  Raises:
    UserError: for a number that the model does not have, or an objective other than ViLex.
  """
  most = getattr(context.objective, "tokens", 0)
  if not most:
    raise UserError("the objective does not turn images into words: remove this evaluation")
  for number in numbers:
    if not isinstance(number, int) or not 1 <= number <= most:
      raise UserError(f"num_tokens has {number!r}: this model has 1 to {most} per image")
  return tuple(sorted(set(numbers))) or tuple(int(k) for k in TailDrop("powers").choices(most))


def as_words(captions: Captions, ids: np.ndarray) -> dict[str, np.ndarray]:
  """The words of prompts in pieces, as the prediction function `generate` takes them.

  Args:
    captions: how they were tokenized.
    ids: int32 [b, p, length], including special ids.
  """
  number = (ids == captions.opened.end_id).argmax(axis=-1) - 1
  return {"words": ids[..., 1:-1], "num_words": number.astype(np.int32)}


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Reconstructs evaluation images from the first k of their tokens, from their captions, and from nothing.

  The noise of an image is always the same. Metrics end in _k1, _k2, ...; in _caption if the objective takes
  captions; and in _nothing, for the empty prompt. Features are those of a space S, centred by the mean of all
  sources:
    `feature_cosine`: the cosine between the features of a reconstruction and of its source.
    `retrieval_top1`: how often the source is the nearest of all sources by that cosine; 1 / num_images by
      chance.
    `frechet_S`: the Frechet distance between reconstructions and sources; it falls with their number.
    `class_agreement`: with a classifier, how often it predicts the class of the source. It is trained on the
      features of at most 4096 real training images; `class_agreement_real` is the same for the sources.
  `psnr` (dB), `ssim` and `l1` compare the reconstructions from the largest number of tokens with the sources.
  Picture `reconstructions`: the sources, and a row for each kind of reconstruction.

  One image costs steps * (2 K + 3) calls of the frozen network, for K numbers of tokens.

  Attributes:
    num_tokens: the numbers k; if empty, powers of two and all.
    features: see `feature_spaces.open_space`.
    classifier: a name in `classifiers.CLASSIFIERS`, for small labelled data, or None.
    num_images: the number of images to reconstruct, at most the whole split.
    num_pictures: the number of images in the picture.
    seed: image i depends on this, i and its source, at every training step.
    sampling: options of `generate` and `reconstruct`; see `Context.check_sampling`.
  """

  requires: ClassVar[tuple[str, ...]] = ("reconstruct", "generate")

  context: Context
  num_tokens: tuple[int, ...] = ()
  features: str = "pixels"
  classifier: str | None = None
  num_images: int = 256
  num_pictures: int = 16
  seed: int = 0
  sampling: Mapping[str, Any] = fields.section(
    took=("steps", "sampler", "image_guidance", "text_guidance"), default_factory=dict
  )

  def __post_init__(self):
    if self.num_images < 2 or self.num_pictures < 1:
      raise UserError(
        f"num_images is {self.num_images} and num_pictures is {self.num_pictures}: give at least 2 and 1"
      )
    check_tokens(self.context, self.num_tokens)
    _ = self._space  # this checks `features`
    classifiers.check(self.classifier, self.context)
    self.context.check_sampling(self.sampling)

  def trace(self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    inputs, captions = {"key": key_shapes(batch)}, self.context.captions
    call("generate", inputs, **self.sampling)
    if captions is not None:
      words = jax.eval_shape(lambda ids: as_words(captions, ids[:, None]), batch["caption"])
      call("generate", inputs | words, **self.sampling)
    number = jax.ShapeDtypeStruct((*batch["valid"].shape, 1), np.int32)
    call("reconstruct", inputs | {"image": batch["image"], "number": number}, **self.sampling)

  @one_blas_thread
  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Evaluates; `rng` is a typed key, folded with each batch's index."""
    parts: list[tuple[dict[str, np.ndarray], ...]] = []
    count = 0
    for index, batch in enumerate(self.context.batches("eval")):
      if count >= self.num_images:
        break
      key = jax.random.fold_in(rng, index)
      parts.append(self._measure(variables, batch, key, index, max(self.num_pictures - count, 0)))
      count += len(parts[-1][0]["source"])
    features, shown, known = (
      {name: np.concatenate([part[name] for part in kind])[: self.num_images] for name in kind[0]}
      for kind in zip(*parts, strict=True)
    )
    rows = {_title(way): images for way, images in shown.items()}
    return Report(self._compare(features, known), {"reconstructions": pictures.named(rows)})

  def _measure(
    self, variables: Any, batch: Batch, rng: jax.Array, index: int, num_shown: int
  ) -> tuple[dict[str, np.ndarray], ...]:
    """Features [b, d] and the first pictures, by kind of image; and labels and comparisons, [b] each."""
    keys = make_keys(batch, self.seed, index * len(batch["valid"]))
    made = {"source": batch["image"], **self._draw(variables, batch, rng, keys)}
    features = {way: valid_rows(batch, self._space(images)) for way, images in made.items()}
    shown = {way: images_lib.to_uint8(valid_rows(batch, images)[:num_shown]) for way, images in made.items()}
    known = compare(batch["image"], made[f"k{self._numbers[-1]}"])
    if self.classifier is not None:
      known["label"] = batch["label"]
    return features, shown, {name: valid_rows(batch, value) for name, value in known.items()}

  def _draw(self, variables: Any, batch: Batch, rng: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
    """Images [b, h, w, c] by kind of reconstruction."""
    predict, captions, options = self.context.predict, self.context.captions, self.sampling
    made = {"nothing": predict["generate"](variables, {"key": keys}, rng, **options)}
    if captions is not None:
      words = as_words(captions, gather(batch["caption"])[:, None])
      inputs = {"key": keys, **{name: place(batch, value) for name, value in words.items()}}
      made["caption"] = predict["generate"](variables, inputs, rng, **options)
    for k in self._numbers:
      number = place(batch, np.full((len(batch["valid"]), 1), k, np.int32))
      inputs = {"image": batch["image"], "key": keys, "number": number}
      made[f"k{k}"] = predict["reconstruct"](variables, inputs, rng, **options)
    return made

  def _compare(self, features: dict[str, np.ndarray], known: dict[str, np.ndarray]) -> dict[str, float]:
    numbers = {name: float(known[name].mean(dtype="float64")) for name in ("psnr", "ssim", "l1")}
    source, own = features["source"], np.arange(len(features["source"]))
    mean, real = source.mean(axis=0), frechet.fit([source])
    for way, values in features.items():
      if self.classifier is not None:
        end = "real" if way == "source" else way
        numbers[f"class_agreement_{end}"] = float(self._classifier.score(values, known["label"]))
      if way != "source":
        cosines = _directions(values - mean) @ _directions(source - mean).T
        numbers[f"feature_cosine_{way}"] = float(cosines[own, own].mean(dtype="float64"))
        numbers[f"retrieval_top1_{way}"] = float(np.mean(cosines.argmax(axis=1) == own))
        name = f"frechet_{name_of(self.features)}_{way}"
        numbers[name] = frechet.distance(frechet.fit([values]), real)
    return numbers

  @property
  def _numbers(self) -> tuple[int, ...]:
    return check_tokens(self.context, self.num_tokens)

  # The properties below do not depend on the variables: computed at the first evaluation, then kept.

  @functools.cached_property
  def _space(self) -> Space:
    return open_space(self.features, self.context)

  @functools.cached_property
  def _classifier(self) -> Any:
    assert self.classifier is not None
    return classifiers.train(self.classifier, self.context, self._space, _TRAINING)


def _directions(x: np.ndarray) -> np.ndarray:
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _title(way: str) -> str:
  named = {
    "source": "images",
    "nothing": "from nothing",
    "caption": "from captions only",
    "k1": "from 1 token",
  }
  return named.get(way, f"from {way[1:]} tokens")
