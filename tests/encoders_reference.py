"""Writes what timm and transformers compute from exported encoders to a file for tests/test_encoders_out.py.

It is a separate program, since TensorFlow and transformers cannot share a process. Usage: FOLDER LIBRARY,
where FOLDER/LIBRARY holds a folder for each encoder, and FOLDER/inputs.npz an input for each.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from safetensors.torch import load_file


def pixels(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
  """Images [b, h, w, c] in [0, 1], standardised: [b, c, h, w]."""
  return torch.from_numpy((images - np.float32(mean)) / np.float32(std)).permute(0, 3, 1, 2)


def of_timm(path: pathlib.Path, given: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
  import timm

  if given.ndim == 2:
    model = timm.create_model(f"local-dir:{path}")
    tensors = load_file(path / "model.safetensors")
    model.patch_embed = torch.nn.Embedding(*tensors["patch_embed.weight"].shape)
    model.load_state_dict(tensors)
    x = torch.from_numpy(given)
  else:
    model = timm.create_model(f"local-dir:{path}", pretrained=True)
    x = pixels(given, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == x.shape[1:] and config["crop_pct"] == 1.0
  model = model.eval()
  return model.forward_features(x)[:, model.num_prefix_tokens :], model(x)


def of_transformers(path: pathlib.Path, given: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
  import transformers

  config = json.loads((path / "config.json").read_text())
  has_class = config["model_type"] == "vit"
  options = dict(add_pooling_layer=False) if has_class else {}
  model, info = getattr(transformers, config["architectures"][0]).from_pretrained(
    path, output_loading_info=True, **options
  )
  assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
  processor = json.loads((path / "preprocessor_config.json").read_text())
  x = pixels(given, processor["image_mean"], processor["image_std"])
  found = model.eval()(pixel_values=x)
  tokens = found.last_hidden_state
  if not has_class:
    return tokens, found.pooler_output if config["vision_use_head"] else tokens.mean(dim=1)
  mae = transformers.ViTMAEModel.from_pretrained(path, mask_ratio=0.0).eval()
  order = torch.arange(tokens.shape[1] - 1, dtype=torch.float32).expand(len(x), -1)
  assert torch.allclose(mae(x, noise=order).last_hidden_state, tokens, atol=1e-5)
  return tokens[:, 1:], tokens[:, 0]


def main():
  folder, library = pathlib.Path(sys.argv[1]), sys.argv[2]
  compute, found = dict(timm=of_timm, transformers=of_transformers)[library], {}
  with np.load(folder / "inputs.npz") as inputs, torch.no_grad():
    for path in sorted((folder / library).iterdir()):
      tokens, pooled = compute(path, inputs[path.name])
      found |= {f"{path.name}/tokens": tokens.numpy(), f"{path.name}/pooled": pooled.numpy()}
  np.savez(folder / f"{library}.npz", **found)


if __name__ == "__main__":
  main()
