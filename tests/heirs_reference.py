"""The names of ImaGonEs/LEASE, whose networks are MAGE's with other tables of positions.

tests/golden/lease.npz and sorcen.npz hold random weights of its networks, and what its code computed from
them in float64, with the random numbers of masks and samples stored.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from maskgen import tree
from maskgen.importers import mage

FOLDER = pathlib.Path(__file__).parent / "golden"


def read(name: str) -> dict[str, np.ndarray]:
  with np.load(FOLDER / f"{name}.npz") as archive:
    return dict(archive)


def to_reference(params, depths: dict[str, int], layers: dict[str, str], rows: int = 0):
  """Renames parameters of `Mage` and of dense layers beside it.

  Args:
    params: the parameters.
    depths: the numbers of blocks, by our names of the transformers.
    layers: their names of further layers.
    rows: of their table of decoder positions; 0 for as many as ours.
  """
  flat = tree.flatten(params)
  decoder_position = flat.pop("decoder_position")
  missing = max(rows - len(decoder_position), 0)
  tables = {
    "token_emb.word_embeddings.weight": flat.pop("embedding"),
    "token_emb.position_embeddings.weight": flat.pop("position"),
    "decoder_pos_embed_learned": jnp.pad(decoder_position, ((0, missing), (0, 0)))[None],
    "mlm_layer.bias": flat.pop("head_bias")[None, None],
  }
  names = {"encoder": "blocks", "decoder": "decoder_blocks"}
  blocks = {f"{ours}/block_{i}": f"{names[ours]}.{i}" for ours, depth in depths.items() for i in range(depth)}
  return tables | mage.rename_blocks(flat, mage.LAYERS | layers, blocks)


def from_reference(golden, shapes, rename):
  """Our parameters of the weights of a golden file."""
  theirs = jax.eval_shape(rename, shapes)
  weights = {name: golden[f"weights/{name}"] for name in theirs}
  return jax.jit(jax.linear_transpose(rename, shapes))(weights)[0]


def assert_gradients(golden, found) -> set[str]:
  """Compares gradients by their names; returns the names of those of the file that are not among them."""
  numbers = zip(*(golden[f"grad_{kind}"] for kind in ("names", "norm", "dotcos")), strict=True)
  left = set()
  for name, norm, dotcos in numbers:
    if name not in found:
      left.add(str(name))
      continue
    value = np.asarray(found[str(name)], np.float64).ravel()
    assert abs(np.linalg.norm(value) - norm) <= 1e-5 * norm + 1e-8, name
    assert abs(value @ np.cos(0.37 * np.arange(value.size) + 0.1) - dotcos) <= 1e-5 * norm + 1e-8, name
  return left
