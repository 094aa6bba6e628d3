"""Trains a linear classifier on a frozen MAGE encoder, with the paper's recipe (Li et al. 2023, appendix B).

  python -m maskgen.main --config=configs/probe_mage.py:path=/data/imagenet,model=runs/mage_base \
    --workdir=runs/probe

`path` is a folder with `train` and `val`, each with one sub-folder per class; `model` is the workdir or
export of a trained MAGE, or a converted one. For transfer to another data set than that of `model`, also set
`classes`.

Hardware: 8 accelerators; there is no backward pass through the encoder. 90 epochs. The paper reports a top-1
accuracy of 74.7% (78.9% for the large model), both on a tokenizer of strong augmentation. The authors of this
file have only run `:tiny`, not the full recipe. In the reference implementation the dropout of 0.1 on the
embedding stays active while the probe trains; here the frozen encoder has no dropout.

Arguments:
  :size          the paper's recipe to use, base or large; by default that of `model`
  :source        a data source with classes instead of `path`, such as tfds:imagenet2012, or a token cache
  :eval_split    the split to evaluate on, by default val
  :classes       the number of classes in the data
  :batch_size, :accumulation   examples and micro-batches per step; the learning rate scales with the former
  :tiny          a tokenizer, MAGE and this recipe on the embedded digits, 10 minutes on 2 cores: expect 94%;
                 with `model`, such as runs/quickstart/mage, only this recipe, in a minute, on any `path`
  :debug         2 steps of each on synthetic pictures
"""

import ml_collections

from maskgen import config as config_lib
from maskgen import storage

# For the paper's two models.
LEARNING_RATES = {"base": 0.1, "large": 0.05}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  given = dict(path="", source="", eval_split="val", classes=1000, batch_size=4096, accumulation=1)
  args = config_lib.parse_arg(arg, model="", size="", debug=False, tiny=False, **given)
  found = storage.find_section(args.model)
  args.size = args.size or ("large" if found.get("width") == 1024 else "base")
  side = found.get("image_size", [256])[0]
  learning_rate = config_lib.choose("size", args.size, LEARNING_RATES)
  if args.model:
    encoder = dict(name="pretrained", **precision("bfloat16", args.model))
  else:
    encoder = config_lib.load_beside(__file__, "mage_base.py", size=args.size).objective.to_dict()
  lars = dict(name="lars", base_learning_rate=learning_rate, warmup_epochs=10.0, b1=0.9, weight_decay=0.0)
  config = ml_collections.ConfigDict(
    dict(
      batch_size=args.batch_size,
      accumulation=args.accumulation,
      total_epochs=90.0,
      log_every_steps=100,
      checkpoint=dict(save_steps=5000, save_minutes=15.0, keep=2),
      data=dict(
        source=args.source or f"folder:{args.path or 'imagenet'}",
        split="train",
        eval_split=args.eval_split,
        preprocess=f"decode(3)|random_resized_crop({side}, (0.2, 1.0), 'bicubic', clamp=True)|flip_lr",
        eval_preprocess=f"decode(3)|resize_small({round(side * 292 / 256)}, 'bicubic')|center_crop({side})",
      ),
      pretrained=dict(encoder=args.model or f"runs/mage_{args.size}"),
      objective=dict(
        name="classify",
        classes=args.classes,
        encoder=dict(encoder, dtype="bfloat16", scan=True),
        trained="head",
        norm="batch",
      ),
      optimizer=dict(main=lars),
      evals=dict(accuracy=dict(type="accuracy", every_steps=5000)),
    )
  )
  return small_version(config, args) if args.tiny or args.debug else config


def precision(dtype: str, model: str) -> dict:
  """In which type an encoder computes, and its tokenizer, if it has one."""
  has_tokenizer = "tokenizer" in storage.find_section(model)
  return dict(dtype=dtype, tokenizer=dict(dtype=dtype)) if has_tokenizer else dict(dtype=dtype)


def small_version(config: ml_collections.ConfigDict, args) -> ml_collections.ConfigDict:
  """The recipe with network sizes and lengths from the quickstart, and its data or MAGE if none is given."""
  stages = config_lib.load_beside(__file__, "quickstart.py", debug=args.debug)
  if args.debug or not (args.model and (args.path or args.source)):
    config.data = stages.mage.data
    config.objective.classes = 10
  shrink(config, stages.mage)
  if args.model:
    return config
  config.pretrained.encoder = "stage:mage"
  stages.update(stages=("tokenizer", "mage", "classify"), classify=config)
  return stages


def shrink(config: ml_collections.ConfigDict, small: ml_collections.ConfigDict) -> None:
  """Keeps the recipe and takes network sizes and lengths from the quickstart."""
  del config.total_epochs, config.optimizer.main.warmup_epochs
  for key in ("batch_size", "total_steps", "checkpoint", "log_every_steps"):
    config[key] = small[key]
  config.objective.encoder = dict(
    name="pretrained", scan=True, **precision("float32", config.pretrained.encoder)
  )
  config.total_steps = min(small.total_steps, 500)
  config.optimizer.main.warmup_steps = min(small.optimizer.main.warmup_steps, 50)
  # A short run needs a larger learning rate.
  del config.optimizer.main.base_learning_rate
  config.optimizer.main.learning_rate = 20.0
  config.evals.accuracy.every_steps = 250
