"""Tokenizer, then MAGE, on a folder of your own pictures at 256 pixels, on one GPU.

  python -m maskgen.main --config=configs/folder_256.py:path=/my/pictures --workdir=runs/mine

`path` is a folder of pictures, flat or with one sub-folder per class; a tenth is held out for evaluation,
unless there are sub-folders `train` and `test`. docs/your_pictures.md describes all supported data.

Hardware: one GPU of 16 to 24 GB, about a day for each stage. The authors of this file have only run `:tiny`:
600 photos took 11 minutes on 2 shared CPU cores; expect 20 dB, 95% of 256 codes in use, blurred patches of
the right colours, and a probe well above the random encoder's (27% and 16%).

Arguments:
  :path        the folder
  :tiny        the same at 64 pixels with small networks, in CPU minutes: blurred, but learning
  :debug       2 steps of each stage, tiny networks, synthetic pictures
  :scale       the minimum fraction of a picture that MAGE's crops cover; raise it if objects must stay whole
  :flip        whether mirrored pictures are as valid as the originals
  :labels      whether there are classes; adds a linear probe of the features
  :perceptual  export of a feature network for a perceptual loss, which makes reconstructions sharper
  :tokens      a token cache of the pictures; trains only MAGE, with the `tokenizer` that made the cache
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = config_lib.parse_arg(
    arg,
    path="pictures",
    tiny=False,
    debug=False,
    scale=0.5,
    flip=True,
    labels=False,
    perceptual="",
    tokens="",
    tokenizer="",
  )
  args.size = 32 if args.debug else 64 if args.tiny else 256
  config = ml_collections.ConfigDict(
    dict(stages=("tokenizer", "mage"), tokenizer=tokenizer(args), mage=mage(args))
  )
  if args.tiny or args.debug:
    shrink(config)
  if args.debug:
    for run in (config.tokenizer, config.mage):
      run.update(batch_size=8, total_steps=2, log_every_steps=1)
      run.objective.tokenizer.update(channels=8, multipliers=(1, 1), strides=(8,))
    config.mage.objective.update(width=16, depth=1, decoder_width=16, decoder_depth=1)
    config.mage.objective.sampling.steps = 2
    config.tokenizer.optimizer.generator.warmup_steps = config.mage.optimizer.main.warmup_steps = 0
  if args.tokens:
    config.mage.data.update(
      source=f"tokens:{args.tokens}", preprocess="take_crop", eval_source=f"folder:{args.path}"
    )
    config.mage.pretrained.tokenizer = args.tokenizer
    return config.mage
  return config


def pictures(args, scale: float) -> dict:
  return dict(
    source="synthetic" if args.debug else f"folder:{args.path}",
    preprocess=f"decode(3)|random_resized_crop({args.size}, ({scale}, 1.0)){'|flip_lr' * args.flip}",
    eval_preprocess=f"decode(3)|resize_small({args.size})|center_crop({args.size})",
  )


# Encodes 256 x 256 pixels as 16 x 16 tokens.
NETWORK = dict(channels=96, multipliers=(1, 1, 2, 2, 4), strides=(2, 2, 2, 2), blocks=2)
NETWORK |= dict(codebook_size=1024, code_width=32, normalize_codes=True, dtype="bfloat16")
TRANSFORMER = dict(width=512, depth=12, heads=8, decoder_width=512, decoder_depth=6, decoder_heads=8)


def tokenizer(args) -> dict:
  return dict(
    batch_size=32,
    accumulation=4,
    total_steps=150_000,
    data=pictures(args, 0.8),
    pretrained=dict(perceptual=args.perceptual) if args.perceptual else dict(),
    objective=dict(
      name="tokenizer",
      image_size=(args.size, args.size),
      tokenizer=dict(NETWORK),
      discriminator=dict(channels=64, max_channels=512, blocks=5, dtype="bfloat16"),
      l2_weight=1.0,
      perceptual_weight=0.1 if args.perceptual else 0.0,
      entropy_weight=0.0,
      revive_weight=1.0,
      adversarial_weight=0.1,
      adversarial_start=20_000,
    ),
    optimizer=dict(
      generator=dict(learning_rate=2e-4, warmup_steps=2000, b2=0.99),
      discriminator=dict(learning_rate=2e-4, schedule="constant", b1=0.0, b2=0.99),
    ),
    ema=dict(generator=0.999),
    evals=dict(reconstruction=dict(type="reconstruction", every_steps=5000, first_step=500)),
  )


def mage(args) -> dict:
  evals = dict(
    validation=dict(type="loss", every_steps=10_000),
    samples=dict(type="samples", every_steps=10_000, first_step=1000, num_generated=64, num_examples=8),
  )
  if args.labels:
    evals["probe"] = dict(type="probe", every_steps=10_000)
  return dict(
    batch_size=64,
    total_steps=200_000,
    data=pictures(args, args.scale),
    pretrained=dict(tokenizer="stage:tokenizer"),
    objective=dict(
      name="mage",
      image_size=(args.size, args.size),
      tokenizer=dict(NETWORK),
      **TRANSFORMER,
      dtype="bfloat16",
      sampling=dict(steps=20, schedule="cosine", temperature=6.0),
    ),
    optimizer=dict(
      main=dict(learning_rate=3e-4, warmup_steps=5000, b2=0.95, weight_decay=0.05, clip_norm=3.0)
    ),
    ema=dict(main=0.9999),
    evals=evals,
  )


def shrink(config: ml_collections.ConfigDict) -> None:
  """Small networks and lengths; 8 x 8 tokens for 64 pixels; no adversarial loss, which needs longer runs."""
  small = dict(channels=16, multipliers=(1, 2, 2, 4), strides=(2, 2, 2), blocks=1, norm_groups=8)
  for run in (config.tokenizer, config.mage):
    run.objective.tokenizer.update(small, codebook_size=256, code_width=16, dtype="float32")
    for evaluation in run.evals.values():
      evaluation.every_steps = 300
  config.tokenizer.update(batch_size=16, accumulation=1, total_steps=600)
  config.tokenizer.objective.update(adversarial_weight=0.0, l2_weight=10.0)
  del config.tokenizer.optimizer.discriminator
  config.tokenizer.optimizer.generator.update(learning_rate=4e-3, warmup_steps=50)
  config.mage.update(batch_size=32, total_steps=900)
  config.mage.objective.update(width=96, depth=4, heads=4, decoder_width=96, decoder_depth=2, decoder_heads=4)
  config.mage.objective.update(dropout=0.0, label_smoothing=0.0, dtype="float32")
  config.mage.objective.sampling.temperature = 3.0
  config.mage.optimizer.main.update(learning_rate=1.5e-3, warmup_steps=100)
  config.tokenizer.ema.generator = config.mage.ema.main = 0.99
