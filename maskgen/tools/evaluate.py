"""Compares pictures with real ones: python -m maskgen.tools.evaluate --generated=... --reference=..."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from etils import epath

from maskgen import cli, files
from maskgen.errors import UserError, nearest
from maskgen.tools import feature_flags

if TYPE_CHECKING:
  from maskgen.evaluators.comparison import Features, Network
  from maskgen.evaluators.picture_sets import PictureSet
  from maskgen.evaluators.statistics_files import Manifest


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

  def has(self, need: str) -> bool:
    """Whether it has a key of `Features`."""
    return self.pictures is not None or getattr(self.statistics, need, None) is not None


def main(argv: Sequence[str]) -> None:
  """Parses the command line, prints the metrics and writes them."""
  from maskgen.evaluators import comparison

  parser = cli.Parser(
    "Compares pictures with real ones: FID and its family in the features of Inception-v3 as one of four "
    "published tools computes them, or the same distances in another network's features. docs/evaluation.md "
    f"describes them. Metrics: {', '.join(comparison.METRICS)}.",
    "python -m maskgen.tools.evaluate --generated=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz",
  )
  parser.add_argument("--generated", required=True, help="folder of pictures, or npz file with arr_0")
  parser.add_argument(
    "--reference",
    required=True,
    help="the same, or npz file with statistics, of maskgen.tools.reference_stats or another tool",
  )
  parser.add_argument("--metrics", help="names with commas between; default those of the protocol's own tool")
  parser.add_argument(
    "--labels", default="unstated", help=f"of the generated: {', '.join(comparison.LABELS)}"
  )
  parser.add_argument("--reference_name", help="in the names of metrics; default that of the file or folder")
  parser.add_argument("--json", help="JSON file to write")
  feature_flags.add(parser)
  args = parser.parse_args(argv)
  if args.json is not None:
    cli.check_out(args.json, "json", ".json")
  if args.labels not in comparison.LABELS:
    raise UserError(f"--labels={args.labels} does not exist{nearest(args.labels, comparison.LABELS)}")
  feature_flags.check(args)

  from maskgen.evaluators.picture_sets import open_pictures

  generated = open_pictures(args.generated)
  reference = open_reference(args.reference, args.reference_name)
  if reference.pictures is not None and reference.pictures.shape != generated.shape:
    raise UserError(
      f"pictures of {args.generated} have {generated.shape} (height, width) pixels, but those of "
      f"{args.reference} have {reference.pictures.shape}: resize them to one size"
    )
  network = feature_flags.open_network(args)
  metrics = choose(args.metrics, network, reference)
  found = measure(metrics, network, generated, reference, args.batch_size)
  count = len(generated)
  numbers = {
    comparison.metric_name(metric, network, count, reference.name, args.labels): value
    for metric, value in found.items()
  }
  for name, value in numbers.items():
    print(f"{name} = {value:.7g}")
  if args.json is not None:
    described = describe(network, generated, reference, args)
    files.replace(epath.Path(args.json), json.dumps({"metrics": numbers, **described}, indent=2))


def open_reference(path: str, name: str | None) -> Reference:
  """Opens a reference; errors are those of `open_pictures` and `statistics_files.read`."""
  from maskgen.evaluators import picture_sets, statistics_files

  found = statistics_files.read(path) if path.endswith(".npz") and epath.Path(path).exists() else None
  pictures = None
  if found is None or picture_sets.has_pictures(path):
    pictures = picture_sets.open_pictures(path)
  statistics, manifest = found or (None, None)
  return Reference(name or pathlib.PurePath(path).stem, pictures, statistics, manifest)


def choose(names: str | None, network: "Network", reference: Reference) -> tuple[str, ...]:
  """The metrics of `--metrics`, by default those that the reference allows.

  Raises:
    UserError: if one does not exist, or the reference does not have what it needs.
  """
  from maskgen.evaluators import comparison

  if names is None:
    defaults = comparison.DEFAULTS[network.protocol]
    return tuple(m for m in defaults if all(map(reference.has, comparison.reference_needs_of([m]))))
  metrics = tuple(names.split(","))
  comparison.check_metrics(metrics, network)
  for metric in metrics:
    for need in comparison.reference_needs_of([metric]):
      if not reference.has(need):
        raise UserError(
          f"metric '{metric}' needs the pictures of the reference, but {reference.name} has only statistics: "
          "give a folder, or an npz file with pictures"
        )
  return metrics


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
  import jax
  import jax.numpy as jnp

  from maskgen.evaluators import comparison, statistics_files

  image = jax.ShapeDtypeStruct((1, *generated.shape, 3), jnp.uint8)
  width = jax.eval_shape(network.extract, image)["pooled"].shape[1]
  real_needs = comparison.reference_needs_of(metrics)
  real, rest = None, real_needs
  if reference.statistics is not None:
    statistics_files.check(
      reference.name, reference.statistics, reference.manifest, network, generated.shape, width
    )
    real = reference.statistics
    if real.count is not None:
      comparison.check_counts({"fid"} & set(metrics), real.count, reference.name, network, width)
    rest = {need for need in real_needs if getattr(real, need) is None}
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


def describe(network: "Network", generated: "PictureSet", reference: Reference, args: Any) -> dict[str, Any]:
  """How the numbers were made, for the JSON file."""
  from maskgen.evaluators import statistics_files

  return {
    "network": network.name,
    "protocol": network.protocol,
    "weights": network.weights,
    "generated": {"path": args.generated, "count": len(generated), "size": generated.shape},
    "reference": {
      "path": args.reference,
      "pictures": None if reference.pictures is None else len(reference.pictures),
      "manifest": None if reference.manifest is None else dataclasses.asdict(reference.manifest),
    },
    "labels": args.labels,
    "versions": statistics_files.versions(),
  }


if __name__ == "__main__":
  cli.run(main)
