"""ViLex with Stable Diffusion 2.1: images as words for its prompts (Wang et al. 2024).

  python -m maskgen.tools.convert --format=diffusers --weights=/models/sd21 --out=weights/sd21
  python -m maskgen.tools.convert --format=siglip --weights=/models/siglip.safetensors --out=weights/siglip
  python -m maskgen.main --workdir=runs/vilex_sd21 \
    --config=configs/vilex_sd21.py:decoder=weights/sd21,encoder=weights/siglip,source=folder:/my/pictures

This is vilex_sd15.py with another decoder: its notes on the recipe, the paper and what was run apply here,
too. The paper's text encoder, OpenCLIP ViT-H/14, is said to be this decoder's.

Hardware: 256 chips of TPU v5e for the paper's batch; docs/scaling.md has estimates from compiling it.

Arguments: those of vilex_sd15.py; `:decoder` is a converted Stable Diffusion 2, "base" for 512
pixels or the other for 768, which also predicts v instead of noise: size and prediction are the decoder's.
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  return config_lib.load_beside(__file__, "vilex_sd15.py", arg, family="sd21")
