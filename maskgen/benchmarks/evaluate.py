"""The speed of features and metrics of pictures, compared with torch-fidelity's."""

import functools
import importlib.metadata
import importlib.util
import logging
import math
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from maskgen import cli
from maskgen.benchmarks import common

METRICS = ("fid", "is", "kid")
_WIDTHS = {"pooled": 2048, "logits": 1008}
_PACKAGES = ("torch", "torch_fidelity")

# "pooled" float32 [n, 2048] and "logits" float32 [n, 1008].
Features = Mapping[str, np.ndarray]

log = logging.getLogger("maskgen")


class Tool(NamedTuple):
  """What is measured.

  Attributes:
    extract: from pictures uint8 [n, h, w, 3] to their features.
    compute: from generated and real features to `METRICS`.
  """

  extract: Callable[[np.ndarray], Features]
  compute: Callable[[Features, Features], Mapping[str, float]]


def main(argv: Sequence[str]) -> Iterator[dict[str, Any]]:
  """Parses the command line and measures.

  Raises:
    UserError: if a flag is wrong.
  """
  parser = cli.Parser(
    "Measures pictures per second through Inception-v3 with random weights, and seconds for FID, inception "
    "score and KID of random features, alternating with torch-fidelity where it is installed. 'ratio' is its "
    "time divided by maskgen's for --samples pictures compared with as many.",
    "python -m maskgen.tools.bench evaluate --pictures=64",
  )
  parser.add_argument("--pictures", type=int, default=64, help="pictures whose features are computed")
  parser.add_argument("--side", type=int, default=32, help="their height and width")
  parser.add_argument("--samples", type=int, default=5000, help="random features in each set for the metrics")
  parser.add_argument("--batch_size", type=int, default=32, help="pictures per batch")
  parser.add_argument("--rounds", type=int, default=3, help="number of rounds; medians count")
  args = parser.parse_args(argv)
  common.check_at_least(args, 1, "pictures", "side", "batch_size", "rounds")
  common.check_at_least(args, 1000, "samples")

  from maskgen.benchmarks import devices

  params = _random_weights()
  tools = {"maskgen": _maskgen(params, args.batch_size)}
  if absent := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
    log.warning(
      "%s is not installed, so only maskgen is measured: torch-fidelity comes with the extra 'parity'",
      " and ".join(absent),
    )
  else:
    tools["torch_fidelity"] = _torch_fidelity(params, args.batch_size)
  rng = np.random.default_rng(0)
  pictures = rng.integers(256, size=(args.pictures, args.side, args.side, 3), dtype=np.uint8)
  sets = [
    {name: np.abs(rng.normal(0, std, (args.samples, d))).astype(np.float32) for name, d in _WIDTHS.items()}
    for std in (1.1, 1.0)
  ]
  features = {name: tool.extract(pictures[: args.batch_size]) for name, tool in tools.items()}  # to warm up
  metrics: dict[str, Mapping[str, float]] = {}

  def extract(name: str) -> None:
    features[name] = tools[name].extract(pictures)

  def compute(name: str) -> None:
    metrics[name] = tools[name].compute(*sets)

  def measure(run: Callable[[str], None]) -> dict[str, np.ndarray]:
    return common.seconds_per_call({name: functools.partial(run, name) for name in tools}, args.rounds)

  times = {"features": measure(extract)}
  memory = devices.peak_memory()
  times["metrics"] = measure(compute)
  result: dict[str, Any] = {}
  for name in tools:
    result |= common.spread(f"{name}_pictures_per_second", args.pictures / times["features"][name])
    result |= common.spread(f"{name}_metrics_seconds", times["metrics"][name])
  if not absent:
    theirs, ours = (
      2 * args.samples / args.pictures * times["features"][name] + times["metrics"][name]
      for name in ("torch_fidelity", "maskgen")
    )
    result |= common.ratios(theirs, ours)
    for kind in times:
      found = common.ratios(times[kind]["torch_fidelity"], times[kind]["maskgen"])
      result |= {f"{kind}_{key}": value for key, value in found.items()}
    result |= {
      "features_difference": _difference(features["maskgen"], features["torch_fidelity"]),
      "metrics_difference": _difference(metrics["maskgen"], metrics["torch_fidelity"]),
    }
  versions = {name: None if absent else importlib.metadata.version(name) for name in _PACKAGES}
  yield result | devices.describe() | memory | versions | vars(args)


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
  """The largest difference, relative to the largest value of the same name."""
  return max(float(np.abs(ours[key] - theirs[key]).max() / np.abs(theirs[key]).max()) for key in theirs)


def _random_weights() -> Any:
  """Parameters of Inception-v3 that keep the size of activations."""
  import jax

  from maskgen.importers import inception

  rng = np.random.default_rng(0)

  def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    if leaf.ndim > 1:
      scale = math.sqrt(2 / math.prod(leaf.shape[:-1]))
      return rng.normal(size=leaf.shape, scale=scale).astype(np.float32)
    return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

  return jax.tree_util.tree_map_with_path(draw, inception.shapes())


def _batches(arrays: Any, size: int) -> Iterator[Any]:
  for start in range(0, len(arrays), size):
    yield arrays[start : start + size]


def _joined(parts: Sequence[Mapping[str, Any]]) -> Features:
  return {name: np.concatenate([part[name] for part in parts]) for name in _WIDTHS}


def _maskgen(params: Any, batch_size: int) -> Tool:
  import jax

  from maskgen.evaluators import comparison
  from maskgen.tools import feature_flags

  network = comparison.open_inception(jax.device_put(params), "torch-fidelity")

  def extract(pictures: np.ndarray) -> Features:
    batches = _batches(pictures, batch_size)
    return _joined(list(feature_flags.stream(network, batches, len(pictures), batch_size, "pictures")))

  def compute(generated: Features, real: Features) -> Mapping[str, float]:
    def collect(features: Features) -> comparison.Features:
      parts = zip(*(_batches(features[name], batch_size) for name in _WIDTHS), strict=True)
      named = (dict(zip(_WIDTHS, part, strict=True)) for part in parts)
      return comparison.collect("features", named, comparison.needs_of(METRICS))

    return comparison.compute(METRICS, network, collect(generated), collect(real))

  return Tool(extract, compute)


def _torch_fidelity(params: Any, batch_size: int) -> Tool:
  import torch
  from torch_fidelity import metric_fid, metric_isc, metric_kid
  from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

  from maskgen.importers import inception

  taps = {"pooled": "2048", "logits": "logits_unbiased"}
  weights = {name: torch.tensor(value) for name, value in inception.to_pytorch(params).items()}
  with tempfile.TemporaryDirectory() as folder:
    path = str(pathlib.Path(folder) / inception.FILE)
    torch.save(weights, path)
    network = FeatureExtractorInceptionV3("inception", list(taps.values()), path)

  def extract(pictures: np.ndarray) -> Features:
    parts = []
    for batch in _batches(pictures, batch_size):
      with torch.no_grad():
        found = network(torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous())
      parts.append({name: value.numpy() for name, value in zip(taps, found, strict=True)})
    return _joined(parts)

  def compute(generated: Features, real: Features) -> Mapping[str, float]:
    pooled = [torch.from_numpy(features["pooled"]) for features in (generated, real)]
    statistics = (metric_fid.fid_features_to_statistics(x) for x in pooled)
    logits = metric_isc.isc_features_to_metric(torch.from_numpy(generated["logits"]))
    kid = metric_kid.kid_features_to_metric(*pooled, verbose=False)
    return {
      "fid": metric_fid.fid_statistics_to_metric(*statistics, False)[metric_fid.KEY_METRIC_FID],
      "is": logits[metric_isc.KEY_METRIC_ISC_MEAN],
      "kid": kid[metric_kid.KEY_METRIC_KID_MEAN],
    }

  return Tool(extract, compute)
