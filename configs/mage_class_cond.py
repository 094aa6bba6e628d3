"""Class-conditional MAGE, ViT-B, on ImageNet at 256 pixels (Li et al. 2023, appendix A.2).

  python -m maskgen.main --config=configs/mage_class_cond.py:path=/data/imagenet,mage=runs/mage_base \
    --workdir=runs/mage_class_cond

`path` is a folder with `train` and `val`, each with one sub-folder per class; `mage` the workdir or export
of a model trained by `mage_base.py`. Its encoder is frozen, and its features stay what they are; its decoder
is trained on, and told the class of each image.

  python -m maskgen.tools.generate --model=runs/mage_class_cond --label=207,250 --guidance=3 --out=dogs.png

Hardware: as for `mage_base.py`; no gradient goes through the encoder, so steps are cheaper than there.
Expect: the paper's authors did not publish the length and learning rate of this stage; here they are a tenth
of the pre-training's epochs, at its rate. This full recipe has not been run by the authors of this file;
`:tiny` has.

Arguments:
  :tiny          the stages of the quickstart, then 1,500 steps of this recipe on the same digits: expect a
                 classifier of real digits to see the class that was asked for in 98% of the images, and a
                 Frechet distance of 0.61 (without classes 0.85)
  :debug         2 steps of each on synthetic pictures
  :accumulation  micro-batches per step, for fewer devices
  :batch_size    examples per step; the learning rate follows it
"""

import pathlib

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = config_lib.parse_arg(
    arg, path="imagenet", mage="runs/mage_base", batch_size=4096, accumulation=1, debug=False, tiny=False
  )
  config = full(args)
  if not (args.tiny or args.debug):
    return config
  # The small versions bring the stages before this one.
  quickstart = config_lib.load(f"{pathlib.Path(__file__).with_name('quickstart.py')}:debug={args.debug}")
  shrink(config, quickstart.mage)
  config.total_steps = 2 if args.debug else 1500
  stages = {**quickstart.to_dict(), "mage_class_cond": config.to_dict()}
  return ml_collections.ConfigDict({**stages, "stages": ("tokenizer", "mage", "mage_class_cond")})


def full(args) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(
      seed=0,
      batch_size=args.batch_size,
      accumulation=args.accumulation,
      total_epochs=160.0,
      log_every_steps=100,
      checkpoint=dict(save_steps=5000, save_minutes=15.0, keep=2),
      data=dict(
        source=f"folder:{args.path}",
        split="train",
        eval_split="val",
        preprocess="decode(3)|random_resized_crop(256, (0.2, 1.0))|flip_lr",
        eval_preprocess="decode(3)|resize_small(292)|center_crop(256)",
      ),
      pretrained=dict(mage=args.mage),
      objective=dict(
        name="mage_conditional",
        image_size=(256, 256),
        classes=1000,
        condition_width=768,
        condition_dropout=0.1,
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
        sampling=dict(steps=20, schedule="cosine", temperature=6.0, guidance=3.0, guidance_schedule="linear"),
      ),
      optimizer=dict(
        main=dict(
          base_learning_rate=1.5e-4, warmup_epochs=4.0, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=3.0
        )
      ),
      ema=dict(main=0.999),
      evals=dict(
        validation=dict(type="loss", every_steps=10_000),
        samples=dict(type="samples", every_steps=10_000),
      ),
      mesh=dict(data=-1, fsdp=1, tensor=1),
      # Where parameters live on a mesh: (regex over paths, the mesh axis of each dimension). An axis of size
      # 1 does nothing; what no rule names is split over fsdp where it is large.
      sharding=(
        ("^frozen/tokenizer/", ()),
        ("/(query|key|value|up)/kernel$", ("fsdp", "tensor")),
        ("/(query|key|value|up)/bias$", ("tensor",)),
        ("/(out|down)/kernel$", ("tensor", "fsdp")),
        ("(embedding|position)$", (None, "fsdp")),
      ),
    )
  )


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
  config.pretrained.mage = "stage:mage"
  config.optimizer.main = small.optimizer.main
  config.evals = {name: small.evals[name] for name in ("validation", "generation", "samples")}
