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
from maskgen.evaluators import classifiers, comparison, frechet, pictures
from maskgen.evaluators.batches import gather, key_shapes, make_keys, one_blas_thread, place, valid_rows
from maskgen.evaluators.comparison import Features, Network
from maskgen.evaluators.context import Batch, Call, Context, Report
from maskgen.evaluators.reconstruction import compare
from maskgen.models.inception import CLASSES, FEATURES
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
    `frechet_S`: the Frechet distance between reconstructions and sources; it falls with their number. With
      features="inception_v3" instead FID and the inception score as a published tool computes them, under
      names such as `fid30k/adm/eval/unstated_k16` and `is30k/adm/unstated_k16`.
    `class_agreement`: with a classifier, how often it predicts the class of the source. It is trained on the
      features of at most 4096 real training images; `class_agreement_real` is the same for the sources.
  `psnr` (dB), `ssim` and `l1` compare the reconstructions from the largest number of tokens with the sources.
  Picture `reconstructions`: the sources, and a row for each kind of reconstruction.

  One image costs steps * (2 K + 3) calls of the frozen network, for K numbers of tokens.

  Attributes:
    num_tokens: the numbers k; if empty, powers of two and all.
    features: see `comparison.open_network`.
    protocol: the tool whose rules Inception-v3 follows, one of `protocols.PROTOCOLS`; by default "adm".
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
  protocol: str = ""
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
    self._check_count(self.num_images)
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

  def memory(
    self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct], num_images: Mapping[str, int]
  ) -> int:
    if not self._network.protocol:
      return 0
    count = min(self.num_images, num_images["eval"])
    if count < self.num_images:
      self._check_count(count)
    return 4 * (FEATURES + CLASSES) * count * (len(self._numbers) + 3)

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
    features, logits, shown, known = (
      {name: np.concatenate([part[name] for part in kind])[: self.num_images] for name in kind[0]}
      for kind in zip(*parts, strict=True)
    )
    rows = {_title(way): images for way, images in shown.items()}
    return Report(self._compare(features, logits, known), {"reconstructions": pictures.named(rows)})

  def _measure(
    self, variables: Any, batch: Batch, rng: jax.Array, index: int, num_shown: int
  ) -> tuple[dict[str, np.ndarray], ...]:
    """By kind of image: features [b, d], Inception's logits, first pictures; and labels and comparisons."""
    keys = make_keys(batch, self.seed, index * len(batch["valid"]))
    made = {"source": batch["image"], **self._draw(variables, batch, rng, keys)}
    features, logits = {}, {}
    for way, images in made.items():
      outputs = self._network.extract(images)
      features[way] = valid_rows(batch, outputs["pooled"])
      if self._network.protocol and way != "source":
        logits[way] = valid_rows(batch, outputs["logits"])
    shown = {way: images_lib.to_uint8(valid_rows(batch, images)[:num_shown]) for way, images in made.items()}
    known = compare(batch["image"], made[f"k{self._numbers[-1]}"])
    if self.classifier is not None:
      known["label"] = batch["label"]
    return features, logits, shown, {name: valid_rows(batch, value) for name, value in known.items()}

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

  def _compare(
    self, features: dict[str, np.ndarray], logits: dict[str, np.ndarray], known: dict[str, np.ndarray]
  ) -> dict[str, float]:
    numbers = {name: float(known[name].mean(dtype="float64")) for name in ("psnr", "ssim", "l1")}
    source, own = features["source"], np.arange(len(features["source"]))
    self._check_count(len(source))
    mean, real = source.mean(axis=0), Features("the sources", frechet.fit([source]))
    for way, values in features.items():
      if self.classifier is not None:
        end = "real" if way == "source" else way
        numbers[f"class_agreement_{end}"] = float(self._classifier.score(values, known["label"]))
      if way != "source":
        cosines = _directions(values - mean) @ _directions(source - mean).T
        numbers[f"feature_cosine_{way}"] = float(cosines[own, own].mean(dtype="float64"))
        numbers[f"retrieval_top1_{way}"] = float(np.mean(cosines.argmax(axis=1) == own))
        made = Features(way, frechet.fit([values]), logits=logits.get(way))
        metrics = ("fid", "is") if self._network.protocol else ("fid",)
        for metric, value in comparison.compute(metrics, self._network, made, real).items():
          name = comparison.metric_name(metric, self._network, len(source), "eval", "unstated")
          numbers[f"{name}_{way}"] = value
    return numbers

  def _check_count(self, count: int) -> None:
    """Checks the number of images; other networks than Inception-v3 take any."""
    if self._network.protocol:
      comparison.check_counts(("fid", "is"), count, "the evaluated images", self._network, FEATURES)

  @property
  def _numbers(self) -> tuple[int, ...]:
    return check_tokens(self.context, self.num_tokens)

  # The properties below do not depend on the variables: computed at the first evaluation, then kept.

  @functools.cached_property
  def _network(self) -> Network:
    return comparison.open_network(self.features, self.protocol, self.context)

  @functools.cached_property
  def _classifier(self) -> Any:
    assert self.classifier is not None

    def features(images: jax.Array) -> Any:
      return self._network.extract(images)["pooled"]

    return classifiers.train(self.classifier, self.context, features, _TRAINING)


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
