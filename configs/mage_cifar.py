"""Tokenizer (f = 4), then MAGE, on CIFAR-10 or similar pictures: 32 pixels, 8 x 8 tokens.

  python -m maskgen.tools.prepare_data --name=cifar10
  python -m maskgen.main --config=configs/mage_cifar.py --workdir=runs/cifar

Hardware: one GPU of 8 GB or more; a few hours for each stage. The authors of this file have only run `:tiny`,
on a folder of 3,600 CIFAR images, in 20 minutes on 2 busy CPU cores: 21.4 dB with all codes in use, and a
probe of 40.5% (pixels 28%, random encoders 29%, one-hot tokens 35%).

Arguments:
  :source  a data source with classes, by default tfds:cifar10
  :path    a folder with one sub-folder per class, instead of `source`
  :objective  mage, or mage_c for MAGE-C, which takes two views of each picture and twice the time
  :tiny    smaller networks, CPU minutes; on the embedded digits unless `source` or `path` is given
  :debug   2 steps of each stage, tiny networks, synthetic pictures
"""

import ml_collections

from maskgen import config as config_lib

# Encodes 32 x 32 pixels as 8 x 8 tokens.
NETWORK = dict(channels=96, multipliers=(1, 2, 2), strides=(2, 2), blocks=2, norm_groups=32)
NETWORK |= dict(codebook_size=1024, code_width=16, normalize_codes=True, dtype="bfloat16")
TRANSFORMER = dict(width=384, depth=12, heads=6, decoder_width=384, decoder_depth=6, decoder_heads=6)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = config_lib.parse_arg(arg, source="", path="", objective="mage", tiny=False, debug=False, seed=0)
  if args.debug:
    args.source = "synthetic"
  elif args.path:
    args.source = f"folder:{args.path}"
  elif not args.source:
    args.source = "digits" if args.tiny else "tfds:cifar10"
  config = ml_collections.ConfigDict(
    dict(stages=("tokenizer", "mage"), tokenizer=tokenizer(args), mage=mage(args))
  )
  if args.tiny or args.debug:
    shrink(config)
  if args.debug:
    for run, warmed_up in ((config.tokenizer, "generator"), (config.mage, "main")):
      run.update(batch_size=8, total_steps=2, log_every_steps=2)
      run.checkpoint.save_steps = 2
      run.optimizer[warmed_up].warmup_steps = 1
      run.objective.tokenizer.update(channels=8, multipliers=(1, 1), strides=(4,))
    config.mage.objective.update(width=16, depth=1, decoder_width=16, decoder_depth=1)
    config.mage.objective.sampling.steps = 2
    config.mage.evals.generation.num_images = config.mage.evals.probe.num_images = 16
  return config


def pictures(args, augment: str = "", views: str = "") -> dict:
  # Digits must not be mirrored, and other sources have pictures of various sizes.
  flip = "" if args.source == "digits" else "|flip_lr"
  plain = "decode(3)|resize(32)"
  return dict(source=args.source, preprocess=views + plain + augment + flip, eval_preprocess=plain)


def tokenizer(args) -> dict:
  return dict(
    seed=args.seed,
    batch_size=256,
    total_steps=50_000,
    log_every_steps=50,
    checkpoint=dict(save_steps=1000, save_minutes=5.0, keep=2),
    data=pictures(args),
    objective=dict(
      name="tokenizer",
      image_size=(32, 32),
      tokenizer=dict(NETWORK),
      discriminator=dict(channels=64, max_channels=256, blocks=3),
      l2_weight=10.0,
      entropy_weight=0.0,
      revive_weight=1.0,
      adversarial_weight=0.03,
      adversarial_start=10_000,
      r1_weight=1.0,
    ),
    optimizer=dict(
      generator=dict(learning_rate=5e-4, warmup_steps=500, b2=0.99),
      discriminator=dict(learning_rate=5e-4, schedule="constant", b1=0.0, b2=0.99),
    ),
    ema=dict(generator=0.999),
    evals=dict(reconstruction=dict(type="reconstruction", every_steps=5000)),
  )


def mage(args) -> dict:
  views = "two_views|" if args.objective == "mage_c" else ""
  return dict(
    seed=args.seed,
    batch_size=256,
    total_steps=200_000,
    log_every_steps=100,
    checkpoint=dict(save_steps=1000, save_minutes=5.0, keep=2),
    data=pictures(args, "|pad(2, 'reflect')|random_crop(32)", views),
    pretrained=dict(tokenizer="stage:tokenizer"),
    objective=dict(
      name=args.objective,
      image_size=(32, 32),
      tokenizer=dict(NETWORK),
      **TRANSFORMER,
      dropout=0.1,
      label_smoothing=0.1,
      dtype="bfloat16",
      mask_ratio=dict(mean=0.55, std=0.25, low=0.5, high=1.0),
      sampling=dict(steps=20, schedule="cosine", temperature=3.0),
    ),
    optimizer=dict(
      main=dict(learning_rate=6e-4, warmup_steps=5000, b2=0.95, weight_decay=0.05, clip_norm=3.0)
    ),
    ema=dict(main=0.9999),
    evals=dict(
      validation=dict(type="loss", every_steps=10_000),
      probe=dict(type="probe", every_steps=10_000, baselines=False),
      generation=dict(type="generation", every_steps=10_000, num_images=1000),
      samples=dict(type="samples", every_steps=10_000, num_generated=64),
    ),
    sharding=(("^frozen/", ()), *config_lib.TRANSFORMER_RULES),
  )


def shrink(config: ml_collections.ConfigDict) -> None:
  """Small networks and lengths; no adversarial loss, which needs longer runs."""
  for run, every in ((config.tokenizer, 300), (config.mage, 500)):
    run.batch_size = 64
    run.objective.tokenizer.update(channels=16, multipliers=(1, 2, 4), blocks=1, norm_groups=8)
    run.objective.tokenizer.update(codebook_size=256, dtype="float32")
    for evaluation in run.evals.values():
      evaluation.every_steps = every
  config.tokenizer.total_steps = config.tokenizer.checkpoint.save_steps = 600
  config.tokenizer.objective.discriminator.update(channels=8, max_channels=32)
  config.tokenizer.objective.adversarial_weight = 0.0
  del config.tokenizer.optimizer.discriminator
  config.tokenizer.optimizer.generator.update(learning_rate=4e-3, warmup_steps=300)
  config.mage.total_steps = 1000
  config.mage.objective.update(width=96, depth=4, heads=4, decoder_width=96, decoder_depth=2, decoder_heads=4)
  config.mage.objective.update(dropout=0.0, label_smoothing=0.0, dtype="float32")
  config.mage.optimizer.main.update(learning_rate=1.5e-3, warmup_steps=100)
  config.tokenizer.ema.generator = config.mage.ema.main = 0.99
