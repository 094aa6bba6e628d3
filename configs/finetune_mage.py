"""Fine-tunes a MAGE encoder to classify, with the paper's recipe (Li et al. 2023, appendix B).

  python -m maskgen.main --config=configs/finetune_mage.py:path=/data/imagenet,model=runs/mage_base \
    --workdir=runs/finetune

`path` is a folder with `train` and `val`, each with one sub-folder per class; `model` is the workdir or
export of a trained MAGE, or a converted one. For transfer to another data set than that of `model`, also set
`classes`.

Hardware: 8 accelerators of 40 GB, or `accumulation`; 100 epochs (50 for the large model). The paper reports a
top-1 accuracy of 82.5% (83.9%). The authors of this file have only run `:tiny`, not the full recipe. Unlike
the reference implementation, it has no dropout on the embedding.

Arguments:
  :size          the paper's recipe to use, base or large; by default that of `model`
  :source        a data source with classes instead of `path`, such as tfds:imagenet2012
  :eval_split    the split to evaluate on, by default val
  :classes       the number of classes in the data
  :batch_size, :accumulation   examples and micro-batches per step; the learning rate scales with the former
  :tiny          a tokenizer, MAGE and this recipe on the embedded digits, 10 minutes on 2 cores: expect 96%;
                 with `model`, such as runs/quickstart/mage, only this recipe, in 2 minutes, on any `path`
  :debug         2 steps of each on synthetic pictures
"""

import ml_collections

from maskgen import config as config_lib
from maskgen import storage

# For the paper's two models.
SIZES = {
  "base": dict(epochs=100.0, drop_path=0.1, decay=0.65),
  "large": dict(epochs=50.0, drop_path=0.2, decay=0.75),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`probe_mage.py` with everything trained, and with regularization."""
  given = dict(path="", source="", eval_split="val", classes=1000, batch_size=1024, accumulation=1)
  args = config_lib.parse_arg(arg, model="", size="", debug=False, tiny=False, **given)
  args.size = args.size or ("large" if storage.find_section(args.model).get("width") == 1024 else "base")
  size = config_lib.choose("size", args.size, SIZES)
  config = config_lib.load_beside(__file__, "probe_mage.py", **vars(args))
  classify = config.classify if "stages" in config else config
  classify.objective.update(
    trained="all",
    norm="layer",
    drop_path=size["drop_path"],
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
  )
  recipe = dict(end_learning_rate=1e-6, weight_decay=0.05)
  if args.tiny or args.debug:
    # A short run needs a larger learning rate, and so few blocks need less layer decay.
    recipe.update(learning_rate=1e-3, warmup_steps=classify.optimizer.main.warmup_steps)
    recipe["layer_decay"] = 0.75
  else:
    recipe.update(base_learning_rate=2.5e-4, warmup_epochs=5.0)
    recipe["layer_decay"] = size["decay"]
    classify.total_epochs = size["epochs"]
  if "random_resized_crop" in classify.data.preprocess:
    # timm's rand-m9-mstd0.5-inc1, filled with the mean colour of ImageNet, on torchvision's crop.
    classify.data.preprocess = classify.data.preprocess.replace(", clamp=True", "") + (
      "|rand_augment(2, 9.0, 0.5, increasing=True, method='bicubic', fill=(124, 116, 104))"
    )
  classify.optimizer.main = recipe
  return config
