"""MAGE-C, ViT-B, on ImageNet at 256 pixels: MAGE with a contrastive loss (Li et al. 2023, section 3.3).

  python -m maskgen.main --config=configs/mage_c_base.py:path=/data/imagenet,tokenizer=runs/vqgan \
    --workdir=runs/mage_c_base

`path` is a folder with `train` and `val`, each with one sub-folder per class; `tokenizer` is the workdir or
export of a tokenizer trained with `vqgan_imagenet.py`, best with strong augmentation.

Hardware: as for `mage_base.py`, with twice the time: a step trains on two views of each of 4,096 pictures.
On a tokenizer of strong augmentation, the paper reports a linear-probe accuracy of 78.2% (74.7% without the
contrastive loss). The authors of this file have not run the full recipe.

From the paper: the loss with its weight 0.1 and temperature 0.2, masked inputs, the crops and flips of MAGE
and, unlike SimCLR, no other augmentation, as reconstruction keeps the encoder from taking shortcuts. `color`
adds a weak version of SimCLR's colour jitter to try. Chosen here: the widths of the head, as in SimCLR.

Arguments:
  :tiny          a tokenizer, then this recipe on the embedded digits, 20 minutes on 2 cores
  :debug         2 steps of each on synthetic pictures
  :color         colour jitter at half of SimCLR's strength
  :batch_size    examples per step, each with two views; the learning rate scales with it. The batch is the
                 set of negatives, so there is no accumulation
  :size          base or large, see mage_c_large.py

The paper's probe is trained for 90 epochs; the evaluations here, a validation loss (only MAGE's) and
pictures, show whether a run is healthy, not how it compares.
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  given = dict(path="imagenet", tokenizer="runs/vqgan", size="base", batch_size=4096, debug=False, tiny=False)
  args = vars(config_lib.parse_arg(arg, color=False, **given))
  color = args.pop("color")
  config = config_lib.load_beside(__file__, "mage_base.py", **args)
  small = args["debug"] or args["tiny"]
  mage_c = config.mage if small else config
  mage_c.data.preprocess = f"two_views|{mage_c.data.preprocess}"
  if color and not small:
    mage_c.data.preprocess += "|color_jitter(0.4, 0.4, 0.4, 0.1)|grayscale(0.2)"
  mage_c.objective.update(
    name="mage_c",
    contrastive_weight=0.1,
    temperature=0.2,
    projection_hidden=256 if small else 2048,
    projection_width=64 if small else 128,
  )
  if not small:
    return config
  return ml_collections.ConfigDict(
    dict(stages=("tokenizer", "mage_c"), tokenizer=config.tokenizer, mage_c=mage_c)
  )
