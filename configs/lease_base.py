"""LEASE, ViT-B, on ImageNet at 256 pixels: MAGE taught by clusters of a frozen encoder's patches.

  python -m maskgen.tools.convert --format=dinov2 --weights=dinov2-base --image_size=224 \
    --out=weights/dinov2_base
  python -m maskgen.main --config=configs/lease_base.py:path=/data/imagenet,tokenizer=runs/vqgan \
    --workdir=runs/lease_base

`path` and `tokenizer` are those of `mage_base.py`. `teacher` is the workdir, export or converted folder of
any image encoder with a patch for each token, here 16 x 16, as a DINOv3 of --image_size=256 has; without it,
the config describes DINOv2 ViT-B/14.
With `teacher=own`, the moving average of the model itself teaches, which is nobody's published recipe.

Hardware: as for `mage_base.py`; with the teacher and the products with all centroids, a step has 1.22 times
the floating-point operations. The authors report a linear-probe accuracy of 76.7% and an FID of 9.62, and
75.0% and 10.88 for MAGE's own checkpoint. The authors of this file have only run `:debug` and some hundred
steps of `:tiny`, not the full recipe.

From the authors' code (ImaGonEs/LEASE): the loss with its weight 0.1, temperatures 0.1, 5 neighbours and 16k
clusters, fixed positions beside learned ones, and visible tokens added to the class position in the decoder.
Different here: their clusters are a file of another project, and each picture has the same codes and clusters
in every epoch; here the clusters are found during training, and pictures are cropped as for MAGE.

Arguments:
  :tiny          the stages of the quickstart, then this recipe with that MAGE as the teacher, on the same
                 digits
  :debug         2 steps of each on synthetic pictures
  :teacher       see above
  :accumulation, :batch_size, :size   as in mage_base.py
"""

import ml_collections

from maskgen import config as config_lib

DINOV2 = dict(
  name="vit",
  image_size=(224, 224),
  patch=14,
  width=768,
  depth=12,
  heads=12,
  hidden=3072,
  pooling="class",
  activation="gelu",
  epsilon=1e-6,
  layer_scale=True,
  mean=(0.485, 0.456, 0.406),
  std=(0.229, 0.224, 0.225),
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  given = dict(path="imagenet", tokenizer="runs/vqgan", size="base", batch_size=4096, accumulation=1)
  args = vars(config_lib.parse_arg(arg, teacher="", debug=False, tiny=False, **given))
  teacher, small = args.pop("teacher"), args["debug"] or args["tiny"]
  config = config_lib.load_beside(__file__, "mage_base.py", **args)
  lease = config.mage if small else config
  if teacher == "own":
    lease.ema = dict(main=0.996)
  else:
    described = dict(name="pretrained") if teacher or small else DINOV2
    lease.objective.teacher = described if small else dict(described, dtype="bfloat16", scan=True)
    lease.pretrained.teacher = teacher or ("stage:mage" if small else "weights/dinov2_base")
  lease.objective.update(
    name="lease",
    clusters=16_384,
    neighbours=5,
    contrastive_weight=0.1,
    temperature=0.1,
    neighbour_temperature=0.1,
    fixed_positions=True,
    add_visible=True,
  )
  if not small:
    return lease
  lease.objective.clusters = 8 if args["debug"] else 64
  stages = config_lib.load_beside(__file__, "quickstart.py", debug=args["debug"])
  if teacher:
    del stages.mage
  stages.update(stages=("tokenizer", "lease") if teacher else ("tokenizer", "mage", "lease"), lease=lease)
  return stages
