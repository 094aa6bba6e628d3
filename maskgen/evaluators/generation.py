"""The distance of generated images from real ones, and their coverage of the classes."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from etils import epath

from maskgen import images as images_lib
from maskgen.config import fields
from maskgen.errors import UserError
from maskgen.evaluators import classifiers, comparison, pictures, statistics_files
from maskgen.evaluators.batches import collect, first_batch, gather, generate, key_shapes, one_blas_thread
from maskgen.evaluators.comparison import Features, Network
from maskgen.evaluators.context import Batch, Call, Context, Report
from maskgen.evaluators.statistics_files import Statistics
from maskgen.models.inception import FEATURES


def class_balance(classes: np.ndarray, num_classes: int) -> dict[str, float]:
  """Describes the histogram of predicted classes, int [n].

  Returns:
    "class_share_min": the share of the rarest class, at most 1 / num_classes; "class_entropy" in nats, at
    most log(num_classes).
  """
  shares = np.bincount(classes, minlength=num_classes) / len(classes)
  seen = shares[shares > 0]
  return {
    "class_share_min": float(shares.min()),
    "class_entropy": float(-np.sum(seen * np.log(seen)) + 0.0),
  }


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Generates images and compares them with real images, by default those of the training split.

  Metrics in a feature space S:
    `frechet_S`: the Frechet distance of the generated images. It falls with the number of images, so compare
      equal numbers only. Other `metrics` are `kid_S`, `precision_S` and so on.
    `frechet_S_floor`: the distance of the evaluation split, for reference.
    `frechet_S_uniform_codes`: the distance of the same number of images decoded from uniformly drawn codes,
      if the objective has the prediction function `generate_uniform`.
    `frechet_S_reconstructions`: likewise, of as many images of the evaluation split, or all, decoded from
      their own codes, if it also has `reconstruct`. Samples of perfect codes would have about this distance.
      Both are measured at every evaluation, since an objective may train its decoder.
  With features="inception_v3" instead FID and its family as a published tool computes them, under names of
    `comparison.metric_name` such as `fid50k/adm/imagenet_256/balanced`, without these three.
  With a classifier: its accuracy on the evaluation split, `<classifier>_top1`, and `class_share_min` and
    `class_entropy` (nats) of its predictions for the generated images.
  If the objective takes labels, all classes are generated equally often, and with a classifier
    `<classifier>_agreement` is the share of images for which it predicts the label.
  Pictures: `generated`, the first samples; `generated_by_class`, a row for each class.

  Attributes:
    num_images: the number of images to generate.
    features: see `comparison.open_network`.
    protocol: the tool whose rules Inception-v3 follows, one of `protocols.PROTOCOLS`; by default "adm".
    metrics: names in `comparison.METRICS`; by default the distance alone.
    reference: npz file of `maskgen.tools.reference_stats` or another tool with statistics of the real images;
      by default they are those of the training split under the evaluation preprocessing.
    reference_name: in the names of metrics, by default that of the file, or "train".
    classifier: a name in `classifiers.CLASSIFIERS`, for small labelled data, or None.
    num_pictures: the number of samples in the picture.
    seed: image i depends only on this and i, at every training step.
    captions: whether images are generated from the captions of the evaluation split, in order.
    sampling: options of `generate`; see `Context.check_sampling`.
  """

  requires: ClassVar[tuple[str, ...]] = ("generate",)

  context: Context
  num_images: int = 1000
  features: str = "pixels"
  protocol: str = ""
  metrics: tuple[str, ...] = ("fid",)
  reference: str | None = None
  reference_name: str = ""
  classifier: str | None = None
  num_pictures: int = 64
  seed: int = 0
  captions: bool = False
  sampling: Mapping[str, Any] = fields.section(
    took=("steps", "schedule", "temperature", "guidance", "guidance_schedule"), default_factory=dict
  )

  def __post_init__(self):
    classifiers.check(self.classifier, self.context)
    self.context.check_sampling(self.sampling)
    if self.captions and self.context.captions is None:
      raise UserError("captions is True, but the objective takes no captions: leave it out")
    unconditional = not self.captions and not self.context.num_classes
    if unconditional and self.sampling.get("guidance", 1) != 1:
      raise UserError("guidance needs captions: set captions=True or leave guidance out")
    if self.num_images < 2 or self.num_pictures < 1:
      raise UserError(
        f"num_images is {self.num_images} and num_pictures is {self.num_pictures}: give at least 2 and 1"
      )
    self._check_comparison()

  def _check_comparison(self) -> None:
    """Checks before a run that the generated images can be compared with the real ones."""
    network, num_train = self._network, self.context.num_train
    width = FEATURES if network.protocol else 0  # of other networks it is compared when it is known
    if not self.metrics:
      raise UserError("metrics is empty: give at least one, such as 'fid'")
    comparison.check_metrics(self.metrics, network.protocol)
    comparison.check_counts(self.metrics, self.num_images, "num_images", network, width)
    if self._statistics is not None:
      self._statistics.check(self.metrics, network, self.context.objective.image_shape)
    elif num_train is not None:
      comparison.check_counts(self.metrics, num_train, "the training split", network, width)

  def trace(self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    inputs = {"key": key_shapes(batch)}
    if "generate_uniform" in self.context.predict and self._has_floor:
      call("generate_uniform", inputs)
      if "reconstruct" in self.context.predict:
        call("reconstruct", batch)
    wanted = ("label",) * bool(self.context.num_classes) + ("caption",) * self.captions
    call("generate", inputs | {name: batch[name] for name in wanted}, **self.sampling)

  def memory(
    self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct], num_images: Mapping[str, int]
  ) -> int:
    needed = 0
    if self._network.protocol and "pooled" in comparison.needs_of(self.metrics):
      needed += 4 * FEATURES * (self.num_images + (0 if self.reference else num_images["train"]))
    if self.classifier is not None:
      # Pixels in float64, in batches and put together.
      needed += 16 * math.prod(batch["image"].shape[1:]) * max(num_images.values())
    return needed

  @one_blas_thread
  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Evaluates; `rng` is a typed key."""
    report, predict = self.measure(variables, rng, **self.sampling), self.context.predict
    numbers = dict(report.numbers)
    if "generate_uniform" in predict and self._has_floor:
      draws = self._draws(predict["generate_uniform"], variables, rng)
      uniform = self._features("the images of uniform codes", ("fid",), draws)
      numbers[f"{self._name('fid')}_uniform_codes"] = self._distance(uniform)
      if "reconstruct" in predict:
        decoded = self._features("the reconstructions", ("fid",), self._reconstructions(variables, rng))
        numbers[f"{self._name('fid')}_reconstructions"] = self._distance(decoded)
    if self.classifier is not None:
      numbers[f"{self.classifier}_top1"] = self._real_classes[1]
    return Report(numbers, report.pictures)

  @one_blas_thread
  def measure(self, variables: Any, rng: jax.Array, **options: Any) -> Report:
    """The part of `run` that depends on sampling, with these options of `generate`."""
    num_classes = self.context.num_classes
    shown: list[np.ndarray] = []
    classes: list[np.ndarray] = []

    def generated() -> Iterator[tuple[jax.Array, np.ndarray]]:
      conditions = {"num_classes": num_classes, "captions": self._eval_captions}
      for images, used in self._draws(
        self.context.predict["generate"], variables, rng, **conditions, **options
      ):
        num_shown = sum(map(len, shown))
        if num_shown < self.num_pictures:
          shown.append(gather(images)[used][: self.num_pictures - num_shown])
        if self.classifier is not None:
          classes.append(self._real_classes[0].predict(_flat(gather(images)[used])))
        yield images, used

    made = self._features("the generated images", self.metrics, generated())
    found = comparison.compute(self.metrics, self._network, made, self._real)
    numbers = {self._name(metric): value for metric, value in found.items()}
    if self._has_floor:
      numbers[f"{self._name('fid')}_floor"] = self._floor
    if self.classifier is not None:
      seen = np.concatenate(classes)
      numbers |= class_balance(seen, len(self.context.class_names or ()))
      if num_classes:
        asked = np.arange(len(seen)) % num_classes
        numbers[f"{self.classifier}_agreement"] = float(np.mean(seen == asked))
    drawn = {"generated": images_lib.grid(np.concatenate(shown))}
    if num_classes:
      drawn["generated_by_class"] = pictures.generated(
        self.context, variables, rng, self.num_pictures, self.seed, **options
      )
    return Report(numbers, drawn)

  def facts(self) -> dict[str, Any]:
    reference, moments = self._statistics, self._real.pooled_moments
    return {
      "labels": self._labels,
      "reference": "the training split" if reference is None else reference.facts(),
      "samples_per_dimension": None if moments is None else self.num_images / len(moments.mean),
    }

  def _draws(self, fn, variables, rng, **options) -> Iterator[tuple[jax.Array, np.ndarray]]:
    """Yields images [b, h, w, c] that `fn` makes, and which of them count, bool [b]."""
    made = generate(
      fn, variables, rng, like=self._like, seed=self.seed, num_images=self.num_images, **options
    )
    for images, count in made:
      yield images, np.arange(len(images)) < count

  def _reconstructions(self, variables: Any, rng: jax.Array) -> Iterator[tuple[jax.Array, np.ndarray]]:
    """Yields reconstructions of the evaluation split as `_draws` yields images."""
    left = self.num_images
    for batch in self.context.batches("eval"):
      valid = gather(batch["valid"])
      used = valid & (np.cumsum(valid) <= left)
      yield self.context.predict["reconstruct"](variables, batch, rng), used
      left -= int(used.sum())
      if not left:
        return

  def _features(
    self, name: str, metrics: Sequence[str], batches: Iterable[tuple[jax.Array, np.ndarray]]
  ) -> Features:
    """What metrics need of a set of images that arrives as `_draws` yields it."""
    needs = comparison.needs_of(metrics)
    keys = {need.removesuffix("_moments") for need in needs}

    def features() -> Iterator[dict[str, np.ndarray]]:
      for images, used in batches:
        outputs = self._network.extract(images)
        yield {key: gather(outputs[key])[used] for key in keys}

    return comparison.collect(name, features(), needs)

  def _split(self, split: str, metrics: Sequence[str]) -> Features:
    batches = ((batch["image"], gather(batch["valid"])) for batch in self.context.batches(split))
    return self._features(f"the split '{split}'", metrics, batches)

  def _distance(self, features: Features) -> float:
    return comparison.compute(("fid",), self._network, features, self._real)["fid"]

  def _name(self, metric: str) -> str:
    reference = self.reference_name or (
      "train" if self.reference is None else epath.Path(self.reference).stem
    )
    return comparison.metric_name(metric, self._network, self.num_images, reference, self._labels)

  @property
  def distance(self) -> str:
    """The name of the metric by which samples are ranked: the distance, or else the first."""
    return self._name("fid" if "fid" in self.metrics else self.metrics[0])

  @property
  def _labels(self) -> str:
    if self.captions:
      return "captions"
    return "balanced" if self.context.num_classes else "unconditional"

  @property
  def _has_floor(self) -> bool:
    return not self._network.protocol and "fid" in self.metrics

  # The properties below do not depend on the variables: computed at the first evaluation, then kept.

  @functools.cached_property
  def _network(self) -> Network:
    return comparison.open_network(self.features, self.protocol, self.context)

  @functools.cached_property
  def _statistics(self) -> Statistics | None:
    return None if self.reference is None else statistics_files.open_statistics(self.reference)

  @functools.cached_property
  def _like(self) -> Batch:
    return {"valid": first_batch(self.context)["valid"]}  # without a reference to the images

  @functools.cached_property
  def _eval_captions(self) -> np.ndarray | None:
    """The captions for generation, int32 [m, length]."""
    if not self.captions:
      return None
    return collect(self.context, "eval", lambda batch: {"caption": batch["caption"]}, limit=self.num_images)[
      "caption"
    ]

  @functools.cached_property
  def _real(self) -> Features:
    network = self._network
    if self._statistics is not None:
      found = self._statistics.features
    else:
      compared = [metric for metric in self.metrics if metric != "is"]
      found = self._split("train", compared) if compared else Features("train")
    if not network.protocol and found.pooled_moments is not None:
      width = len(found.pooled_moments.mean)
      comparison.check_counts(self.metrics, self.num_images, "num_images", network, width)
    return found

  @functools.cached_property
  def _floor(self) -> float:
    return self._distance(self._split("eval", ("fid",)))

  @functools.cached_property
  def _real_classes(self) -> tuple[Any, float]:
    """The trained classifier and its accuracy on the evaluation split."""
    assert self.classifier is not None
    model = classifiers.train(self.classifier, self.context, lambda images: _flat(gather(images)))
    test = collect(self.context, "eval", lambda batch: {key: batch[key] for key in ("image", "label")})
    return model, float(model.score(_flat(test["image"]), test["label"]))


def _flat(images: np.ndarray) -> np.ndarray:
  return images_lib.to_uint8(images).reshape(len(images), -1) / 255.0
