"""MAGE, ViT-B, on ImageNet at 256 pixels with the paper's recipe (Li et al. 2023, appendix B).

  python -m maskgen.main --config=configs/mage_base.py:path=/data/imagenet,tokenizer=runs/vqgan \
    --workdir=runs/mage_base

`path` is a folder with `train` and `val`, each with one sub-folder per class; `tokenizer` is the workdir or
export of a tokenizer trained with `vqgan_imagenet.py`. The paper's numbers are those of
`augmentation=strong`; the default is weak.

Hardware: a TPU slice or several 8-GPU machines for the published batch of 4,096; 1,600 epochs, 500,000
steps. The paper reports an FID of 11.1 and a linear-probe accuracy of 74.7%, with a final training loss of
about 5.76. The authors of this file have only run `:tiny`, not the full recipe.

Arguments:
  :tiny          a tokenizer, then this recipe on the embedded digits, 10 minutes on 2 cores: expect a
                 probe of 91% and a Frechet distance of 0.44 times that of random codes
  :debug         2 steps of each on synthetic pictures
  :accumulation  micro-batches per step, for fewer devices
  :batch_size    examples per step; the learning rate scales with it
  :size          base or large, see mage_large.py

The paper's scores are from 50,000 samples and a linear probe trained for 90 epochs; the evaluations here, a
validation loss and pictures, show whether a run is healthy, not how it compares.
"""

import ml_collections

from maskgen import config as config_lib

# The paper's ViT-B and ViT-L.
SIZES = {
  "base": dict(width=768, depth=12, heads=12, decoder_width=768),
  "large": dict(width=1024, depth=24, heads=16, decoder_width=1024),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = config_lib.parse_arg(
    arg,
    path="imagenet",
    tokenizer="runs/vqgan",
    size="base",
    batch_size=4096,
    accumulation=1,
    debug=False,
    tiny=False,
  )
  config = full(args)
  if not (args.tiny or args.debug):
    return config
  # The small versions have their own tokenizer stage.
  quickstart = config_lib.load_beside(__file__, "quickstart.py", debug=args.debug)
  shrink(config, quickstart.mage)
  return ml_collections.ConfigDict(
    dict(stages=("tokenizer", "mage"), tokenizer=quickstart.tokenizer, mage=config)
  )


def full(args) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(
      batch_size=args.batch_size,
      accumulation=args.accumulation,
      total_epochs=1600.0,
      log_every_steps=100,
      checkpoint=dict(save_steps=5000, save_minutes=15.0, keep=2),
      data=dict(
        source=f"folder:{args.path}",
        split="train",
        eval_split="val",
        preprocess="decode(3)|random_resized_crop(256, (0.2, 1.0))|flip_lr",
        eval_preprocess="decode(3)|resize_small(292)|center_crop(256)",
      ),
      pretrained=dict(tokenizer=args.tokenizer),
      objective=dict(
        name="mage",
        image_size=(256, 256),
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
        **config_lib.choose("size", args.size, SIZES),
        decoder_depth=8,
        decoder_heads=16,
        dropout=0.1,
        dtype="bfloat16",
        # Compiles one block for all, and recomputes cheap operations, which is faster than to store them.
        scan=True,
        remat="dots",
        mask_ratio=dict(mean=0.55, std=0.25, low=0.5, high=1.0),
        label_smoothing=0.1,
        sampling=dict(steps=20, schedule="cosine", temperature=6.0),
      ),
      optimizer=dict(
        main=dict(
          base_learning_rate=1.5e-4, warmup_epochs=40.0, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=3.0
        )
      ),
      evals=dict(
        validation=dict(type="loss", every_steps=10_000),
        samples=dict(type="samples", every_steps=10_000),
      ),
      sharding=(("^frozen/", ()), *config_lib.TRANSFORMER_RULES),
    )
  )


def shrink(config: ml_collections.ConfigDict, small: ml_collections.ConfigDict) -> None:
  """Keeps the recipe and takes data, network sizes and lengths from the quickstart."""
  del config.total_epochs, config.optimizer.main.warmup_epochs
  for key in ("batch_size", "total_steps", "checkpoint", "data", "pretrained", "evals", "log_every_steps"):
    config[key] = small[key]
  for key in ("image_size", "width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads"):
    config.objective[key] = small.objective[key]
  config.objective.update(tokenizer=small.objective.tokenizer, sampling=small.objective.sampling)
  config.objective.dtype = config.objective.tokenizer.dtype = "float32"
  config.objective.remat = "none"
  config.optimizer.main.warmup_steps = small.optimizer.main.warmup_steps
  # A short run needs a larger learning rate than the linear scaling rule gives.
  config.optimizer.main.base_learning_rate = small.optimizer.main.learning_rate * 256 / small.batch_size
