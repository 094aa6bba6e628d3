"""Compares pictures with real ones: python -m maskgen.tools.evaluate --generated=... --reference=..."""

import argparse
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath

from maskgen import cli, files
from maskgen.errors import UserError, nearest
from maskgen.tools import feature_flags

if TYPE_CHECKING:
  from maskgen.evaluators.comparison import Features, Network
  from maskgen.evaluators.picture_sets import PictureSet
  from maskgen.evaluators.statistics_files import Manifest

# Metrics of a tokenizer's codes.
CODES = ("codebook_usage", "perplexity")
# Flags that do not change a number.
OUTPUTS = ("json", "page")


class Reference(NamedTuple):
  """What pictures are compared with: pictures, statistics of pictures, or both, as in ADM's files.

  Attributes:
    name: in the names of metrics.
    pictures: the pictures, or None.
    statistics: their statistics, or None.
    manifest: how the statistics were made, or None.
  """

  name: str
  pictures: "PictureSet | None"
  statistics: "Features | None"
  manifest: "Manifest | None"

  @property
  def num_pictures(self) -> int | None:
    """The number of pictures behind a Frechet distance, if it is known; in ADM's files it is not."""
    if self.statistics is not None:
      return self.statistics.count
    return None if self.pictures is None else len(self.pictures)

  def has(self, need: str) -> bool:
    """Whether it has a key of `Features`."""
    return self.pictures is not None or getattr(self.statistics, need, None) is not None


def main(argv: Sequence[str]) -> None:
  """Parses the command line, prints the metrics and writes them."""
  from maskgen.evaluators import receipts

  args = parser().parse_args(argv)
  check_flags(args)
  inputs = open_inputs(args)
  numbers = compute(inputs)
  for name, value in numbers.items():
    print(f"{name} = {value:.7g}")
  if args.json is not None:
    receipt = {"metrics": numbers, **describe(inputs), **receipts.surroundings()}
    files.replace(epath.Path(args.json), json.dumps(receipt, indent=2))


def parser() -> cli.Parser:
  """The flags."""
  from maskgen.evaluators import classifier_scores, comparison, paired

  made = cli.Parser(
    "Compares pictures with real ones: FID and its family in the features of Inception-v3 as one of four "
    "published tools computes them, or the same distances in another network's features; what a classifier "
    "learns from them; and reconstructions with their originals. docs/evaluation.md describes all metrics: "
    f"{', '.join((*comparison.METRICS, *classifier_scores.METRICS, *paired.METRICS, *CODES))}.",
    "python -m maskgen.tools.evaluate --generated=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz",
  )
  path = files.absolute
  made.add_argument("--generated", type=path, help="folder of pictures, or npz file with arr_0")
  made.add_argument(
    "--model", type=path, help="a tokenizer: its reconstructions of --reference are evaluated"
  )
  made.add_argument(
    "--reference",
    type=path,
    required=True,
    help="as --generated, or npz file with statistics, of maskgen.tools.reference_stats or another tool",
  )
  made.add_argument("--metrics", help="names with commas between; default those of the protocol's own tool")
  made.add_argument(
    "--labels", default="unstated", help=f"of the generated pictures: {', '.join(comparison.LABELS)}"
  )
  made.add_argument("--reference_name", help="in the names of metrics; default that of the file or folder")
  made.add_argument("--lpips_trunk", type=path, help="for lpips: torchvision's weights of AlexNet or VGG16")
  made.add_argument("--lpips_heads", type=path, help="for lpips: the published alex.pth or vgg.pth")
  made.add_argument("--json", help="JSON file to write")
  made.add_argument("--page", help="PNG file to write: crops of reconstructions beside their originals")
  feature_flags.add(made)
  return made


class Inputs(NamedTuple):
  """What is compared.

  Attributes:
    args: the flags.
    reference: the real pictures.
    metrics: the plain names of metrics.
    model: that reconstructs the pictures of the reference, or None.
    generated: the pictures that are evaluated.
    manifest: how maskgen generated them, or None.
    network: for metrics of sets, or None.
  """

  args: argparse.Namespace
  reference: Reference
  metrics: tuple[str, ...]
  model: "Tokenizer | None"
  generated: "PictureSet"
  manifest: Mapping[str, Any] | None
  network: "Network | None"


def open_inputs(args: argparse.Namespace) -> Inputs:
  """Opens what the flags name; no pixels are read yet.

  Raises:
    UserError: if something is missing, or does not fit.
  """
  from maskgen.evaluators import comparison
  from maskgen.evaluators.picture_sets import check_labels, made_by, open_pictures

  reference = open_reference(args.reference, args.reference_name)
  metrics = choose(args, reference)
  model = None if args.model is None else open_model(args.model, reference)
  generated = open_pictures(args.generated) if model is None else model.reconstructions
  if reference.pictures is not None and reference.pictures.shape != generated.shape:
    raise UserError(
      f"pictures of {args.generated} have {generated.shape} (height, width) pixels, but those of "
      f"{args.reference} have {reference.pictures.shape}: resize them to one size"
    )
  manifest = None if args.generated is None else made_by(args.generated)
  check_labels(args.labels, generated, manifest)
  of_sets = any(name in comparison.METRICS for name in metrics)
  network = feature_flags.open_network(args) if of_sets else None
  return Inputs(args, reference, metrics, model, generated, manifest, network)


def compute(inputs: Inputs) -> dict[str, float]:
  """The metrics by their names in results; errors are those of `measure` and `measure_pairs`."""
  from maskgen.evaluators import classifier_scores, comparison, paired

  args, metrics, generated, reference = inputs.args, inputs.metrics, inputs.generated, inputs.reference
  numbers: dict[str, float] = {}
  if of_classifiers := {*metrics} & {*classifier_scores.METRICS}:
    assert reference.pictures is not None
    rows = feature_flags.shardings()[1]
    numbers |= classifier_scores.compare(of_classifiers, generated, reference.pictures, rows, args.batch_size)
  if of_pairs := [name for name in metrics if name in paired.METRICS]:
    numbers |= measure_pairs(of_pairs, generated, reference, args)
  if inputs.model is not None and set(CODES) & set(metrics):
    found = inputs.model.code_statistics(args.batch_size)
    numbers |= {name: found[name] for name in CODES if name in metrics}
  if inputs.network is not None:
    of_sets = [name for name in metrics if name in comparison.METRICS]
    found = measure(of_sets, inputs.network, generated, reference, args.batch_size)
    for metric, value in found.items():
      name = comparison.metric_name(metric, inputs.network, len(generated), reference.name, args.labels)
      numbers[name] = value
  return numbers


def check_flags(args: argparse.Namespace) -> None:
  """Checks the flags that need no file.

  Raises:
    UserError: if one is wrong.
  """
  from maskgen.evaluators import classifier_scores, comparison, paired

  feature_flags.check(args)
  if args.json is not None:
    cli.check_out(args.json, "json", ".json")
  if args.page is not None:
    cli.check_out(args.page, "page")
  if (args.generated is None) == (args.model is None):
    raise UserError("give either --generated or --model")
  if args.labels not in comparison.LABELS:
    raise UserError(f"--labels={args.labels} does not exist{nearest(args.labels, comparison.LABELS)}")
  names = () if args.metrics is None else args.metrics.split(",")
  others = (*classifier_scores.METRICS, *paired.METRICS, *CODES)
  comparison.check_metrics(names, args.protocol or "", others)
  if args.model is None and (of_codes := [name for name in names if name in CODES]):
    raise UserError(f"metric '{of_codes[0]}' is of a tokenizer: give --model instead of --generated")
  if any(("lpips" in names) != bool(path) for path in (args.lpips_trunk, args.lpips_heads)):
    raise UserError(
      "metric 'lpips' needs --lpips_trunk=FILE and --lpips_heads=FILE, and no other metric does"
    )
  if args.page is not None and not set(names) & set(paired.METRICS):
    raise UserError(f"--page={args.page} needs a metric of pairs: give --metrics with {paired.METRICS[0]}")


def open_reference(path: str, name: str | None) -> Reference:
  """Opens a reference; errors are those of `open_pictures` and `statistics_files.read`."""
  from maskgen.evaluators import picture_sets, statistics_files

  found = statistics_files.read(path) if path.endswith(".npz") and epath.Path(path).exists() else None
  pictures = None
  if found is None or picture_sets.has_pictures(path):
    pictures = picture_sets.open_pictures(path)
  statistics, manifest = found or (None, None)
  return Reference(name or pathlib.PurePath(path).stem, pictures, statistics, manifest)


def choose(args: argparse.Namespace, reference: Reference) -> tuple[str, ...]:
  """The metrics of `--metrics`, by default those that the reference allows.

  Raises:
    UserError: if the reference does not have what one needs.
  """
  from maskgen.evaluators import comparison

  if args.metrics is None:
    defaults = comparison.DEFAULTS[args.protocol or ""]
    return tuple(m for m in defaults if all(map(reference.has, comparison.reference_needs_of([m]))))
  metrics = tuple(args.metrics.split(","))
  of_sets = [metric for metric in metrics if metric in comparison.METRICS]
  for metric in metrics:
    needs = comparison.reference_needs_of([metric]) if metric in of_sets else {"pooled"}
    if metric not in CODES and not all(map(reference.has, needs)):
      raise UserError(
        f"metric '{metric}' needs the pictures of the reference, but {reference.name} has only statistics: "
        "give a folder, or an npz file with pictures"
      )
  return metrics


class Tokenizer(NamedTuple):
  """A model that reconstructs the pictures of the reference.

  Attributes:
    reconstructions: what it makes of them.
    code_statistics: (batch size) -> usage and perplexity of its codebook on them.
    weights: the fingerprint of its variables.
  """

  reconstructions: "PictureSet"
  code_statistics: Callable[[int], Mapping[str, float]]
  weights: str


def open_model(path: str, reference: Reference) -> Tokenizer:
  """Loads a tokenizer.

  Raises:
    UserError: if it is none, or takes no pictures of this size.
  """
  import maskgen
  from maskgen import tree
  from maskgen.evaluators import paired, reconstruction
  from maskgen.serving import Tokenizer as Base

  model = maskgen.load(path)
  if not isinstance(model, Base):
    raise UserError(f"--model={path} does not reconstruct pictures: give a tokenizer, or a model with one")
  originals = reference.pictures
  if originals is None:
    raise UserError(f"--model={path} needs pictures to reconstruct, but {reference.name} has only statistics")
  *side, channels = model.objective.image_shape
  if channels != 3:
    raise UserError(f"--model={path} takes images with {channels} channels: give one for colours")
  size = (side[0], side[1])
  made = paired.reconstructed(originals, model.reconstruct, size, path)

  def code_statistics(batch_size: int) -> Mapping[str, float]:
    counts = np.zeros(model.objective.codebook_size, np.int64)
    for batch in originals.read(batch_size):
      counts += np.bincount(model.encode(paired.tiles(batch, size)).ravel(), minlength=len(counts))
    return reconstruction.codebook_statistics(counts)

  return Tokenizer(made, code_statistics, tree.fingerprint(model.variables))


def measure_pairs(
  metrics: Sequence[str], made: "PictureSet", reference: Reference, args: argparse.Namespace
) -> dict[str, float]:
  """Means of metrics of pairs, and draws the page; errors are those of `paired.check` and importers."""
  from maskgen import images
  from maskgen.evaluators import paired
  from maskgen.importers import lpips

  originals = reference.pictures
  assert originals is not None
  perceptual = lpips.load(args.lpips_trunk, args.lpips_heads) if "lpips" in metrics else None
  paired.check(metrics, made, originals, perceptual)
  numbers = paired.collect(paired.build(metrics, perceptual), made, originals, args.batch_size)
  if args.page is not None:
    images.write_png(args.page, paired.page(made, originals, numbers))
  return {name: float(values.mean(dtype=np.float64)) for name, values in numbers.items()}


def measure(
  metrics: Sequence[str],
  network: "Network",
  generated: "PictureSet",
  reference: Reference,
  batch_size: int,
) -> dict[str, float]:
  """Computes metrics by their plain names.

  Raises:
    UserError: if there are too few pictures, or statistics were made otherwise.
  """
  from maskgen.evaluators import comparison, statistics_files

  width = network.width(generated.shape)
  real_needs = comparison.reference_needs_of(metrics)
  real, rest = None, real_needs
  if reference.statistics is not None:
    statistics_files.check(
      reference.name, reference.statistics, reference.manifest, network, generated.shape, width
    )
    real = reference.statistics
    rest = {need for need in real_needs if getattr(real, need) is None}
    if real.count is not None:
      given = [metric for metric in metrics if not comparison.reference_needs_of([metric]) & rest]
      comparison.check_counts(given, real.count, reference.name, network, width)
  comparison.check_counts(metrics, len(generated), generated.name, network, width)
  if rest and reference.pictures is not None:
    own = [metric for metric in metrics if comparison.reference_needs_of([metric]) & rest]
    comparison.check_counts(own, len(reference.pictures), reference.pictures.name, network, width)

  def features(pictures: "PictureSet", needs: set[str]) -> "Features":
    batches = feature_flags.stream(
      network, pictures.read(batch_size), len(pictures), batch_size, pictures.name
    )
    return comparison.collect(pictures.name, batches, needs)

  if rest and reference.pictures is not None:
    made = features(reference.pictures, rest)
    real = made if real is None else dataclasses.replace(real, **{need: getattr(made, need) for need in rest})
  return comparison.compute(
    metrics,
    network,
    features(generated, comparison.needs_of(metrics)),
    real or comparison.Features(reference.name),
  )


def describe(inputs: Inputs) -> dict[str, Any]:
  """The facts of the receipt, which is the JSON file; see `receipts`."""
  from maskgen.evaluators import statistics_files

  args, generated, reference, network = inputs.args, inputs.generated, inputs.reference, inputs.network
  described: dict[str, Any] = {}
  if network is not None:
    described = {"network": network.name, "protocol": network.protocol, "weights": network.weights}
  if args.lpips_trunk is not None:
    described["lpips"] = {
      name: hashlib.sha256(epath.Path(file).read_bytes()).hexdigest()
      for name, file in (("trunk", args.lpips_trunk), ("heads", args.lpips_heads))
    }
  described["labels"] = args.labels
  described["generated"] = {
    "path": args.generated or args.model,
    "count": len(generated),
    "size": generated.shape,
    **(generated.facts() if inputs.model is None else {"weights": inputs.model.weights}),
    "made_by": inputs.manifest,
  }
  pictures = reference.pictures
  described["reference"] = {
    "path": args.reference,
    "name": reference.name,
    "pictures": None if pictures is None else len(pictures),
    **({} if pictures is None else {"size": pictures.shape, **pictures.facts()}),
    "manifest": None if reference.manifest is None else dataclasses.asdict(reference.manifest),
  }
  if reference.statistics is not None and pictures is None:
    described["reference"]["sha256"] = statistics_files.hash_of(args.reference)
  if network is not None:
    width = network.width(generated.shape)
    described["samples_per_dimension"] = {
      "generated": len(generated) / width,
      "reference": reference.num_pictures / width if reference.num_pictures else None,
    }
  described["arguments"] = {name: value for name, value in vars(args).items() if name not in OUTPUTS}
  return described


if __name__ == "__main__":
  cli.run(main)
