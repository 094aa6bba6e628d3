"""Tokenizer (f = 4), then MAGE, on CIFAR-10 or pictures like it: 32 pixels, 8 x 8 tokens.

  python -m maskgen.tools.prepare_data --name=cifar10
  python -m maskgen.main --config=configs/mage_cifar.py --workdir=runs/cifar

Hardware: one GPU of 8 GB or more; a few hours for each stage. The full length has not been run by the authors
of this file, `:tiny` has, on a folder of 3,600 CIFAR images, in 20 minutes on 2 busy CPU cores: 21.4 dB with
all codes in use, and a probe of 40.5% (pixels 28%, random encoders 29%, one-hot tokens 35%).

Arguments:
  :source  a data source with classes, by default tfds:cifar10
  :path    a folder with one sub-folder per class, instead of `source`
  :objective  mage, or mage_c for MAGE-C: two views of each picture, and twice the time
  :tiny    smaller networks and CPU minutes; on the embedded digits, unless `source` or `path` is given
  :debug   2 steps of each stage, tiny networks, synthetic pictures
"""

import ml_collections

from maskgen.config import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = parse_arg(arg, source="", path="", objective="mage", tiny=False, debug=False, seed=0)
  args.small = args.tiny or args.debug
  if args.debug:
    args.source = "synthetic"
  elif args.path:
    args.source = f"folder:{args.path}"
  elif not args.source:
    args.source = "digits" if args.tiny else "tfds:cifar10"
  config = ml_collections.ConfigDict()
  config.stages = ("tokenizer", "mage")
  config.tokenizer = tokenizer(args)
  config.mage = mage(args)
  return config


def pictures(args, augment: str, views: str = "") -> dict:
  # Digits must not be mirrored, and other sources have pictures of several sizes.
  flip = "" if args.source == "digits" else "|flip_lr"
  plain = "decode(3)|resize(32)"
  return dict(source=args.source, preprocess=views + plain + augment + flip, eval_preprocess=plain)


def network(args) -> dict:
  """A VQGAN that makes 8 x 8 tokens of 32 x 32 pixels."""
  return dict(
    channels=16 if args.small else 96,
    multipliers=(1, 2, 4) if args.small else (1, 2, 2),
    strides=(2, 2),
    blocks=1 if args.small else 2,
    norm_groups=8 if args.small else 32,
    codebook_size=256 if args.small else 1024,
    code_width=16,
    normalize_codes=True,
    dtype="float32" if args.small else "bfloat16",
  )


def tokenizer(args) -> dict:
  steps = 2 if args.debug else 600 if args.tiny else 50_000
  return dict(
    seed=args.seed,
    batch_size=8 if args.debug else 64 if args.tiny else 256,
    total_steps=steps,
    log_every_steps=min(50, steps),
    checkpoint=dict(save_steps=min(1000, steps), save_minutes=5.0, keep=2),
    data=pictures(args, ""),
    objective=dict(
      name="tokenizer",
      image_size=(32, 32),
      tokenizer=network(args),
      discriminator=dict(channels=8 if args.small else 64, max_channels=32 if args.small else 256, blocks=3),
      l2_weight=10.0,
      entropy_weight=0.0,
      revive_weight=1.0,
      adversarial_weight=0.0 if args.small else 0.03,
      adversarial_start=10_000,
      r1_weight=1.0,
    ),
    optimizer=dict(
      generator=dict(learning_rate=4e-3 if args.small else 5e-4, warmup_steps=min(steps // 2, 500), b2=0.99),
    )
    | (
      dict()
      if args.small
      else dict(discriminator=dict(learning_rate=5e-4, schedule="constant", b1=0.0, b2=0.99))
    ),
    ema=dict(generator=0.99 if args.small else 0.999),
    evals=dict(reconstruction=dict(type="reconstruction", every_steps=300 if args.small else 5000)),
    mesh=dict(data=-1, fsdp=1, tensor=1),
  )


def mage(args) -> dict:
  steps = 2 if args.debug else 1000 if args.tiny else 200_000
  every = 500 if args.small else 10_000
  views = "two_views|" if args.objective == "mage_c" else ""
  return dict(
    seed=args.seed,
    batch_size=8 if args.debug else 64 if args.tiny else 256,
    total_steps=steps,
    log_every_steps=min(100, steps),
    checkpoint=dict(save_steps=min(1000, steps), save_minutes=5.0, keep=2),
    data=pictures(args, "|pad(2, 'reflect')|random_crop(32)", views),
    pretrained=dict(tokenizer="stage:tokenizer"),
    objective=dict(
      name=args.objective,
      image_size=(32, 32),
      tokenizer=network(args),
      width=96 if args.small else 384,
      depth=4 if args.small else 12,
      heads=4 if args.small else 6,
      decoder_width=96 if args.small else 384,
      decoder_depth=2 if args.small else 6,
      decoder_heads=4 if args.small else 6,
      dropout=0.0 if args.small else 0.1,
      label_smoothing=0.0 if args.small else 0.1,
      dtype="float32" if args.small else "bfloat16",
      mask_ratio=dict(mean=0.55, std=0.25, low=0.5, high=1.0),
      sampling=dict(steps=20, schedule="cosine", temperature=3.0),
    ),
    optimizer=dict(
      main=dict(
        learning_rate=1.5e-3 if args.small else 6e-4,
        warmup_steps=min(steps // 2, 100 if args.small else 5000),
        b2=0.95,
        weight_decay=0.05,
        clip_norm=3.0,
      ),
    ),
    ema=dict(main=0.99 if args.small else 0.9999),
    evals=dict(
      validation=dict(type="loss", every_steps=every),
      probe=dict(type="probe", every_steps=every, baselines=False),
      generation=dict(type="generation", every_steps=every, num_images=16 if args.debug else 1000),
      samples=dict(type="samples", every_steps=every, num_generated=64),
    ),
    mesh=dict(data=-1, fsdp=1, tensor=1),
    # Where parameters live on a mesh: (regex over paths, the mesh axis of each dimension).
    sharding=(
      ("^frozen/", ()),
      ("/(query|key|value|up)/kernel$", ("fsdp", "tensor")),
      ("/(query|key|value|up)/bias$", ("tensor",)),
      ("/(out|down)/kernel$", ("tensor", "fsdp")),
      ("(embedding|position)$", (None, "fsdp")),
    ),
  )
