"""Fine-tunes a MAGE encoder with few labels per class.

  python -m maskgen.main --workdir=runs/fewshot \
    --config=configs/fewshot_mage.py:path=/data/imagenet,model=runs/mage_large

`path` is a folder with `train` and `val`, each with one sub-folder per class; `model` the workdir or export
of a trained MAGE, or a converted one.

Hardware: 8 accelerators; 2,000 steps at 10 labels per class. A 10-shot top-1 accuracy of 71.9% is reported
for MAGE-L on ImageNet; its recipe is not published, this one is that of `finetune_mage.py` with a smaller
batch. It has not been run by the authors of this file; `:tiny` has.

Arguments:
  :shots         labels per class
  :share         a share of each class in place of `shots`, such as 0.01
  :subset_seed   which of them; fewer are a part of more of the same seed
  :size          whose recipe of the paper's, base or large; by default that of `model`
  :source        a data source with classes in place of `path`, such as tfds:imagenet2012
  :eval_split    the split to measure on, by default val
  :classes       how many classes the data has
  :batch_size    examples per step; the learning rate follows it
  :tiny          a tokenizer, MAGE and this recipe on the embedded digits, 10 minutes on 2 cores: expect 91%
                 with 10 labels per class; with `model`, such as runs/quickstart/mage, this recipe alone
  :debug         2 steps of each on synthetic pictures
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`finetune_mage.py` on a part of the data, for 100 epochs of it."""
  given = dict(path="imagenet", source="", eval_split="val", classes=1000, batch_size=512)
  subset = dict(shots=10, share=0.0, subset_seed=0)
  args = vars(config_lib.parse_arg(arg, model="", size="", debug=False, tiny=False, **given, **subset))
  shots, share, seed = (args.pop(key) for key in subset)
  config = config_lib.load_beside(__file__, "finetune_mage.py", **args)
  fewshot = config.classify if "stages" in config else config
  fewshot.data.update(**{"share": share} if share else {"shots": shots}, subset_seed=seed)
  if args["tiny"] or args["debug"]:
    fewshot.data.eval_split = "test"
    fewshot.total_steps = min(fewshot.total_steps, 200)
    fewshot.evals.accuracy.every_steps = 100
  else:
    del fewshot.data.split
    fewshot.total_epochs = 100.0
  return config
