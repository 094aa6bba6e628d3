"""Tokenizer, then MAGE, on scikit-learn's 1,797 handwritten digits; no download.

python -m maskgen.main --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: two CPU cores and 2 GB of memory; less than 10 minutes.
Expect: about 25 dB on held-out digits with all 128 codes in use; a probe of about 95% (raw pixels 96%, random
encoders 67%); generated digits at about 0.4 of the Frechet distance of random codes. README.md has all
numbers, and docs/faq.md describes how losses, code usage and pictures of a healthy run develop.

Arguments:
  :seed   the seed of everything
  :tiny   a minute of training, to try everything
  :debug  2 steps of each stage, tiny networks, synthetic pictures
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = config_lib.parse_arg(arg, debug=False, tiny=False, seed=0)
  config = ml_collections.ConfigDict()
  config.stages = ("tokenizer", "mage")
  config.tokenizer = tokenizer(args)
  config.mage = mage(args)
  return config


def pictures(args, augment: str = "") -> dict:
  """The digits at 16 x 16 pixels."""
  plain = "decode(3)|resize(16)"
  source = "synthetic" if args.debug else "digits"
  return dict(source=source, preprocess=plain + augment, eval_preprocess=plain)


def network(args) -> dict:
  """A VQGAN that encodes 16 x 16 pixels as 4 x 4 tokens."""
  return dict(
    channels=8 if args.debug else 16,
    multipliers=(1, 1) if args.debug else (1, 2, 4),
    strides=(4,) if args.debug else (2, 2),
    blocks=1,
    norm_groups=8,
    codebook_size=128,
    code_width=16,
    normalize_codes=True,
  )


def tokenizer(args) -> dict:
  steps = 2 if args.debug else 60 if args.tiny else 600
  return dict(
    seed=args.seed,
    batch_size=8 if args.debug else 64,
    total_steps=steps,
    log_every_steps=min(50, steps),
    checkpoint=dict(save_steps=300, save_minutes=5.0, keep=2),
    data=pictures(args),
    objective=dict(
      name="tokenizer",
      image_size=(16, 16),
      tokenizer=network(args),
      discriminator=dict(channels=8, max_channels=32, blocks=1 if args.debug else 2),
      l2_weight=10.0,
      entropy_weight=0.0,
      revive_weight=1.0,
      adversarial_weight=0.03,
      adversarial_start=200,
      r1_weight=0.1,
    ),
    optimizer=dict(
      generator=dict(learning_rate=8e-3, warmup_steps=0 if args.debug else 50),
      discriminator=dict(learning_rate=1e-3, schedule="constant", b1=0.0, b2=0.99),
    ),
    ema=dict(generator=0.99),
    evals=dict(reconstruction=dict(type="reconstruction", every_steps=300, first_step=100)),
  )


def mage(args) -> dict:
  steps = 2 if args.debug else 200 if args.tiny else 3000
  every = 1000
  return dict(
    seed=args.seed,
    batch_size=8 if args.debug else 64,
    total_steps=steps,
    log_every_steps=min(100, steps),
    checkpoint=dict(save_steps=500, save_minutes=5.0, keep=2),
    # Digits this small tolerate no other augmentation than shifts by whole pixels.
    data=pictures(args, "|pad(1)|random_crop(16)"),
    pretrained=dict(tokenizer="stage:tokenizer"),
    objective=dict(
      name="mage",
      image_size=(16, 16),
      tokenizer=network(args),
      width=16 if args.debug else 96,
      depth=1 if args.debug else 4,
      heads=4,
      decoder_width=16 if args.debug else 96,
      decoder_depth=1 if args.debug else 2,
      decoder_heads=4,
      # Masking regularizes enough here, and label smoothing would make a tenth of all samples random codes.
      dropout=0.0,
      label_smoothing=0.0,
      mask_ratio=dict(mean=0.55, std=0.25, low=0.5, high=1.0),
      sampling=dict(steps=2 if args.debug else 16, schedule="cosine", temperature=2.5),
    ),
    optimizer=dict(
      main=dict(
        learning_rate=1.5e-3,
        warmup_steps=0 if args.debug else 100,
        b2=0.95,
        weight_decay=0.05,
        clip_norm=3.0,
      ),
    ),
    sharding=(("^frozen/", ()), *config_lib.TRANSFORMER_RULES),
    ema=dict(main=0.999),
    evals=dict(
      validation=dict(type="loss", every_steps=every),
      probe=dict(type="probe", every_steps=every, baselines=not args.debug),
      generation=dict(
        type="generation", every_steps=every, num_images=16 if args.debug else 500, classifier="svc"
      ),
      # A central hole in 4 x 4 tokens, with the ring around it, would leave no visible token.
      samples=dict(type="samples", every_steps=every, first_step=200, masks=("corner", "right", "lower")),
    ),
  )
