"""Writes what transformers' SigLIP computes to files for tests/test_siglip.py.

It is a separate program, since TensorFlow and transformers cannot share a process. Usage: FOLDER, in which
`exported` holds an encoder that maskgen wrote.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

VISION = dict(
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=3,
  image_size=12,
  patch_size=4,
)
TEXT = dict(hidden_size=24, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)


def main():
  folder = pathlib.Path(sys.argv[1])
  torch.manual_seed(0)
  model = transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.3 * torch.randn_like(parameter))
  model.save_pretrained(folder / "whole")
  vision = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)).eval()
  vision.load_state_dict(
    {k: v for k, v in model.state_dict().items() if k in vision.state_dict()}
    or {k: model.state_dict()[f"vision_model.{k}"] for k in vision.state_dict()}
  )
  vision.save_pretrained(folder / "vision")
  images = torch.rand(2, 3, 12, 12)
  with torch.no_grad():
    patches = vision(pixel_values=2 * images - 1).last_hidden_state
  exported, info = transformers.SiglipVisionModel.from_pretrained(
    folder / "exported", output_loading_info=True
  )
  for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    assert not info[problem], info
  resized = torch.nn.functional.interpolate(images, exported.config.image_size)
  with torch.no_grad():
    own = exported.eval()(pixel_values=2 * resized - 1).last_hidden_state
  arrays = {"patches": patches.numpy(), "exported": own.numpy()}
  for name, pixels in (("images", images), ("resized", resized)):
    arrays[name] = np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())
  save_file(arrays, folder / "reference.safetensors")


if __name__ == "__main__":
  main()
