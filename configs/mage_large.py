"""MAGE, ViT-L, on ImageNet at 256 pixels with the paper's recipe (Li et al. 2023, appendix B).

  python -m maskgen.main --config=configs/mage_large.py:path=/data/imagenet,tokenizer=runs/vqgan \
    --workdir=runs/mage_large

`path` is a folder with `train` and `val`, each with one sub-folder per class; `tokenizer` is the workdir or
export of a tokenizer trained with `vqgan_imagenet.py`. The recipe is in `mage_base.py`. The paper's numbers
are those of a tokenizer with `augmentation=strong` (the default is weak), with which its FID is 7.04.

Hardware: a TPU slice or several 8-GPU machines for the published batch of 4,096; 1,600 epochs, 500,000
steps. The paper reports an FID of 9.1 and a linear-probe accuracy of 78.9%. The authors of this file have not
run the full recipe; `docs/scaling.md` has estimates from compiling it.

Arguments:
  :tiny          a tokenizer, then this recipe on the embedded digits with the small networks of
                 `mage_base.py:tiny`, 10 minutes on 2 cores
  :debug         2 steps of each on synthetic pictures
  :accumulation  micro-batches per step, for fewer devices
  :batch_size    examples per step; the learning rate scales with it

The paper's scores are from 50,000 samples and a linear probe trained for 90 epochs; the evaluations here, a
validation loss and pictures, show whether a run is healthy, not how it compares.
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  return config_lib.load_beside(__file__, "mage_base.py", arg, size="large")
