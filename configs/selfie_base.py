"""Selfie, ViT-B/32, on ImageNet at 224 pixels: which of the masked patches of a picture belongs where.

  python -m maskgen.main --config=configs/selfie_base.py:path=/data/imagenet --workdir=runs/selfie_base

`path` is that of `mae_base.py`.

Hardware: as for `mae_base.py`; a picture has 49 patches. The authors (Trinh et al. 2019) pretrain the first
blocks of a ResNet-50, which after fine-tuning on 5% of ImageNet's labels reaches 46.7% top-1, against 35.6%
without pretraining. Their code is not public: only the size of the patches is theirs, other numbers are MAE's
or our choice. With --config.objective.pooled=True queries are theirs as well, see the objective. Only
`:debug` has been run.

Arguments:
  :tiny    on the embedded digits, in patches of 4 pixels
  :debug   2 steps on synthetic pictures
  :epochs, :batch_size, :accumulation   as of `mae_base.py`
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  mae = dict(path="imagenet", epochs=800.0, batch_size=4096, accumulation=1, debug=False, tiny=False)
  args = config_lib.parse_arg(arg, **mae)
  config = config_lib.load_beside(__file__, "mae_base.py", **vars(args))
  del config.objective.normalize_targets
  config.objective.update(name="selfie", mask_ratio=0.25)
  config.objective.encoder.patch = 4 if args.debug or args.tiny else 32
  return config
