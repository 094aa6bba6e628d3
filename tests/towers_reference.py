"""What transformers' image towers compute, for tests/test_towers.py.

A separate program, which writes its arrays to the npz file OUT: python towers_reference.py OUT. What it once
wrote lies in tests/golden/towers.npz, for machines without transformers. Weights and pictures depend only on
seeds, and the test makes the same.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file

SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, patch_size=4)
MLP = dict(intermediate_size=40)
# Each tower: the model's class, its config, and changes of the published preprocessor_config.json.
TOWERS = {
  "dino": (
    "ViTModel",
    SIZES | MLP | dict(image_size=12, layer_norm_eps=1e-12),
    dict(size={"height": 12, "width": 12}, resample=2),
  ),
  # Positions of a 5 x 5 grid are interpolated to 4 x 4.
  "dinov2": (
    "Dinov2Model",
    SIZES | dict(image_size=20, mlp_ratio=2),
    dict(size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16}),
  ),
  "dinov2_swiglu": (
    "Dinov2ForImageClassification",
    SIZES | dict(image_size=12, use_swiglu_ffn=True),
    dict(size={"height": 12, "width": 12}, do_center_crop=False, resample=2),
  ),
  "dinov2_registers": (
    "Dinov2WithRegistersModel",
    SIZES | dict(image_size=24, num_register_tokens=2),
    dict(size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16}),
  ),
  "clip": (
    "CLIPVisionModelWithProjection",
    SIZES | MLP | dict(image_size=12, projection_dim=10),
    dict(size=12, crop_size=12),
  ),
  "clip_whole": (
    "CLIPModel",
    dict(
      projection_dim=10,
      vision_config=SIZES | MLP | dict(image_size=12, hidden_act="gelu"),
      text_config=dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
      ),
    ),
    dict(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}),
  ),
  "siglip": ("SiglipVisionModel", SIZES | MLP | dict(image_size=12), dict(size={"height": 12, "width": 12})),
  # As that of SigLIP 2 of fixed size says itself.
  "siglip_2": (
    "SiglipModel",
    dict(
      vision_config=SIZES | MLP | dict(image_size=12),
      text_config=dict(
        hidden_size=24, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
      ),
    ),
    dict(size={"height": 12, "width": 12}, resample=2),
  ),
  # Positions of a 3 x 3 grid are interpolated to 5 x 4.
  "siglip2": (
    "Siglip2VisionModel",
    SIZES | MLP | dict(num_patches=9),
    dict(patch_size=4, max_num_patches=20),
  ),
  "dinov3": (
    "DINOv3ViTModel",
    SIZES | MLP | dict(image_size=16, num_register_tokens=2),
    dict(size={"height": 12, "width": 16}),
  ),
  # As of the largest model.
  "dinov3_gated": (
    "DINOv3ViTModel",
    SIZES | MLP | dict(use_gated_mlp=True, hidden_act="silu", query_bias=False, value_bias=False),
    dict(size={"height": 16, "width": 16}),
  ),
}
# A whole CLIP, of which the embeddings of texts are compared; its vocabulary is that of `MERGES`.
MERGES = [("c", "a"), ("ca", "t</w>")]
TEXTS = ["cat", "a cat, 2 cats!"]
CLIP_TEXT = dict(
  projection_dim=10,
  vision_config=SIZES | MLP | dict(image_size=12),
  text_config=dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=516,
    max_position_embeddings=32,
    eos_token_id=515,
  ),
)
PROCESSORS = {
  "dino": "ViTImageProcessorPil",
  "dinov2": "BitImageProcessorPil",
  "clip": "CLIPImageProcessorPil",
  "siglip": "SiglipImageProcessorPil",
  "siglip2": "Siglip2ImageProcessorPil",
}
IMAGENET = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])


def pictures() -> np.ndarray:
  """uint8 [2, 30, 21, 3], smooth and with edges."""
  rng = np.random.default_rng(11)
  coarse = rng.integers(256, size=(2, 10, 7, 3), dtype=np.uint8)
  return coarse.repeat(3, axis=1).repeat(3, axis=2)


class FloatProcessor:
  """What DINOv3ViTImageProcessor does, which needs torchvision: it resizes floats."""

  def __init__(self, size: dict[str, int], image_mean: list[float], image_std: list[float]):
    self.size, self.mean, self.std = size, image_mean, image_std

  def to_dict(self):
    fixed = dict(do_center_crop=None, do_rescale=True, rescale_factor=1 / 255, resample=2)
    return dict(size=self.size, image_mean=self.mean, image_std=self.std, **fixed)

  def __call__(self, images, return_tensors):
    import torch

    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    size = self.size["height"], self.size["width"]
    pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(value)[None, :, None, None] for value in (self.mean, self.std))
    return {"pixel_values": (pixels - mean) / std}


def weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
  """Random weights by name, whose activations keep their size."""
  rng = np.random.default_rng(12)
  made = {}
  for name, shape in sorted(shapes.items()):
    scale = 0.3 if len(shape) < 2 or "embed" in name or "token" in name else np.prod(shape[1:]) ** -0.5
    offset = 1.0 if len(shape) == 1 and name.endswith(("weight", "lambda1")) else 0.0
    made[name] = np.asarray(offset + rng.normal(size=shape, scale=scale), np.float32)
  return made


def write(folder: pathlib.Path, config: str, processor: str, shapes: dict[str, list[int]]) -> None:
  """Writes a folder as transformers does."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(config)
  (folder / "preprocessor_config.json").write_text(processor)
  save_file(weights(shapes), folder / "model.safetensors", metadata={"format": "pt"})


def write_clip(folder: pathlib.Path, config: str, shapes: dict[str, list[int]]) -> None:
  """Writes a folder of a whole CLIP with its tokenizer, and without preprocessor_config.json."""
  write(folder, config, "{}", shapes)
  (folder / "preprocessor_config.json").unlink()
  (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in MERGES) + "\n")
  printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
  others = [byte for byte in range(256) if byte not in printable]
  letters = [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]
  pieces = [*letters, *(letter + "</w>" for letter in letters), *map("".join, MERGES)]
  vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
  (folder / "vocab.json").write_text(json.dumps(vocabulary))


def main():
  import torch
  import transformers

  found = {}
  with tempfile.TemporaryDirectory() as root:
    for name, (kind, options, processing) in TOWERS.items():
      folder, cls = pathlib.Path(root) / name, getattr(transformers, kind)
      cls(cls.config_class(**options)).save_pretrained(folder)
      shapes = {key: list(value.shape) for key, value in load_file(folder / "model.safetensors").items()}
      config = (folder / "config.json").read_text()
      family = name.split("_")[0]
      processing = (IMAGENET if family.startswith("dino") else {}) | processing
      kind_of_processor = (
        getattr(transformers, PROCESSORS[family]) if family in PROCESSORS else FloatProcessor
      )
      make = kind_of_processor(**processing)
      write(folder, config, json.dumps(make.to_dict()), shapes)
      model = cls.from_pretrained(folder).eval()
      inputs = make(images=list(pictures()), return_tensors="pt")
      with torch.no_grad():
        if kind in ("CLIPModel", "SiglipModel"):
          features = model.get_image_features(**inputs)
          features = getattr(features, "pooler_output", features)
        elif kind == "CLIPVisionModelWithProjection":
          features = model(**inputs).image_embeds
        elif kind == "ViTModel":
          features = model(**inputs).last_hidden_state[:, 0]
        elif kind == "Dinov2ForImageClassification":
          features = model.dinov2(**inputs).pooler_output
        else:
          features = model(**inputs).pooler_output
      stored = json.dumps([config, json.dumps(make.to_dict()), shapes])
      found |= {f"{name}/features": features.numpy(), f"{name}/stored": np.array(stored)}
      if name == "dinov3":
        model.set_attn_implementation("eager")
        with torch.no_grad():
          whole = model(**inputs, output_attentions=True)
        front = 1 + options["num_register_tokens"]
        found[f"{name}/patches"] = whole.last_hidden_state[:, front:].numpy()
        found[f"{name}/attention"] = whole.attentions[-1][:, :, 0, front:].mean(dim=1).numpy()
    folder, cls = pathlib.Path(root) / "text", transformers.CLIPModel
    cls(cls.config_class(**CLIP_TEXT)).save_pretrained(folder)
    shapes = {key: list(value.shape) for key, value in load_file(folder / "model.safetensors").items()}
    config = (folder / "config.json").read_text()
    write_clip(folder, config, shapes)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    inputs = tokenizer(TEXTS, padding="max_length", max_length=32, return_tensors="pt")
    with torch.no_grad():
      features = cls.from_pretrained(folder).eval().get_text_features(**inputs)
      features = getattr(features, "pooler_output", features)
    found |= {"text/features": features.numpy(), "text/stored": np.array(json.dumps([config, shapes]))}
  np.savez_compressed(sys.argv[1], **found)


if __name__ == "__main__":
  main()
