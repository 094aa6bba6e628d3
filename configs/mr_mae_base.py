"""MR-MAE, ViT-B/16, on ImageNet at 224 pixels: MAE whose encoder also mimics CLIP at visible patches.

  python -m maskgen.tools.convert --format=clip --weights=clip-vit-base-patch16 --out=weights/clip_base
  python -m maskgen.main --config=configs/mr_mae_base.py:path=/data/imagenet --workdir=runs/mr_mae

`path` is that of `mae_base.py`, `teacher` that of `mask_align_base.py`, CLIP's ViT-B/16 if it is not given.

Hardware: as for `mae_base.py`, with 400 epochs; the teacher sees all patches. The authors (Gao et al. 2023)
report 85.8% after fine-tuning, with convolutions in front of the encoder. Their code is not public: only the
mask ratio and the number of epochs are theirs, what the abstract does not say is MAE's recipe or our choice.
The authors of this file have only run `:debug`, by hand.

Arguments:
  :tiny          `mae_base.py:tiny`, then this recipe with that MAE as the teacher, on the same digits
  :debug         2 steps of each on synthetic pictures
  :teacher       see above
  :epochs        400 in the paper
  :batch_size, :accumulation   examples and micro-batches per step; the learning rate scales with the former
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  given = dict(path="imagenet", epochs=400.0, batch_size=4096, accumulation=1)
  args = vars(config_lib.parse_arg(arg, teacher="", debug=False, tiny=False, **given))
  taught = config_lib.load_beside(__file__, "mask_align_base.py", **args)
  del args["teacher"]
  config = config_lib.load_beside(__file__, "mae_base.py", **args)
  section = taught.get("mask_align", taught)
  config.objective.update(name="mr_mae", teacher=section.objective.teacher, mimic_weight=1.0)
  config.pretrained = section.pretrained
  if "stages" not in taught:
    return config
  return ml_collections.ConfigDict(dict(stages=("mae", "mr_mae"), mae=taught.mae, mr_mae=config))
