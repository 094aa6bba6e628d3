"""Command-line flags for feature networks, and features of pictures on all devices."""

import argparse
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from maskgen import cli, files
from maskgen.errors import UserError

if TYPE_CHECKING:
  from jax.sharding import NamedSharding

  from maskgen.evaluators.comparison import Network

INCEPTION = "inception_v3"


def add(parser: cli.Parser) -> None:
  """Adds `--features`, `--protocol`, `--weights` and `--batch_size`."""
  parser.add_argument(
    "--features",
    type=_from_anywhere,
    default=INCEPTION,
    help=f"feature network: {INCEPTION}, or as in config.evals.generation.features: pixels, "
    "mobilenet_v2:FILE, dino:PATH, dinov2:PATH, dinov3:PATH, clip:PATH, siglip:PATH, "
    "siglip2:PATH, or model:PATH for a trained encoder",
  )
  parser.add_argument("--protocol", help="how pictures are prepared for Inception-v3; default adm")
  parser.add_argument(
    "--weights",
    type=files.absolute,
    help="file or folder of the weights; those of Inception-v3 are downloaded by default",
  )
  parser.add_argument("--batch_size", type=int, default=64, help="pictures per batch")


def _from_anywhere(features: str) -> str:
  """A feature space whose path does not depend on the current folder."""
  name, separator, path = features.partition(":")
  return f"{name}{separator}{path and files.absolute(path)}"


def check(args: argparse.Namespace) -> None:
  """Checks the flags before anything is loaded.

  Raises:
    UserError: if one is wrong.
  """
  from maskgen.evaluators import comparison

  if args.batch_size < 1:
    raise UserError(f"--batch_size={args.batch_size}: give at least 1")
  comparison.check_features(_spec(args), args.protocol or "")
  if args.features.partition(":")[0] == INCEPTION:
    args.protocol = args.protocol or comparison.DEFAULT_PROTOCOL


def open_network(args: argparse.Namespace) -> "Network":
  """Opens the network; errors are those of importers."""
  from maskgen.evaluators import comparison

  return comparison.open_network(_spec(args), args.protocol or "")


def _spec(args: argparse.Namespace) -> str:
  """The feature space, as in configs."""
  return f"{args.features}:{args.weights}" if args.weights else args.features


def stream(
  network: "Network", batches: Iterator[np.ndarray], count: int, batch_size: int, what: str
) -> Iterator[Mapping[str, Any]]:
  """Yields the features of batches of pictures, uint8 [b, h, w, 3].

  Args:
    network: the network.
    batches: at most `batch_size` pictures each.
    count: the number of pictures.
    batch_size: is rounded up to a multiple of the number of devices.
    what: names the pictures.
  """
  import jax

  from maskgen.evaluators.batches import gather

  sharding = shardings()[1]
  size = -(-batch_size // jax.local_device_count()) * jax.local_device_count()
  with tqdm(total=count, desc=what, unit="picture", disable=None) as progress:
    for batch in batches:
      padded = np.zeros((size, *batch.shape[1:]), np.uint8)
      padded[: len(batch)] = batch
      outputs = network.extract(jax.device_put(padded, sharding))
      yield {key: gather(value)[: len(batch)] for key, value in outputs.items()}
      progress.update(len(batch))


def shardings() -> tuple["NamedSharding", "NamedSharding"]:
  """A copy on each device of this process, and rows over them."""
  import jax

  from maskgen import sharding
  from maskgen.config import Mesh

  mesh = sharding.make_mesh(Mesh(), jax.local_devices())
  return sharding.replicated(mesh), sharding.batch_sharding(mesh)
