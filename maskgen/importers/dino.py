"""DINO's vision transformers (Caron et al. 2021), from transformers."""

import functools
from typing import Any

from etils import epath

from maskgen.importers import dinov2, tensors, towers, vit
from maskgen.models.imagenet import MEAN, STD

# Head counts of the published models S and B by width.
HEADS = {384: 6, 768: 12}


def load(path: epath.PathLike) -> towers.Tower:
  """Loads the feature network, whose features are the outputs at the class position.

  Without preprocessor_config.json, pictures are prepared as for DINO's own evaluations. With it as for
  transformers' ViT, where a size of one number is a square, and nothing is cropped unless it says so.

  Args:
    path: of a folder, or a file of tensors.

  Raises:
    UserError: if the tensors are those of another network, see `towers.take` and `towers.settle`, or
      preprocessor_config.json asks for something that is not supported.
  """
  stored = towers.read(path, vit.PREFIXES)
  found, need = stored.tensors, functools.partial(tensors.need, path, stored.tensors)
  width, _, patch, _ = need("embeddings.patch_embeddings.projection.weight", 4).shape
  section: dict[str, Any] = dict(
    image_size=towers.side_of(stored.path, need("embeddings.position_embeddings", 3).shape[1] - 1, patch),
    patch=patch,
    width=width,
    depth=tensors.count(found, r"encoder\.layer\.(\d+)\."),
    hidden=need("encoder.layer.0.intermediate.dense.weight", 2).shape[0],
    pooling="class",
    activation="gelu",
    epsilon=1e-6,
    mean=MEAN,
    std=STD,
  )
  section = towers.settle(stored, section, None, HEADS)
  used, ignored = (
    ("embeddings.", "encoder.", "layernorm."),
    ("embeddings.mask_token", "pooler.", "classifier."),
  )
  model, params, _ = towers.take(stored, section, vit.to_transformers, used, ignored)
  if stored.processor:
    size = stored.processor.get("size", 224)
    square = {"height": size, "width": size} if isinstance(size, int) else size
    stored = stored._replace(processor={"do_center_crop": False, **stored.processor, "size": square})
  return towers.prepare(stored, model, params, dinov2.PREPARATION)
