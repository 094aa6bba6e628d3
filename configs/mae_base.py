"""MAE, ViT-B, on ImageNet at 224 pixels with the paper's recipe (He et al. 2022, appendix A.1).

  python -m maskgen.main --config=configs/mae_base.py:path=/data/imagenet --workdir=runs/mae_base

`path` is a folder with `train` and `val`, each with one sub-folder per class.

Hardware: 8 accelerators of 40 GB or more, for the published batch of 4,096; 800 epochs, 250,000 steps. The
paper reports a top-1 accuracy of 68.0% for a linear probe and of 83.6% after fine-tuning, both for 1,600
epochs. The authors of this file have only run a third of `:tiny`, not the full recipe.

Arguments:
  :tiny          this recipe on the embedded digits, 7 minutes on 2 cores: after 1,000 of 3,000 steps a probe
                 of 98.9%, where a random encoder has 96.9%
  :debug         2 steps on synthetic pictures
  :epochs        800 or 1600 in the paper
  :batch_size, :accumulation   examples and micro-batches per step; the learning rate scales with the former
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  given = dict(path="imagenet", epochs=800.0, batch_size=4096, accumulation=1)
  args = config_lib.parse_arg(arg, debug=False, tiny=False, **given)
  plain = "decode(3)|resize_small(256, 'bicubic')|center_crop(224)"
  config = ml_collections.ConfigDict(
    dict(
      batch_size=args.batch_size,
      accumulation=args.accumulation,
      total_epochs=args.epochs,
      log_every_steps=100,
      checkpoint=dict(save_steps=5000, save_minutes=15.0, keep=2),
      data=dict(
        source=f"folder:{args.path}",
        split="train",
        eval_split="val",
        preprocess="decode(3)|random_resized_crop(224, (0.2, 1.0), 'bicubic')|flip_lr",
        eval_preprocess=plain,
      ),
      objective=dict(
        name="masked_pixels",
        encoder=dict(
          image_size=(224, 224),
          patch=16,
          width=768,
          depth=12,
          heads=12,
          pooling="class",
          fixed_positions=True,
          activation="gelu",
          mean=(0.485, 0.456, 0.406),
          std=(0.229, 0.224, 0.225),
          dtype="bfloat16",
        ),
        decoder_width=512,
        decoder_depth=8,
        decoder_heads=16,
        mask_ratio=0.75,
        normalize_targets=True,
      ),
      optimizer=dict(main=dict(base_learning_rate=1.5e-4, warmup_epochs=40.0, b2=0.95, weight_decay=0.05)),
      evals=dict(
        validation=dict(type="loss", every_steps=10_000), samples=dict(type="samples", every_steps=10_000)
      ),
      sharding=config_lib.BLOCK_RULES,
    )
  )
  if args.tiny or args.debug:
    shrink(config, config_lib.load_beside(__file__, "quickstart.py", debug=args.debug).mage)
  return config


def shrink(config: ml_collections.ConfigDict, small: ml_collections.ConfigDict) -> None:
  """Keeps the recipe and takes data, network sizes and lengths from the quickstart."""
  del config.total_epochs, config.optimizer.main.warmup_epochs
  for key in ("batch_size", "total_steps", "checkpoint", "data", "log_every_steps"):
    config[key] = small[key]
  for key in ("image_size", "width", "depth", "heads"):
    config.objective.encoder[key] = small.objective[key]
  for key in ("decoder_width", "decoder_depth", "decoder_heads"):
    config.objective[key] = small.objective[key]
  config.objective.encoder.update(patch=2, dtype="float32")
  config.optimizer.main.warmup_steps = small.optimizer.main.warmup_steps
  # A short run needs a larger learning rate than the linear scaling rule gives.
  config.optimizer.main.base_learning_rate = small.optimizer.main.learning_rate * 256 / small.batch_size
  for name in ("validation", "samples", "probe"):
    if name in small.evals:
      config.evals[name] = small.evals[name]
