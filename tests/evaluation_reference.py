"""What torch-fidelity and prdc compute, for tests/test_parity_evaluation.py.

A separate program, which writes its arrays to the npz file OUT: python evaluation_reference.py OUT. What it
once wrote lies in tests/golden/evaluation.npz, for machines without these packages. The inputs depend only on
seeds, and the test makes the same.
"""

import contextlib
import importlib.util
import io
import pathlib
import sys

import numpy as np

# Names of sets of features: rows of two sets, dimensions.
FEATURES = {"many": (400, 300, 24), "singular": (40, 50, 64)}


def features(name: str) -> tuple[np.ndarray, np.ndarray]:
  """A generated and a real set, float32, correlated, of different mean and spread."""
  *rows, width = FEATURES[name]
  rng = np.random.default_rng(7)
  mix = rng.normal(size=(width, width)) / np.sqrt(width)
  generated, real = (np.maximum(rng.normal(size=(n, width)) @ mix, 0) for n in rows)
  return (0.9 * generated + 0.1).astype(np.float32), real.astype(np.float32)


def logits() -> np.ndarray:
  """[203, 11], sorted by class."""
  rng = np.random.default_rng(8)
  classes = np.sort(rng.integers(11, size=203))
  return (rng.normal(size=(203, 11)) + 4 * np.eye(11)[classes]).astype(np.float32)


def import_torchvision() -> None:
  """Imports it even if its compiled ops, which nothing here uses, do not fit this build of torch."""
  import torch

  (folder,) = importlib.util.find_spec("torchvision").submodule_search_locations
  try:
    for library in pathlib.Path(folder).glob("_C*.so"):
      torch.ops.load_library(library)
  except OSError:
    for name in ("nms", "qnms"):
      torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float limit) -> Tensor")
  import torchvision  # noqa: F401


def set_metrics() -> dict[str, float]:
  import torch
  from prdc import compute_prdc
  from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

  found = {}
  for name in FEATURES:
    generated, real = features(name)
    tensors = torch.from_numpy(generated), torch.from_numpy(real)
    statistics = (metric_fid.fid_features_to_statistics(x) for x in tensors)
    found[f"{name}/fid"] = metric_fid.fid_statistics_to_metric(*statistics, False)[metric_fid.KEY_METRIC_FID]
    options = dict(kid_subsets=20, kid_subset_size=30, rng_seed=2020, verbose=False)
    kid = metric_kid.kid_features_to_metric(*tensors, **options)
    found |= {
      f"{name}/kid": kid[metric_kid.KEY_METRIC_KID_MEAN],
      f"{name}/kid_std": kid[metric_kid.KEY_METRIC_KID_STD],
    }
    prc = metric_prc.prc_features_to_metric(*tensors, verbose=False)
    found |= {f"{name}/{key}": prc[key] for key in ("precision", "recall")}
    with contextlib.redirect_stdout(io.StringIO()):
      prdc = compute_prdc(real, generated, nearest_k=5)
    found |= {f"{name}/prdc_{key}": value for key, value in prdc.items()}
  isc = metric_isc.isc_features_to_metric(torch.from_numpy(logits()))
  return found | {"isc": isc[metric_isc.KEY_METRIC_ISC_MEAN], "isc_std": isc[metric_isc.KEY_METRIC_ISC_STD]}


if __name__ == "__main__":
  import_torchvision()
  np.savez(sys.argv[1], **set_metrics())
