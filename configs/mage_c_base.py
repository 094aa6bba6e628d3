"""MAGE-C, ViT-B, on ImageNet at 256 pixels: MAGE with a contrastive loss (Li et al. 2023, section 3.3).

  python -m maskgen.main --config=configs/mage_c_base.py:path=/data/imagenet,tokenizer=runs/vqgan \
    --workdir=runs/mage_c_base

`path` is a folder with `train` and `val`, each with one sub-folder per class; `tokenizer` the workdir or
export of a tokenizer trained by `vqgan_imagenet.py`, best with strong augmentation.

Hardware: as for `mage_base.py`, and twice the time: a step trains on two views of each of 4,096 pictures.
Expect, from the paper, 78.2% linear-probe accuracy (74.7% without the contrastive loss). This full recipe has
not been run by the authors of this file.

What is known: the loss and its weight 0.1 and temperature 0.2, masking left on, the crops and mirrors of MAGE
and, unlike SimCLR, no other augmentation: the paper finds that reconstruction keeps the encoder from short
cuts. `color` adds a weak version of SimCLR's, to try. What is chosen here: the widths of the head, SimCLR's.

Arguments:
  :tiny          a tokenizer, then this recipe on the embedded digits, 20 minutes on 2 cores
  :debug         2 steps of each on synthetic pictures
  :color         jitter of colours, at half of SimCLR's strength
  :batch_size    examples per step, each with two views; the learning rate follows it. Their number is that of
                 negatives: there is no accumulation

The probe of the paper is trained for 90 epochs; the evaluations here, a validation loss (MAGE's alone) and
pictures, say whether a run is healthy, not how it compares.
"""

import pathlib

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = config_lib.parse_arg(
    arg, path="imagenet", tokenizer="runs/vqgan", batch_size=4096, color=False, debug=False, tiny=False
  )
  config = full(args)
  if not (args.tiny or args.debug):
    return config
  # The small versions bring a tokenizer stage of their own.
  quickstart = config_lib.load(f"{pathlib.Path(__file__).with_name('quickstart.py')}:debug={args.debug}")
  shrink(config, quickstart.mage)
  return ml_collections.ConfigDict(
    dict(stages=("tokenizer", "mage_c"), tokenizer=quickstart.tokenizer.to_dict(), mage_c=config.to_dict())
  )


def full(args) -> ml_collections.ConfigDict:
  color = "|color_jitter(0.4, 0.4, 0.4, 0.1)|grayscale(0.2)" if args.color else ""
  return ml_collections.ConfigDict(
    dict(
      seed=0,
      batch_size=args.batch_size,
      total_epochs=1600.0,
      log_every_steps=100,
      checkpoint=dict(save_steps=5000, save_minutes=15.0, keep=2),
      data=dict(
        source=f"folder:{args.path}",
        split="train",
        eval_split="val",
        preprocess=f"two_views|decode(3)|random_resized_crop(256, (0.2, 1.0))|flip_lr{color}",
        eval_preprocess="decode(3)|resize_small(292)|center_crop(256)",
      ),
      pretrained=dict(tokenizer=args.tokenizer),
      objective=dict(
        name="mage_c",
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
        width=768,
        depth=12,
        heads=12,
        decoder_width=768,
        decoder_depth=8,
        decoder_heads=16,
        dropout=0.1,
        dtype="bfloat16",
        # One block is compiled for all.
        scan=True,
        mask_ratio=dict(mean=0.55, std=0.25, low=0.5, high=1.0),
        label_smoothing=0.1,
        contrastive_weight=0.1,
        temperature=0.2,
        projection_hidden=2048,
        projection_width=128,
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
      mesh=dict(data=-1, fsdp=1, tensor=1),
      # Where parameters live on a mesh: (regex over paths, the mesh axis of each dimension). An axis of size
      # 1 does nothing; what no rule names is split over fsdp where it is large.
      sharding=(
        ("^frozen/", ()),
        ("/(query|key|value|up)/kernel$", ("fsdp", "tensor")),
        ("/(query|key|value|up)/bias$", ("tensor",)),
        ("/(out|down)/kernel$", ("tensor", "fsdp")),
        ("(embedding|position)$", (None, "fsdp")),
      ),
    )
  )


def shrink(config: ml_collections.ConfigDict, small: ml_collections.ConfigDict) -> None:
  """Keeps the recipe and takes data, network sizes and lengths from the quickstart."""
  del config.total_epochs, config.optimizer.main.warmup_epochs
  for key in ("batch_size", "total_steps", "checkpoint", "data", "pretrained", "evals", "log_every_steps"):
    config[key] = small[key]
  config.data.preprocess = "two_views|" + config.data.preprocess
  for key in ("image_size", "width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads"):
    config.objective[key] = small.objective[key]
  config.objective.update(tokenizer=small.objective.tokenizer, sampling=small.objective.sampling)
  config.objective.update(projection_hidden=256, projection_width=64)
  config.objective.dtype = config.objective.tokenizer.dtype = "float32"
  config.optimizer.main.warmup_steps = small.optimizer.main.warmup_steps
  # A run this short needs larger steps than the linear-scaling rule gives.
  config.optimizer.main.base_learning_rate = small.optimizer.main.learning_rate * 256 / small.batch_size
