"""Runs a checkout of LTH14/mage for `maskgen.benchmarks.reference`, in a Python that need not have maskgen.

It needs PyTorch, einops, SciPy and PyYAML. For each line of its input, a number, it takes so many steps and
prints their mean time as JSON.
"""

import argparse
import contextlib
import functools
import json
import os
import sys
import time
import types

import numpy as np

# The encoder and decoder of each size; others are methods of the checkout.
_SMALL = dict(
  embed_dim=192, depth=6, num_heads=6, decoder_embed_dim=192, decoder_depth=4, decoder_num_heads=6
)
_SMALL_TOKENIZER = dict(z_channels=64, resolution=32, ch=32, ch_mult=[1, 2, 2], num_res_blocks=2)
_SIDES = {"small": (32, 8), "base": (256, 16), "large": (256, 16)}  # of images and of grids of codes


class _Section(dict):
  """A section of a YAML file with attributes."""

  __getattr__ = dict.__getitem__

  @classmethod
  def of(cls, value):
    return cls({key: cls.of(item) for key, item in value.items()}) if isinstance(value, dict) else value


def _stand_in(folder: str, size: str) -> None:
  """Puts few lines in the place of packages of which the checkout needs little, in versions of their own."""
  import yaml
  from torch import nn

  class Mlp(nn.Module):
    """The two-layer network that timm provides."""

    def __init__(self, in_features, hidden_features, act_layer=nn.GELU, drop=0.0):
      super().__init__()
      self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
      self.fc2, self.drop = nn.Linear(hidden_features, in_features), nn.Dropout(drop)

    def forward(self, x):
      return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))

  class PatchEmbed(nn.Module):
    """Likewise; only its number of patches is used."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim):
      super().__init__()
      self.num_patches = (img_size // patch_size) ** 2
      self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

  def load(path):
    with open(os.path.join(folder, path)) as file:
      config = _Section.of(yaml.safe_load(file))
    if size == "small":
      config.model.params.update(embed_dim=64)
      config.model.params.ddconfig.update(_SMALL_TOKENIZER)
    return config

  modules = {
    "pytorch_lightning": {"LightningModule": nn.Module},
    "omegaconf": {"OmegaConf": types.SimpleNamespace(load=load)},
    "timm": {},
    "timm.models": {},
    "timm.models.vision_transformer": {"Mlp": Mlp, "PatchEmbed": PatchEmbed, "DropPath": nn.Identity},
  }
  for name, contents in modules.items():
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)
  vars(np)["float"] = float  # NumPy dropped the name
  sys.path.insert(0, folder)


def _model(args):
  import models_mage
  from torch import nn

  low = 0.0 if args.task == "sample" else 0.5
  options = dict(
    vqgan_ckpt_path=None, mask_ratio_min=low, mask_ratio_max=1.0, mask_ratio_mu=0.55, mask_ratio_std=0.25
  )
  if args.size == "small":
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    return models_mage.MaskedGenerativeEncoderViT(
      img_size=32, patch_size=4, norm_layer=norm, **_SMALL, **options
    )
  return getattr(models_mage, f"mage_vit_{args.size}_patch16")(**options)


def _sampling(args, model):
  """A function that generates a batch by the checkout's own function, whose sizes are literals."""
  with open(os.path.join(args.reference, "gen_img_uncond.py")) as file:
    source = file.read().split("parser = ")[0].replace("import cv2", "").replace("from tqdm import tqdm", "")
  if args.size == "small":
    source = source.replace("in_the_beginning = 256", "in_the_beginning = 64")
    source = source.replace("(bsz, 16, 16, codebook_emb_dim)", "(bsz, 8, 8, 64)")
  import torch

  found: dict = {}
  exec(compile(source, "gen_img_uncond.py", "exec"), found)
  model.eval()

  def sample():
    with torch.no_grad():
      return found["gen_image"](model, args.batch_size, 0, args.sampling_steps, 4.5)

  return sample


def _training(args, model, device):
  """A function that takes a step on random images, or on random codes in place of the tokenizer's."""
  import torch

  side, grid = _SIDES[args.size]
  model.train()
  if args.task == "tokens":
    codes = torch.randint(0, 1024, (args.batch_size, grid * grid), device=device)
    latents = torch.zeros(args.batch_size)  # only their number is read
    model.vqgan.encode = lambda images: (latents, None, (None, None, codes.clone()))
  images = torch.rand(args.batch_size, 3, side, side, device=device)
  trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
  groups = [
    dict(params=[p for p in trained if p.ndim > 1], weight_decay=0.05),
    dict(params=[p for p in trained if p.ndim <= 1], weight_decay=0.0),
  ]
  optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))
  scaler = torch.amp.GradScaler(device, enabled=args.amp)
  forward = torch.compile(model) if args.compile else model

  def step():
    with torch.autocast(device, torch.float16) if args.amp else contextlib.nullcontext():
      loss = forward(images)[0]
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(trained, 3.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss

  return step


def main() -> None:
  """Builds the model and waits for numbers of steps."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--reference", required=True)
  parser.add_argument("--size", required=True, choices=_SIDES)
  parser.add_argument("--task", required=True, choices=("live", "tokens", "sample"))
  parser.add_argument("--batch_size", required=True, type=int)
  parser.add_argument("--sampling_steps", type=int, default=20)
  parser.add_argument("--fast", action="store_true", help="mixed precision and torch.compile on GPUs")
  args = parser.parse_args()

  import torch

  out, sys.stdout = sys.stdout, sys.stderr  # the checkout prints, too
  device = "cuda" if torch.cuda.is_available() else "cpu"
  args.amp = args.compile = args.fast and device == "cuda"
  if device == "cpu":
    torch.Tensor.cuda = lambda self, *args, **options: self
    torch.set_num_threads(os.cpu_count() or 1)
  _stand_in(args.reference, args.size)
  torch.manual_seed(0)
  model = _model(args).to(device)
  step = _sampling(args, model) if args.task == "sample" else _training(args, model, device)
  name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
  ready = dict(torch=torch.__version__, device=name, amp=args.amp, compiled=args.compile)
  print(json.dumps(ready), file=out, flush=True)
  for line in sys.stdin:
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(int(line)):
      value = step()
    float(value.detach().float().mean())  # waits for the device
    taken = dict(seconds=time.perf_counter() - began, cpu_seconds=time.process_time() - cpu)
    print(json.dumps({key: each / int(line) for key, each in taken.items()}), file=out, flush=True)


if __name__ == "__main__":
  main()
