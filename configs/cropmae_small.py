"""CropMAE, ViT-S/16, on ImageNet at 224 pixels: a crop from 2 of its 196 patches and the picture around it.

  python -m maskgen.main --config=configs/cropmae_small.py:path=/data/imagenet --workdir=runs/cropmae_small

`path` is a folder with `train` and `val`, each with one sub-folder per class.

Hardware: 16 GPUs in the authors' script, for the published batch of 2,048; 400 epochs, 250,000 steps. The
paper (Eymaël et al. 2024) evaluates by propagating labels through films, which is not part of maskgen. The
authors of this file have not run the full recipe.

For SiamMAE, use data of two frames with objective.mask_ratio=0.95; for CroCo
objective.decoder_order=("self", "cross", "mlp"), decoder_post_norm=False and decoder_dropout=0.

Arguments:
  :tiny          this recipe on the embedded digits
  :debug         2 steps on synthetic pictures
  :epochs        400 in the paper
  :batch_size, :accumulation   examples and micro-batches per step; the learning rate scales with the former
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  given = dict(path="imagenet", epochs=400.0, batch_size=2048, accumulation=1)
  args = config_lib.parse_arg(arg, debug=False, tiny=False, **given)
  small = dict(debug=args.debug, tiny=args.tiny)
  config = config_lib.load_beside(__file__, "mae_base.py", path=args.path, **small)
  config.objective.update(
    name="two_view",
    decoder_hidden=2048,
    decoder_order=("cross", "mlp", "self"),
    decoder_post_norm=True,
    decoder_dropout=0.1,
    mask_ratio=0.985,
  )
  if args.debug or args.tiny:
    # Of 64 patches; the data's own crops come before the second one.
    config.objective.update(mask_ratio=0.95, decoder_hidden=4 * config.objective.decoder_width)
    side = config.objective.encoder.image_size[0]
    for key in ("preprocess", "eval_preprocess"):
      config.data[key] += f"|second_crop({side}, (0.3, 0.6), flip=0.0)"
    return config
  config.update(batch_size=args.batch_size, accumulation=args.accumulation, total_epochs=args.epochs)
  second = "second_crop(224, (0.3, 0.6))"
  config.data.preprocess = f"decode(3)|random_resized_crop(224, (0.1, 1.0))|{second}|flip_lr"
  config.data.eval_preprocess += f"|{second}"
  config.objective.encoder.update(width=384, heads=6)
  config.objective.update(decoder_width=256, decoder_depth=4, decoder_heads=8)
  config.optimizer.main.update(base_learning_rate=1e-4, warmup_epochs=args.epochs / 20)
  return config
