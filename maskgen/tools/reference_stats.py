"""Writes statistics of real pictures: python -m maskgen.tools.reference_stats --source=... --out=FILE.npz"""

from collections.abc import Iterator, Sequence

import numpy as np

from maskgen import cli
from maskgen.errors import UserError, counted
from maskgen.tools import feature_flags


def main(argv: Sequence[str]) -> None:
  """Parses the command line and writes the statistics."""
  parser = cli.Parser(
    "Writes the mean and covariance of the features of a data set, for maskgen.tools.evaluate --reference. "
    "The file has a manifest with the network, the protocol, the records and the preprocessing.",
    "python -m maskgen.tools.reference_stats --source=folder:/data/imagenet --split=train "
    "--preprocess='decode|resize_small(256)|center_crop(256)' --out=imagenet_256.npz",
  )
  parser.add_argument("--source", required=True, help="data source, as in config.data.source")
  parser.add_argument("--split", default="train", help="split of the source")
  parser.add_argument("--preprocess", required=True, help="as in config.data.eval_preprocess")
  parser.add_argument("--out", required=True, help="npz file to write")
  feature_flags.add(parser)
  args = parser.parse_args(argv)
  cli.check_out(args.out, kind=".npz")
  feature_flags.check(args)

  from maskgen.data import token_encoder
  from maskgen.data.preprocess import parse_preprocess
  from maskgen.data.reader import open_reader
  from maskgen.data.skipped import Skipped
  from maskgen.data.sources import open_source
  from maskgen.evaluators import comparison, statistics_files

  source = open_source(args.source, args.split)
  reader = open_reader(
    source,
    parse_preprocess(args.preprocess),
    seed=0,
    skipped=Skipped(),
    use="statistics",
    split=args.split,
  )
  spec = reader.spec.get("image")
  if spec is None or len(spec.shape) != 3 or spec.shape[-1] != 3 or spec.dtype != np.uint8:
    raise UserError(f"--preprocess={args.preprocess} does not return images uint8 [h, w, 3]: change it")
  network, size = feature_flags.open_network(args), (spec.shape[0], spec.shape[1])
  width = network.width(size)
  comparison.check_counts(("fid",), source.size, source.name, network, width)

  def images() -> Iterator[np.ndarray]:
    seen = 0
    for batch in token_encoder.read(reader, range(source.size), 1, args.batch_size):
      rows = min(args.batch_size, source.size - seen)
      if not batch["valid"][:rows].all():
        damaged = seen + int(np.argmin(batch["valid"][:rows]))
        raise UserError(f"{source.describe(damaged)} is damaged: replace or remove it")
      yield batch["image"][:rows]
      seen += rows

  metrics = ("fid", "sfid") if network.protocol else ("fid",)
  batches = feature_flags.stream(network, images(), source.size, args.batch_size, source.name)
  features = comparison.collect(source.name, batches, comparison.needs_of(metrics))
  manifest = statistics_files.Manifest(
    network=network.name,
    protocol=network.protocol,
    weights=network.weights,
    count=source.size,
    size=size,
    source=args.source,
    split=args.split,
    preprocess=args.preprocess,
    fingerprint=source.fingerprint,
    jpeg_decoding=reader.jpeg_decoding,
    versions=statistics_files.versions(),
  )
  statistics_files.write(args.out, features, manifest)
  found = f"{counted(width, 'feature')} of {counted(source.size, 'picture')}"
  print(f"wrote the statistics of {found} to {args.out}")


if __name__ == "__main__":
  cli.run(main)
