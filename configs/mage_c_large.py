"""MAGE-C, ViT-L, on ImageNet at 256 pixels: MAGE with a contrastive loss (Li et al. 2023, section 3.3).

  python -m maskgen.main --config=configs/mage_c_large.py:path=/data/imagenet,tokenizer=runs/vqgan \
    --workdir=runs/mage_c_large

`path` is a folder with `train` and `val`, each with one sub-folder per class; `tokenizer` the workdir or
export of a tokenizer trained by `vqgan_imagenet.py`, best with strong augmentation. The recipe stands in
`mage_c_base.py`.

Hardware: as for `mage_large.py`, and twice the time: a step trains on two views of each of 4,096 pictures,
and both views of 8 fit a chip of 16 GB. Expect, from the paper, 80.9% linear-probe accuracy (78.9% without
the contrastive loss). This full recipe has not been run by the authors of this file.

What is known: the loss and its weight 0.1 and temperature 0.2, masking left on, the crops and mirrors of MAGE
and, unlike SimCLR, no other augmentation: the paper finds that reconstruction keeps the encoder from short
cuts. `color` adds a weak version of SimCLR's, to try. What is chosen here: the widths of the head, SimCLR's.

Arguments:
  :tiny          a tokenizer, then this recipe on the embedded digits with the small networks of
                 `mage_c_base.py:tiny`, 20 minutes on 2 cores
  :debug         2 steps of each on synthetic pictures
  :color         jitter of colours, at half of SimCLR's strength
  :batch_size    examples per step, each with two views; the learning rate follows it. Their number is that of
                 negatives: there is no accumulation

The probe of the paper is trained for 90 epochs; the evaluations here, a validation loss (MAGE's alone) and
pictures, say whether a run is healthy, not how it compares.
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  return config_lib.load_beside(__file__, "mage_c_base.py", arg, size="large")
