"""MaskAlign, ViT-B/16, on ImageNet at 224 pixels: visible patches learn what CLIP says of the whole picture.

  python -m maskgen.tools.convert --format=clip --weights=clip-vit-base-patch16 --out=weights/clip_base
  python -m maskgen.main --config=configs/mask_align_base.py:path=/data/imagenet --workdir=runs/mask_align

`path` is that of `mae_base.py`. `teacher` is the workdir, export or converted folder of any image encoder
with 14 x 14 patches; without it, the config describes CLIP's ViT-B/16, trained by OpenAI. A teacher that is
no ViT with a class position needs objective.by_attention=False, and one that is no ViT objective.blocks=1.

Hardware: 8 accelerators of 40 GB or more, for the published batch of 1,024; 200 epochs, 250,000 steps. The
authors (Xue et al. 2023) report 85.4% after fine-tuning. The authors of this file have only run `:debug`.

Arguments:
  :tiny          `mae_base.py:tiny`, then this recipe with that MAE as the teacher, on the same digits
  :debug         2 steps of each on synthetic pictures
  :teacher       see above
  :epochs        200 in the paper
  :batch_size, :accumulation   examples and micro-batches per step; the learning rate scales with the former
"""

import ml_collections

from maskgen import config as config_lib

CLIP = dict(
  name="vit",
  image_size=(224, 224),
  patch=16,
  width=768,
  depth=12,
  heads=12,
  hidden=3072,
  pooling="class",
  activation="quick_gelu",
  epsilon=1e-5,
  embedding_norm=True,
  patch_bias=False,
  mean=(0.48145466, 0.4578275, 0.40821073),
  std=(0.26862954, 0.26130258, 0.27577711),
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  given = dict(path="imagenet", epochs=200.0, batch_size=1024, accumulation=1)
  args = vars(config_lib.parse_arg(arg, teacher="", debug=False, tiny=False, **given))
  teacher, small = args.pop("teacher"), args["debug"] or args["tiny"]
  config = config_lib.load_beside(__file__, "mae_base.py", **args)
  mae = config.copy_and_resolve_references()
  described = dict(name="pretrained") if teacher or small else dict(CLIP, dtype="bfloat16", scan=True)
  config.objective = dict(
    name="mask_align",
    encoder=config.objective.encoder,
    teacher=described,
    mask_ratio=0.7,
    by_attention=True,
    blocks=mae.objective.encoder.depth if small else 5,
  )
  config.pretrained = dict(teacher=teacher or ("stage:mae" if small else "weights/clip_base"))
  del config.evals.samples
  if not small:
    config.objective.encoder.drop_path = 0.1
    config.optimizer.main.update(end_learning_rate=1e-5, warmup_epochs=args["epochs"] / 10)
    return config
  if teacher:
    return config
  return ml_collections.ConfigDict(dict(stages=("mae", "mask_align"), mae=mae, mask_align=config))
