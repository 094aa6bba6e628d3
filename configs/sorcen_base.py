"""Sorcen, ViT-B, on ImageNet at 256 pixels: MAGE with a contrast of images with echoes of themselves.

  python -m maskgen.main --config=configs/sorcen_base.py:path=/data/imagenet,tokenizer=runs/vqgan \
    --workdir=runs/sorcen_base

`path` and `tokenizer` are those of `mage_base.py`.

Hardware: as for `mage_base.py`; with the teacher, a step has 1.16 times the floating-point operations. The
authors report a linear-probe accuracy of 75.1% and an FID of 9.61, and 74.7% and 11.1 for MAGE. The authors
of this file have only run `:debug` and some hundred steps of `:tiny`, not the full recipe.

From the authors' code (ImaGonEs/LEASE): the weights 0.1 and 0.01, temperature 0.3, echoes among 15 codes in
windows of half the sides or more after 11 epochs of true codes, heads, and a moving average whose decay rises
from 0.996 to 1. Different here: the teacher is the moving average of the whole network, where theirs shares
its embeddings (`share_embedding=True`), runs without dropout, and no gradient reaches its head; each example
has its own size of the window; predictions use the moving average; and its decay at step s is at most
(1 + s) / (10 + s), which is less for the first 2,240 steps.

Arguments:
  :tiny          a tokenizer, then this recipe on the embedded digits
  :debug         2 steps of each on synthetic pictures
  :batch_size    examples per step; the learning rate scales with it. The batch is the set of negatives, so
                 there is no accumulation
  :size          base or large, as in mage_base.py
"""

import ml_collections

from maskgen import config as config_lib

IMAGENET = 1_281_167
# The authors count epochs from 0 and take true codes up to number 10.
TRUE_EPOCHS = 11


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  given = dict(path="imagenet", tokenizer="runs/vqgan", size="base", batch_size=4096, debug=False, tiny=False)
  args = vars(config_lib.parse_arg(arg, **given))
  config = config_lib.load_beside(__file__, "mage_base.py", **args)
  small = args["debug"] or args["tiny"]
  sorcen = config.mage if small else config
  sorcen.ema = dict(main=(0.996, 1.0))
  sorcen.objective.update(
    name="sorcen",
    contrastive_weight=0.1,
    uniformity_weight=0.01,
    temperature=0.3,
    echo_choices=15,
    echo_window=0.5,
    echo_start=100 if small else round(TRUE_EPOCHS * IMAGENET / args["batch_size"]),
    projection_hidden=256 if small else 4096,
    projection_width=64 if small else 512,
    predictor_hidden=128 if small else 2048,
    share_embedding=False,
  )
  if not small:
    return sorcen
  return ml_collections.ConfigDict(
    dict(stages=("tokenizer", "sorcen"), tokenizer=config.tokenizer, sorcen=sorcen)
  )
