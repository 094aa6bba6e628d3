"""Class-conditional MAGE, ViT-B, on ImageNet at 256 pixels (Li et al. 2023, appendix A.2).

  python -m maskgen.main --config=configs/mage_class_cond.py:path=/data/imagenet,mage=runs/mage_base \
    --workdir=runs/mage_class_cond

`path` is a folder with `train` and `val`, each with one sub-folder per class; `mage` is the workdir or export
of a model trained with `mage_base.py`. Its encoder is frozen, so that its features do not change; its decoder
is trained further, conditioned on the class of each image.

  python -m maskgen.tools.generate --model=runs/mage_class_cond --label=207,250 --guidance=3 --out=dogs.png

Hardware: as for `mage_base.py`, with cheaper steps, as there is no backward pass through the encoder. The
paper does not give the length and learning rate of this stage; here they are a tenth of the pre-training's
epochs at the same rate. The authors of this file have only run `:tiny`, not the full recipe.

Arguments:
  :tiny          the stages of the quickstart, then 1,500 steps of this recipe on the same digits: expect a
                 classifier of real digits to recognize the requested class in 98% of the images, and a
                 Frechet distance of 0.61 (without classes 0.85); `:tiny,mage=digits` starts from the
                 quickstart's MAGE that comes with maskgen
  :debug         2 steps of each on synthetic pictures
  :accumulation  micro-batches per step, for fewer devices
  :batch_size    examples per step; the learning rate scales with it
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = config_lib.parse_arg(
    arg, path="imagenet", mage="", batch_size=4096, accumulation=1, debug=False, tiny=False
  )
  config = full(args)
  if not (args.tiny or args.debug):
    return config
  # The small versions include the stages before this one, unless their result is given.
  stages = config_lib.load_beside(__file__, "quickstart.py", debug=args.debug)
  shrink(config, stages.mage)
  config.total_steps = 2 if args.debug else 1500
  if args.mage:
    return config
  config.pretrained.mage = "stage:mage"
  stages.stages = ("tokenizer", "mage", "mage_class_cond")
  stages.mage_class_cond = config
  return stages


def full(args) -> ml_collections.ConfigDict:
  """`mage_base.py` with classes, a frozen encoder, a tenth of the epochs and a moving average."""
  given = dict(path=args.path, batch_size=args.batch_size, accumulation=args.accumulation)
  config = config_lib.load_beside(__file__, "mage_base.py", **given)
  config.total_epochs = 160.0
  config.pretrained = dict(mage=args.mage or "runs/mage_base")
  config.objective.update(name="mage_conditional", classes=1000, condition_width=768, condition_dropout=0.1)
  config.objective.sampling.update(guidance=3.0, guidance_schedule="linear")
  config.optimizer.main.warmup_epochs = 4.0
  config.ema = dict(main=0.999)
  # The frozen encoder is sharded like the trained decoder.
  config.sharding = (("^frozen/tokenizer/", ()), *config_lib.TRANSFORMER_RULES)
  return config


def shrink(config: ml_collections.ConfigDict, small: ml_collections.ConfigDict) -> None:
  """Keeps the recipe and takes data, network sizes and lengths from the quickstart's MAGE."""
  del config.total_epochs, config.optimizer.main.warmup_epochs
  for key in ("batch_size", "checkpoint", "data", "log_every_steps"):
    config[key] = small[key]
  for key in ("image_size", "width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads"):
    config.objective[key] = small.objective[key]
  for key in ("tokenizer", "dropout", "label_smoothing"):
    config.objective[key] = small.objective[key]
  config.objective.update(classes=10, condition_width=small.objective.decoder_width, dtype="float32")
  config.objective.sampling.update(small.objective.sampling)
  config.optimizer.main = small.optimizer.main
  config.evals = {name: small.evals[name] for name in ("validation", "generation", "samples")}
