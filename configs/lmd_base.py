"""LMD, ViT-B, on ImageNet at 224 pixels: latents of Stable Diffusion's autoencoder, more and more masked.

  python -m maskgen.tools.convert --format=diffusers --weights=/models/sd15 --out=weights/sd15
  python -m maskgen.main --workdir=runs/lmd_base \
    --config=configs/lmd_base.py:path=/data/imagenet,autoencoder=weights/sd15

`path` is that of `mae_base.py`. Images become 28 x 28 latents of 4 numbers, and these 7 x 7 patches.

Hardware: 8 accelerators of 40 GB or more; most of a step is the autoencoder's. Only `:debug` has been run.

From the code of Ma et al. (2024), AnonymousPony/lmd: latents, patches, mask ratios, loss, learning rate. It
takes Adan and one GPU; here are AdamW and a larger batch. What it does not say is as in MAE.

Arguments:
  :tiny          the quickstart's tokenizer, then this recipe on its latents, on the embedded digits
  :debug         2 steps of each on synthetic pictures
  :autoencoder   a converted Stable Diffusion 1; by default the config describes the published one
  :epochs        400, the default of the authors' code
  :batch_size, :accumulation   examples and micro-batches per step; the learning rate scales with the former
"""

import ml_collections

from maskgen import config as config_lib
from maskgen.importers import diffusers
from maskgen.importers.diffusers_layouts import LAYOUTS

IMAGES = 1_281_167  # of ImageNet, which decide how many steps an epoch has


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  given = dict(path="imagenet", epochs=400.0, batch_size=1024, accumulation=1)
  args = vars(config_lib.parse_arg(arg, autoencoder="", debug=False, tiny=False, **given))
  small, autoencoder = args["debug"] or args["tiny"], args.pop("autoencoder")
  config = config_lib.load_beside(__file__, "mae_base.py", **args)
  steps = config.total_steps if small else args["epochs"] * IMAGES / args["batch_size"]
  config.objective.update(
    name="lmd",
    image_size=config.objective.encoder.image_size,
    first_ratio=0.15,
    rise_steps=max(1, int(2 * steps / 3)),
  )
  for key in ("image_size", "mean", "std"):  # of latents
    del config.objective.encoder[key]
  if small:
    config.objective.encoder.patch = 1
    config.objective.autoencoder = dict(name="pretrained")
    config.pretrained = dict(autoencoder="stage:tokenizer")
    stages = config_lib.load_beside(__file__, "quickstart.py", debug=args["debug"], tiny=args["tiny"])
    return ml_collections.ConfigDict(
      dict(stages=("tokenizer", "lmd"), tokenizer=stages.tokenizer, lmd=config)
    )
  autoencoder = autoencoder or LAYOUTS["sd15"].published
  config.objective.encoder.patch = 4
  config.objective.autoencoder = diffusers.section_of(autoencoder, "sd15")
  config.pretrained = dict(autoencoder=autoencoder)
  config.optimizer.main.update(
    base_learning_rate=3e-4, end_learning_rate=1e-8, warmup_epochs=1.0, clip_norm=10.0
  )
  return config
