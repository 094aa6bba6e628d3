"""DMJD, ViT-B/16, on ImageNet at 224 pixels: gradients of all patches, from two views with disjoint masks.

  python -m maskgen.main --config=configs/dmjd_base.py:path=/data/imagenet --workdir=runs/dmjd_base

`path` is that of `mae_base.py`.

Hardware: 8 accelerators of 40 GB or more, for the published batch of 512 pictures, each masked twice; 400
epochs, a million steps. For a ViT-B the authors (Ma et al. 2023) report 71.9% for a linear probe and 84.1%
after fine-tuning. The authors of this file have only run `:debug`, by hand.

From the authors' code (mx-mark/DMJD): masks, targets, losses, decoder and optimizer. Its encoder begins with
convolutions, this one is MAE's; its visible patches are compared in two orders, objective.shuffle_visible.

Arguments:
  :tiny          this recipe on the embedded digits
  :debug         2 steps on synthetic pictures
  :epochs        400 in the paper
  :batch_size, :accumulation   examples and micro-batches per step; the learning rate scales with the former
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  given = dict(path="imagenet", epochs=400.0, batch_size=512, accumulation=1)
  args = vars(config_lib.parse_arg(arg, debug=False, tiny=False, **given))
  small = args["debug"] or args["tiny"]
  config = config_lib.load_beside(__file__, "mae_base.py", **args)
  config.objective.update(
    name="dmjd",
    mask_ratio=0.6,
    block=2,
    cells=1 if small else 2,
    bins=9,
    visible_weight=1.0,
    shuffle_visible=False,
  )
  del config.evals.samples
  if not small:
    config.data.preprocess = "decode(3)|random_resized_crop(224, (0.5, 1.0), 'bicubic')|flip_lr"
    config.optimizer.main.update(base_learning_rate=1e-3, warmup_epochs=args["epochs"] / 20)
  return config
