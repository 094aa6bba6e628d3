"""MaskGIT's tokenizer on ImageNet at 256 pixels: 16 x 16 tokens of 1,024 codes.

  python -m maskgen.main --config=configs/vqgan_imagenet.py:path=/data/imagenet --workdir=runs/vqgan

`path` is a folder with `train` and `val`, each with one sub-folder per class. The perceptual loss needs a
network: convert one first (see `maskgen.tools.convert --help`) and pass it as `perceptual=DIR`; without it
the weight of that loss is 0.

Hardware: a TPU slice or 8 GPUs for the published batch of 256; 1 M steps. float32, as published, needs twice
the memory of bfloat16: `--config.objective.remat=full` and `--config.accumulation=N` save some. For the
published recipe the literature reports a reconstruction FID of about 3 (Chang et al. 2022; LTH14/mage, issue
6); without `perceptual`, or with another network, expect worse. The authors of this file have only run
`:tiny`, not the full recipe.

Comments say where each value is published: "config" is `vqgan_config.py` of google-research/maskgit, which
builds on `base_config.py`, "code" its networks, and "MAGVIT" the training code of google-research/magvit,
because that of MaskGIT is not public. Nor are the weights of MAGVIT's ResNet-50: those of torchvision take
their place, with the normalisation of pixels that they were trained with.

Arguments:
  :tiny         this recipe on the embedded digits, minutes on 2 cores: expect 20 dB and all
                codes used; in short runs the entropy term outweighs the others (the quickstart, with
                other weights, reaches 25 dB)
  :debug        2 steps on synthetic pictures
  :augmentation that of the two published tokenizers: weak (the default; random resized crops of 80-100% of
                the area) gives MAGE a better FID, strong (20-100%) a better linear probe. The numbers of
                MAGE's paper are those of the strong one, unless it says otherwise
  :network      the feature network in `perceptual`: resnet50 (the default, as published), vgg16 or
                mobilenet_v2, which are compared by normalised features of all resolutions
  :batch_size   examples per step
"""

import ml_collections

from maskgen import config as config_lib

# The minimum fraction of a picture's area that a crop covers. Published: one tokenizer of each kind, without
# code (LTH14/mage, issue 6).
CROPS = {"weak": 0.8, "strong": 0.2}
# How features of each network are compared. Published: resnet50, last_map (MAGVIT). Ours: the others.
DISTANCES = {"resnet50": "last_map", "vgg16": "all_maps", "mobilenet_v2": "all_maps"}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = config_lib.parse_arg(
    arg,
    path="imagenet",
    perceptual="",
    network="resnet50",
    augmentation="weak",
    debug=False,
    tiny=False,
    batch_size=256,
  )
  share = config_lib.choose("augmentation", args.augmentation, CROPS)
  distance = config_lib.choose("network", args.network, DISTANCES)
  config = ml_collections.ConfigDict(
    dict(
      batch_size=args.batch_size,  # published: 256 (config)
      total_steps=1_000_000,  # published: config
      log_every_steps=100,  # ours
      checkpoint=dict(save_steps=5000, save_minutes=15.0, keep=2),  # ours
      data=dict(
        source=f"folder:{args.path}",
        split="train",
        eval_split="val",
        preprocess=f"decode(3)|random_resized_crop(256, ({share}, 1.0))|flip_lr",  # see CROPS
        eval_preprocess="decode(3)|resize_small(256)|center_crop(256)",  # ours
      ),
      pretrained=dict(perceptual=args.perceptual) if args.perceptual else dict(),
      objective=dict(
        name="tokenizer",
        image_size=(256, 256),  # published: config
        tokenizer=dict(
          channels=128,  # published: config, as the next five
          multipliers=(1, 1, 2, 2, 4),
          strides=(2, 2, 2, 2),
          blocks=2,
          codebook_size=1024,
          code_width=256,
          shortcut="input",  # ours; published: "reference" (code)
          dtype="float32",  # published: base_config.py
        ),
        discriminator=dict(
          channels=64,  # published: code, as the next three; ours: it scales pixels to [-1, 1]
          max_channels=512,
          blocks=6,
          kernel_init="xavier_uniform",
          dtype="float32",  # published: base_config.py
        ),
        l2_weight=1.0,  # published: MAGVIT
        perceptual_weight=0.1 if args.perceptual else 0.0,  # published: config
        perceptual_network=args.network,  # published: resnet50 (MAGVIT)
        perceptual_loss=distance,  # published: features, not logits (config), their squared error (MAGVIT)
        codebook_weight=1.0,  # published: code
        commitment_weight=0.25,  # published: config, as the next two
        entropy_weight=0.1,
        entropy_temperature=0.01,
        adversarial_loss="logistic",  # published: config ("non-saturating")
        adversarial_weight=0.1,  # published: config
        adversarial_start=0,  # no start is published, and MAGVIT's loss applies from the first step
        r1_weight=10.0,  # published: config
      ),
      optimizer=dict(  # published: config; its schedule is in base_config.py
        generator=dict(learning_rate=1e-4, schedule="constant", b1=0.0, b2=0.99),
        discriminator=dict(learning_rate=1e-4, schedule="constant", b1=0.0, b2=0.99),
      ),
      ema=dict(generator=0.999),  # published: base_config.py
      evals=dict(reconstruction=dict(type="reconstruction", every_steps=10_000)),  # published: config
    )
  )
  if args.tiny:
    shrink(config)
  if args.debug:
    shrink_further(config)
  return config


def shrink(config: ml_collections.ConfigDict) -> None:
  """Keeps the recipe and takes digits, network sizes and lengths from the quickstart."""
  small = config_lib.load_beside(__file__, "quickstart.py").tokenizer
  for key in ("batch_size", "log_every_steps", "checkpoint", "data", "evals"):
    config[key] = small[key]
  for key in ("image_size", "tokenizer", "discriminator", "adversarial_start"):
    config.objective[key] = small.objective[key]
  config.objective.tokenizer.normalize_codes = False
  config.total_steps = 1000
  config.optimizer.generator.learning_rate = config.optimizer.discriminator.learning_rate = 2e-3


def shrink_further(config: ml_collections.ConfigDict) -> None:
  """Two steps of a tiny network on synthetic pictures."""
  config.batch_size, config.total_steps = 8, 2
  config.data.source, config.data.eval_split = "synthetic", "test"
  config.data.preprocess = config.data.eval_preprocess = "decode(3)|resize(16)"
  config.objective.image_size = (16, 16)
  config.objective.tokenizer.update(channels=8, multipliers=(1, 1), strides=(4,), blocks=1)
  config.objective.tokenizer.update(codebook_size=32, code_width=8, norm_groups=4)
  config.objective.discriminator.update(channels=4, max_channels=8, blocks=1)
