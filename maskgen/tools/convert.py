"""Converts other people's weights: python -m maskgen.tools.convert --format=F --weights=FILE --out=DIR"""

import argparse
import importlib
from collections.abc import Sequence

from etils import epath

from maskgen import cli
from maskgen.errors import UserError

# Modules of maskgen.importers, and the options that their `convert` takes.
FORMATS: dict[str, tuple[str, ...]] = {
  "mage": ("encoder_heads", "decoder_heads"),
  "mage_finetuned": ("encoder_heads",),
  "lease": ("tokenizer", "encoder_heads", "decoder_heads"),
  "vqgan_pytorch": ("image_size",),
  "maskgit": ("tokenizer",),
  "maskgit_flax": ("image_size",),
  "mobilenet_v2": (),
  "torchvision": (),
  "siglip": ("encoder_heads",),
  "siglip2": ("encoder_heads", "image_size"),
  "clip": ("encoder_heads",),
  "dinov2": ("encoder_heads", "image_size"),
  "dinov3": ("encoder_heads", "image_size"),
  "mae": ("encoder_heads", "decoder_heads"),
  "timm": ("encoder_heads",),
  "vit": ("encoder_heads",),
  "diffusers": (),
}
# Those whose images need not be square.
RECTANGULAR = ("siglip2", "dinov2", "dinov3")


def main(argv: Sequence[str]) -> None:
  """Parses the command line and converts."""
  parser = cli.Parser(
    "Converts a weights file of another project to a folder for maskgen.load or config.pretrained. "
    "mage: tokenizer and transformer of the PyTorch reference, as safetensors or PyTorch file. "
    "mage_finetuned: a classifier of its main_finetune.py. lease: the transformer of LEASE or Sorcen and "
    "MAGE's tokenizer. vqgan_pytorch: only its tokenizer. "
    "maskgit: MaskGIT's transformer and its tokenizer, Flax msgpack files. maskgit_flax: the tokenizer. "
    "mobilenet_v2: an .npz of quantized convolutions, and torchvision: ResNet-50 or VGG16 as safetensors or "
    "PyTorch file, also of timm; these are feature networks of the perceptual loss. "
    "siglip, siglip2, clip, dinov2 and dinov3: an image encoder, as folder or safetensors of transformers "
    "or, for siglip, .npz of big_vision and, for dinov3, a file of its PyTorch reference. "
    "timm and vit: a vision transformer, as folder of timm or transformers. "
    "mae: a masked autoencoder of its PyTorch reference, or its encoder alone. "
    "diffusers: a text-to-image model, a folder. "
    "docs/weights.md lists where to find published files.",
    "python -m maskgen.tools.convert --format=mage --weights=mage-vitb-1600.pth --out=weights/mage_vit_base",
  )
  parser.add_argument("--format", required=True, choices=FORMATS, help="format of the weights file")
  parser.add_argument(
    "--weights", required=True, help="weights file; for diffusers and transformers, a folder"
  )
  parser.add_argument("--out", required=True, help="new folder")
  parser.add_argument(
    "--encoder_heads", type=int, help="mage, mage_finetuned, lease, image encoders: default as published"
  )
  parser.add_argument("--decoder_heads", type=int, help="mage, lease, mae: default as published")
  parser.add_argument(
    "--image_size",
    type=_image_size,
    help="pixels per side, default 256 for tokenizers; or HEIGHTxWIDTH for siglip2, dinov2 and dinov3",
  )
  parser.add_argument("--tokenizer", help="maskgit, lease: weights file of the tokenizer")
  args = parser.parse_args(argv)
  options = ("encoder_heads", "decoder_heads", "image_size", "tokenizer")
  given = {name: getattr(args, name) for name in options}
  given = {name: value for name, value in given.items() if value is not None}
  for name, value in given.items():
    if name not in FORMATS[args.format]:
      raise UserError(f"--format={args.format} takes no --{name}: leave it out")
    if isinstance(value, tuple) and args.format not in RECTANGULAR:
      raise UserError(f"--format={args.format} takes square images: give --{name}=PIXELS")
    if name != "tokenizer" and min(sides := value if isinstance(value, tuple) else (value,)) < 1:
      raise UserError(f"--{name}={'x'.join(map(str, sides))}: give at least 1")
  _check_published(args.weights)
  cli.check_out_folder(args.out, new=True)

  from maskgen import __version__, storage, tree

  converted = importlib.import_module(f"maskgen.importers.{args.format}").convert(args.weights, **given)
  config = {**converted.config, "version": __version__}
  storage.write_export(args.out, config, converted.variables, named=converted.local_files)
  print(f"wrote {tree.count(converted.variables):,} parameters to {args.out}")
  if converted.dead:
    print(f"ignored, as in the reference: {', '.join(converted.dead)}")
  if converted.unknown:
    print(f"ignored, because they are unknown: {', '.join(converted.unknown)}")


def _image_size(text: str) -> int | tuple[int, int]:
  """Reads PIXELS or HEIGHTxWIDTH."""
  try:
    height, *width = map(int, text.split("x", 1))
  except ValueError:
    raise argparse.ArgumentTypeError(f"'{text}' is neither PIXELS nor HEIGHTxWIDTH") from None
  return (height, width[0]) if width else height


def _check_published(weights: str) -> None:
  from maskgen.importers.published import PUBLISHED

  if weights in PUBLISHED and not epath.Path(weights).exists():
    found = PUBLISHED[weights]
    raise UserError(
      f"{weights} is not on this machine: download {found.address} ({found.license}) and give its path with "
      f"--format={found.format}"
    )


if __name__ == "__main__":
  cli.run(main)
