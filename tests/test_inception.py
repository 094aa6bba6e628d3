"""Weights of Inception-v3: what is refused, and where a fetched file is kept."""

import hashlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from maskgen.errors import UserError
from maskgen.importers import inception


def test_another_network_is_refused(tmp_path):
  expected = jax.eval_shape(inception.to_pytorch, inception.shapes())
  assert len(expected) == 472
  assert sum(leaf.size for leaf in expected.values()) == 23_885_392
  arrays = dict.fromkeys(expected, np.zeros(1, np.float32))
  path = tmp_path / "weights.safetensors"
  save_file(arrays | {"AuxLogits.conv0.conv.weight": np.zeros(1, np.float32)}, path)
  with pytest.raises(UserError, match=r"AuxLogits.conv0.* another Inception: give pt_inception"):
    inception.load(path)
  save_file({name: value for name, value in arrays.items() if name != "fc.bias"}, path)
  with pytest.raises(UserError, match=r"no tensor 'fc\.bias'"):
    inception.load(path)
  save_file(arrays, path)
  with pytest.raises(UserError, match=r"shape \(1,\)"):
    inception.load(path)


def test_a_file_is_fetched_once_and_checked(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  published = tmp_path / "weights.pth"
  address, digest = published.as_uri(), hashlib.sha256(b"weights").hexdigest()
  with pytest.raises(UserError, match=f"cannot be downloaded .* put it into {tmp_path}/cache"):
    inception.fetch(address, digest)
  published.write_bytes(b"weights")
  with pytest.raises(UserError, match="checksum"):
    inception.fetch(address, inception.SHA256)
  path = inception.fetch(address, digest)
  assert path == tmp_path / "cache" / "maskgen" / "weights.pth" and path.read_bytes() == b"weights"
  published.unlink()
  assert inception.fetch(address, digest) == path
  path.write_bytes(b"wEights")
  with pytest.raises(UserError, match=r"is damaged .*: remove it and fetch"):
    inception.fetch(address, digest)
