"""UMD, ViT-B/4, on ImageNet at 64 pixels: masked autoencoding and diffusion in one network.

  python -m maskgen.main --config=configs/umd_base.py:path=/data/imagenet --workdir=runs/umd_base
  python -m maskgen.main --config=configs/umd_base.py:path=/data/imagenet,init_from=runs/umd_base \
    --workdir=runs/umd_base_classes

`path` is a folder with `train` and `val`, each with one sub-folder per class. The second command trains 50
more epochs with classes and nothing masked, after which the model generates images by class.

Hardware: 8 accelerators of 40 GB or more, for the published batch of 1,024; 800 epochs, a million steps. The
authors (Hansen-Estruch et al. 2024) report 31.8% for a linear probe on 100 examples of each class, where a
MAE of this size has 36.6% and a DiT 25.6%; and, with classes, an FID of 19.8 on 10,000 images, where these
have 26.8 and 18.9. The authors of this file have only run `:debug`, by hand.

From the authors' code (philippe-eecs/small-vision): networks, losses, shares, mask ratios, noise, optimizer.
Different here: registers start at random, since at 0 they would all remain the same; sampling adds no noise
of its own (DDIM); pictures are resized with antialiasing.

Arguments:
  :tiny          this recipe on the embedded digits
  :debug         2 steps on synthetic pictures
  :init_from     a run to continue with classes, see above
  :epochs        800 in the paper; with `init_from` 50
  :batch_size, :accumulation   examples and micro-batches per step; the learning rate scales with the former
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  given = dict(path="imagenet", epochs=0.0, batch_size=0, accumulation=1)
  args = config_lib.parse_arg(arg, init_from="", debug=False, tiny=False, **given)
  small, classes = args.debug or args.tiny, bool(args.init_from)
  config = config_lib.load_beside(__file__, "mae_base.py", path=args.path, debug=args.debug, tiny=args.tiny)
  encoder = config.objective.encoder
  for key in ("pooling", "fixed_positions", "activation", "mean", "std"):
    del encoder[key]
  config.objective = dict(
    name="umd",
    encoder=encoder,
    decoder_depth=config.objective.decoder_depth if small else 4,
    clean_share=0.5 if not classes else 0.125 if args.debug else 0.05,  # of few examples in a batch
    clean_mask_ratio=0.75,
    mask_ratio=0.0 if classes else 0.375,
    label_dropout=0.1,
    schedule=dict(betas="cosine", spacing="trailing", clean_end=True),
    sampling=dict(steps=2 if args.debug else 25 if args.tiny else 125, sampler="ddim", guidance=2.0),
  )
  config.optimizer.main.update(weight_decay=0.0 if classes else 0.05, clip_norm=1.0)
  config.evals.samples = dict(type="samples", every_steps=25_000, num_generated=16 if small else 64)
  if classes:
    config.update(init_from=args.init_from, init_fresh="condition/label")
    config.optimizer.main.b2 = 0.999
    config.ema = dict(main=0.9999)
  if small:
    config.objective.classes = 10 if classes else 0
    return config
  config.batch_size = args.batch_size or (256 if classes else 1024)
  config.total_epochs = args.epochs or (50.0 if classes else 800.0)
  config.accumulation = args.accumulation
  config.optimizer.main.warmup_epochs = config.total_epochs / 20
  config.objective.classes = 1000 if classes else 0
  area = 0.95 if classes else 0.8
  config.data.preprocess = f"decode(3)|random_resized_crop(64, ({area}, 1.0))|flip_lr"
  config.data.eval_preprocess = "decode(3)|resize_small(64)|center_crop(64)"
  encoder.update(image_size=(64, 64), patch=4)
  return config
