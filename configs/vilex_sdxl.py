"""ViLex with Stable Diffusion XL: images as words for its prompts (Wang et al. 2024).

  python -m maskgen.tools.convert --format=diffusers --weights=/models/sdxl --out=weights/sdxl
  python -m maskgen.tools.convert --format=siglip --weights=/models/siglip.safetensors --out=weights/siglip
  python -m maskgen.main --workdir=runs/vilex_sdxl \
    --config=configs/vilex_sdxl.py:decoder=weights/sdxl,encoder=weights/siglip,source=folder:/my/pictures

This is vilex_sd15.py with another decoder: its notes on the recipe, the paper and what was run apply here,
too. A token replaces a word of both text encoders, of width 768 + 1280.

Hardware: the frozen decoder alone is 7 GB in bfloat16. For chips of 16 GB shard it with
`--config.mesh.fsdp=16`; the memory of such a step has not been measured by compiling it.

Arguments: those of vilex_sd15.py; `:decoder` is a converted Stable Diffusion XL, base.
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  return config_lib.load_beside(__file__, "vilex_sd15.py", arg, family="sdxl")
