"""Image encoders as other programs read them: folders of transformers and timm."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath

from maskgen import files
from maskgen.errors import UserError
from maskgen.importers import tensors, towers
from maskgen.models.transformer import QKV
from maskgen.models.vit import ViT


def write(
  path: epath.PathLike,
  model: ViT,
  named: Mapping[str, Any],
  kind: tuple[str, str, str],
  more: Mapping[str, Any] | None = None,
) -> tensors.Tensors:
  """Writes a tower as a folder that `from_pretrained` of transformers opens.

  Args:
    path: of a new folder.
    model: the network.
    named: its parameters by transformers' names.
    kind: the names of the model's class, its type and its image processor's class.
    more: further keys of config.json.

  Returns:
    The tensors, float32.
  """
  model = model.clone(hidden=model.hidden or 4 * model.width)
  height, width = model.image_size
  config = dict(
    architectures=[kind[0]],
    model_type=kind[1],
    image_size=height if height == width else [height, width],
    hidden_act={ours: name for name, ours in towers.ACTIVATIONS.items()}[model.activation],
    num_attention_heads=model.heads,
    num_channels=model.channels,
    layer_norm_eps=model.epsilon,
    **{key: getattr(model, field) for field, key in towers.SIZES.items()},
    **more or {},
  )
  processor = dict(
    image_processor_type=kind[2],
    do_resize=True,
    size=dict(height=height, width=width),
    resample=3,
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=model.mean,
    image_std=model.std,
  )
  return write_folder(path, named, {towers.PROCESSOR: processor, towers.CONFIG: config})


def write_folder(
  path: epath.PathLike, named: Mapping[str, Any], texts: Mapping[str, Mapping[str, Any]]
) -> tensors.Tensors:
  """Writes tensors, as float32, and JSON files to a new folder, and returns the tensors."""
  found = {name: np.ascontiguousarray(value, np.float32) for name, value in jax.device_get(named).items()}
  folder = epath.Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  files.replace(folder / towers.WEIGHTS, safetensors.numpy.save(found, {"format": "pt"}))
  for name, content in texts.items():
    files.replace(folder / name, json.dumps(content, indent=2))
  return found


def check_expressible(model: ViT, whose: str, fixed: Mapping[str, Any]) -> None:
  """Checks the fields of a network that other people's code computes.

  Args:
    model: the network.
    whose: the name of the code.
    fixed: the values that it has of some fields, besides positions that are not rotary and all biases.

  Raises:
    UserError: if the network has another.
  """
  fixed = {"rotary_base": 0.0, "qkv_bias": QKV, **fixed}
  odd = [name for name, value in fixed.items() if getattr(model, name) != value]
  odd += [] if model.activation in towers.ACTIVATIONS.values() else ["activation"]
  for name in odd:
    raise UserError(
      f"{whose} has no encoder with {name}={getattr(model, name)!r}: export with --format=maskgen instead"
    )
