"""Fine-tunes a MAGE encoder with few labels per class.

  python -m maskgen.main --workdir=runs/fewshot \
    --config=configs/fewshot_mage.py:path=/data/imagenet,model=runs/mage_large

`path` is a folder with `train` and `val`, each with one sub-folder per class; `model` is the workdir or
export of a trained MAGE, or a converted one.

Hardware: 8 accelerators; 2,000 steps with 10 labels per class. For MAGE-L on ImageNet a 10-shot top-1
accuracy of 71.9% is reported; its recipe is not published, and this one is that of `finetune_mage.py` with a
smaller batch. The authors of this file have only run `:tiny`.

Arguments:
  :shots         labels per class
  :share         a fraction of each class instead of `shots`, such as 0.01
  :subset_seed   the seed for choosing them; subsets of one seed are nested
  :size          the paper's recipe to use, base or large; by default that of `model`
  :source        a data source with classes instead of `path`, such as tfds:imagenet2012
  :eval_split    the split to evaluate on, by default val
  :classes       the number of classes in the data
  :batch_size    examples per step; the learning rate scales with it
  :tiny          a tokenizer, MAGE and this recipe on the embedded digits, 10 minutes on 2 cores: expect 91%
                 with 10 labels per class; with `model`, such as runs/quickstart/mage, only this recipe
  :debug         2 steps of each on synthetic pictures
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`finetune_mage.py` on a subset of the data, for 100 epochs of the subset."""
  given = dict(path="", source="", eval_split="val", classes=1000, batch_size=512)
  subset = dict(shots=10, share=0.0, subset_seed=0)
  args = vars(config_lib.parse_arg(arg, model="", size="", debug=False, tiny=False, **given, **subset))
  shots, share, seed = (args.pop(key) for key in subset)
  config = config_lib.load_beside(__file__, "finetune_mage.py", **args)
  fewshot = config.classify if "stages" in config else config
  fewshot.data.update(**{"share": share} if share else {"shots": shots}, subset_seed=seed)
  if args["tiny"] or args["debug"]:
    fewshot.total_steps = min(fewshot.total_steps, 200)
    fewshot.evals.accuracy.every_steps = 100
  else:
    del fewshot.data.split
    fewshot.total_epochs = 100.0
  return config
