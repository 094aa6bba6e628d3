"""How much a Frechet distance moves for other reasons than the model, on a folder of pictures.

The pictures, all of one size, are divided at random into A, which takes the place of generated ones, and B,
the reference. Each line has the distance from A to B after one change, and that of B from itself before the
change. docs/distances.md shows lines for CIFAR-10.
"""

import io
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from maskgen import cli
from maskgen.evaluators import comparison, frechet, picture_sets
from maskgen.tools import feature_flags

QUALITIES = (95, 90, 75)
FILTERS = ("lanczos", "bicubic", "bilinear", "nearest")
COUNTS = (1000, 2000)

# A change, the distance from A to B, and that of B from itself before the change.
Line = tuple[str, float, float | None]


def jpeg(images: np.ndarray, quality: int) -> np.ndarray:
  """Pictures as they come back from JPEG files."""

  def through_file(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file))

  return np.stack([through_file(image) for image in images])


def halved(images: np.ndarray, name: str) -> np.ndarray:
  """Pictures at half their size, by a filter of Pillow."""
  size, method = (images.shape[2] // 2, images.shape[1] // 2), Image.Resampling[name.upper()]
  return np.stack([np.asarray(Image.fromarray(image).resize(size, method)) for image in images])


def by_share(labels: np.ndarray, shares: np.ndarray, count: int) -> np.ndarray:
  """Indices of about `count` pictures, of which class i has a share in proportion to `shares[i]`."""
  sizes = (count * shares / shares.sum()).astype(int)
  return np.concatenate([np.flatnonzero(labels == i)[:size] for i, size in enumerate(sizes)])


def compare(
  a: np.ndarray, b: np.ndarray, labels: np.ndarray, extract: Callable[[np.ndarray], np.ndarray]
) -> Iterator[Line]:
  """Yields the lines.

  Args:
    a: pictures uint8 [n, h, w, 3].
    b: other ones.
    labels: the classes of `a`, from 0.
    extract: from pictures to their features, float32 [n, d].
  """

  def fit(features: np.ndarray) -> frechet.Gaussian:
    return frechet.fit([features])

  features, reference = extract(a), fit(extract(b))
  generated = fit(features)
  yield f"none: {len(a):,} pictures each", frechet.distance(generated, reference), None
  for count in COUNTS:
    if count < len(a):
      yield f"{count:,} pictures of A", frechet.distance(fit(features[:count]), reference), None
  sizes = np.bincount(labels)
  if len(sizes) > 1:
    rising = np.arange(len(sizes)) + 1.0
    count = int(min(sizes / rising) * rising.sum())
    for name, shares in (("equal shares", np.ones(len(sizes))), (f"shares 1 to {len(sizes)}", rising)):
      chosen = fit(features[by_share(labels, shares, count)])
      yield f"{chosen.count:,} pictures of A, classes in {name}", frechet.distance(chosen, reference), None
  for quality in QUALITIES:
    after = fit(extract(jpeg(b, quality)))
    moved = frechet.distance(reference, after)
    yield f"B as JPEG of quality {quality}", frechet.distance(generated, after), moved
  generated, before = (fit(extract(halved(images, FILTERS[0]))) for images in (a, b))
  yield f"both halved by {FILTERS[0]}", frechet.distance(generated, before), None
  for name in FILTERS[1:]:
    after = fit(extract(halved(b, name)))
    moved = frechet.distance(before, after)
    yield f"A halved by {FILTERS[0]}, B by {name}", frechet.distance(generated, after), moved


def main(argv: Sequence[str]) -> None:
  """Parses the command line and prints the lines of a table."""
  parser = cli.Parser(
    "Measures how much JPEG, resizing, the number of pictures and class balance move a Frechet distance.",
    "python docs/distances.py --pictures=cifar10/ --features=mobilenet_v2 --weights=mobilenet_v2.npz",
  )
  parser.add_argument("--pictures", required=True, help="a folder of pictures, or one folder for each class")
  parser.add_argument("--count", type=int, default=8000, help="how many of them to use, at most")
  feature_flags.add(parser)
  args = parser.parse_args(argv)
  feature_flags.check(args)
  pictures = picture_sets.open_pictures(args.pictures)
  network = feature_flags.open_network(args)
  labels = np.unique([name.rpartition("/")[0] for name in pictures.names], return_inverse=True)[1]
  images = np.concatenate(list(pictures.read(args.batch_size)))
  a, b = np.array_split(np.random.default_rng(0).permutation(len(images))[: args.count], 2)

  def extract(images: np.ndarray) -> np.ndarray:
    batches = (images[i : i + args.batch_size] for i in range(0, len(images), args.batch_size))
    parts = feature_flags.stream(network, batches, len(images), args.batch_size, "pictures")
    features = comparison.collect("the pictures", parts, ["pooled"]).pooled
    assert features is not None
    return features

  print("| change | from A to B | from B before |\n|---|---|---|", flush=True)
  for name, found, moved in compare(images[a], images[b], labels[a], extract):
    print(f"| {name} | {found:.4g} | {'' if moved is None else format(moved, '.4g')} |", flush=True)


if __name__ == "__main__":
  cli.run(main)
