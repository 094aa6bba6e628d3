"""MAGE-C, ViT-L, on ImageNet at 256 pixels: MAGE with a contrastive loss (Li et al. 2023, section 3.3).

  python -m maskgen.main --config=configs/mage_c_large.py:path=/data/imagenet,tokenizer=runs/vqgan \
    --workdir=runs/mage_c_large

`path` is a folder with `train` and `val`, each with one sub-folder per class; `tokenizer` is the workdir or
export of a tokenizer trained with `vqgan_imagenet.py`, best with strong augmentation. The recipe is in
`mage_c_base.py`.

Hardware: as for `mage_large.py`, with twice the time: a step trains on two views of each of 4,096 pictures,
and both views of 8 fit on a chip of 16 GB. The paper reports a linear-probe accuracy of 80.9% (78.9% without
the contrastive loss). The authors of this file have not run the full recipe.

From the paper: the loss with its weight 0.1 and temperature 0.2, masked inputs, the crops and flips of MAGE
and, unlike SimCLR, no other augmentation, as reconstruction keeps the encoder from taking shortcuts. `color`
adds a weak version of SimCLR's colour jitter to try. Chosen here: the widths of the head, as in SimCLR.

Arguments:
  :tiny          a tokenizer, then this recipe on the embedded digits with the small networks of
                 `mage_c_base.py:tiny`, 20 minutes on 2 cores
  :debug         2 steps of each on synthetic pictures
  :color         colour jitter at half of SimCLR's strength
  :batch_size    examples per step, each with two views; the learning rate scales with it. The batch is the
                 set of negatives, so there is no accumulation

The paper's probe is trained for 90 epochs; the evaluations here, a validation loss (only MAGE's) and
pictures, show whether a run is healthy, not how it compares.
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  return config_lib.load_beside(__file__, "mage_c_base.py", arg, size="large")
