"""Fine-tunes a MAGE encoder with few labels per class.

  python -m maskgen.main --workdir=runs/fewshot \
    --config=configs/fewshot_mage.py:path=/data/imagenet,model=runs/mage_large,size=large

`path` is a folder with `train` and `val`, each with one sub-folder per class; `model` the workdir or export
of a model trained by `mage_base.py`, or by `mage_large.py` with `:size=large`.

Hardware: 8 accelerators; 2,000 steps at 10 labels per class. A 10-shot top-1 accuracy of 71.9% is reported
for MAGE-L on ImageNet; its recipe is not published, this one is that of `finetune_mage.py` with a smaller
batch. It has not been run by the authors of this file; `:tiny` has.

Arguments:
  :shots         labels per class
  :share         a share of each class in place of `shots`, such as 0.01
  :subset_seed   which of them; fewer are a part of more of the same seed
  :size          base or large
  :source        a data source with classes in place of `path`, such as tfds:imagenet2012
  :eval_split    the split to measure on, by default val
  :classes       how many classes the data has
  :batch_size    examples per step; the learning rate follows it
  :tiny          a tokenizer, MAGE and this recipe on the embedded digits, 10 minutes on 2 cores: expect 91%
                 with 10 labels per class; with `model`, such as runs/quickstart/mage, this recipe alone
  :debug         2 steps of each on synthetic pictures
"""

import pathlib

import ml_collections

from maskgen import config as config_lib
from maskgen.errors import UserError, nearest
from maskgen.training import optim

# Of the paper's two models.
SIZES = {
  "base": dict(width=768, depth=12, heads=12, drop_path=0.1, decay=0.65),
  "large": dict(width=1024, depth=24, heads=16, drop_path=0.2, decay=0.75),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = config_lib.parse_arg(
    arg,
    model="",
    path="imagenet",
    source="",
    eval_split="val",
    classes=1000,
    shots=10,
    share=0.0,
    subset_seed=0,
    size="base",
    batch_size=512,
    debug=False,
    tiny=False,
  )
  config = full(args)
  if not (args.tiny or args.debug):
    return config
  quickstart = config_lib.load(f"{pathlib.Path(__file__).with_name('quickstart.py')}:debug={args.debug}")
  shrink(config, quickstart.mage)
  if args.model:
    return config
  # Without a model the small versions bring one of their own.
  config.pretrained.mage = "stage:mage"
  stages = {name: quickstart[name].to_dict() for name in ("tokenizer", "mage")}
  return ml_collections.ConfigDict(
    dict(stages=("tokenizer", "mage", "classify"), classify=config.to_dict(), **stages)
  )


def full(args) -> ml_collections.ConfigDict:
  if args.size not in SIZES:
    raise UserError(f"config argument ':size={args.size}' does not exist{nearest(args.size, SIZES)}")
  size = SIZES[args.size]
  return ml_collections.ConfigDict(
    dict(
      seed=0,
      batch_size=args.batch_size,
      total_epochs=100.0,
      log_every_steps=100,
      checkpoint=dict(save_steps=5000, save_minutes=15.0, keep=2),
      data=dict(
        source=args.source or f"folder:{args.path}",
        eval_split=args.eval_split,
        preprocess="decode(3)|random_resized_crop(256, (0.08, 1.0))|flip_lr|rand_augment(2, 9.0)",
        eval_preprocess="decode(3)|resize_small(292)|center_crop(256)",
        **{"share": args.share} if args.share else {"shots": args.shots},
        subset_seed=args.subset_seed,
      ),
      pretrained=dict(mage=args.model or "runs/mage_base"),
      objective=dict(
        name="classify",
        image_size=(256, 256),
        classes=args.classes,
        tokenizer=dict(
          channels=128,
          multipliers=(1, 1, 2, 2, 4),
          strides=(2, 2, 2, 2),
          blocks=2,
          codebook_size=1024,
          code_width=256,
          normalize_codes=False,
          norm_groups=32,
          dtype="bfloat16",
        ),
        width=size["width"],
        depth=size["depth"],
        heads=size["heads"],
        trained="all",
        norm="layer",
        drop_path=size["drop_path"],
        label_smoothing=0.1,
        mixup=0.8,
        cutmix=1.0,
        dtype="bfloat16",
        scan=True,
      ),
      optimizer=dict(
        main=dict(
          base_learning_rate=2.5e-4,
          end_learning_rate=1e-6,
          warmup_epochs=5.0,
          weight_decay=0.05,
          multipliers=optim.layer_decay(size["decay"], size["depth"]),
        )
      ),
      evals=dict(accuracy=dict(type="accuracy", every_steps=5000)),
      mesh=dict(data=-1, fsdp=1, tensor=1),
    )
  )


def shrink(config: ml_collections.ConfigDict, small: ml_collections.ConfigDict) -> None:
  """Keeps the recipe and takes data, network sizes and lengths from the quickstart."""
  del config.total_epochs, config.optimizer.main.warmup_epochs
  for key in ("batch_size", "total_steps", "checkpoint", "log_every_steps"):
    config[key] = small[key]
  config.data.update(**small.data, eval_split="test")
  for key in ("image_size", "tokenizer", "width", "depth", "heads"):
    config.objective[key] = small.objective[key]
  config.objective.dtype, config.objective.classes = "float32", 10
  config.total_steps = min(small.total_steps, 200)
  config.optimizer.main.warmup_steps = min(small.optimizer.main.warmup_steps, 50)
  # A run this short needs larger steps, and blocks so few a decay that reaches less deep.
  del config.optimizer.main.base_learning_rate
  config.optimizer.main.learning_rate = 1e-3
  config.optimizer.main.multipliers = optim.layer_decay(0.75, small.objective.depth)
  config.evals.accuracy.every_steps = 100
