"""ViLex with Stable Diffusion 1.5: images as words for its prompts (Wang et al. 2024).

  python -m maskgen.tools.convert --format=diffusers --weights=/models/sd15 --out=weights/sd15
  python -m maskgen.tools.convert --format=siglip --weights=/models/siglip.safetensors --out=weights/siglip
  python -m maskgen.main --workdir=runs/vilex_sd15 \
    --config=configs/vilex_sd15.py:decoder=weights/sd15,encoder=weights/siglip,source=folder:/my/pictures

docs/vilex.md says which published weights to use and where to get them. Pictures need no captions.

Hardware: 256 chips of TPU v5e for the paper's batch; docs/scaling.md has estimates from compiling it. The
paper's run took 2.5 days on 64 TPUv5, with Imagen at 64 pixels and WebLI data, and reached a COCO FID of 2.07
with 75 tokens: neither is public, so do not expect this score here. The authors of this file have run neither
the full size nor anything with published weights.

From the paper: 75 tokens, the loss, 300,000 steps of 2,048 pictures, Adafactor with 3e-4 for the pooling and
1e-5 for a SigLIP that is trained too. From De-Diffusion, its predecessor: five pooling layers. Chosen here,
as the paper does not give them: So400m/14 at 224 pixels, the width of the pooling, warm-up, cosine and
clipping, the number of dropped tokens, words next to a quarter of the images, bfloat16.

Arguments:
  :decoder        a converted Stable Diffusion 1
  :encoder        a converted SigLIP, or `mage:PATH` for the encoder of a trained MAGE model
  :source         the pictures, as in docs/your_pictures.md: `folder:/my/pictures`, `tar:/data/{000..999}.tar`
  :eval_source    pictures to evaluate on; by default a tenth of `source` is held out
  :template_share how often a neutral text such as "a photo of {}" is around the image in the prompt
  :templates      a file of such texts, one on each line, in place of vilex_templates.txt
  :caption_share  how often the caption is next to the image, if there are captions; likewise
  :words_win      whether words are trained to override images: with captions, see docs/vilex.md
  :place          the image's position: `before` or `behind` its caption, or `within` it, as words_win has it
  :clean_text     whether texts are cleaned as for CLIP's training, with the extra `text`
  :subject        words for what images show, joined by `+`; an image within its caption replaces the first
  :recoloured     the share of the captions whose image is hue-shifted; with words_win 0 means 0.4
  :batch_size     examples per step, by default 2,048
  :accumulation   micro-batches per step, for fewer devices
  :gpu            1 is meant for one GPU of 24 GB: a frozen image encoder, and 100,000 steps of 64 examples in
                  small micro-batches
  :family         of the decoder, see vilex_sd21.py and vilex_sdxl.py
  :size           of the images; by default that of the decoder
  :tiny           this recipe with the small networks, pictures and lengths of `vilex_digits.py:tiny`
  :debug          2 steps of tiny networks
"""

import pathlib

import ml_collections

from maskgen import config as config_lib
from maskgen.errors import UserError
from maskgen.importers import diffusers
from maskgen.importers.diffusers_layouts import LAYOUTS
from maskgen.importers.published import PUBLISHED

ENCODER = "siglip_so400m_224"
# SigLIP's So400m/14.
SO400M = dict(image_size=(224, 224), patch=14, width=1152, depth=27, heads=16, hidden=4304)
# The optimizer on one GPU, where the encoder is frozen, and on many devices.
ONE_GPU = dict(learning_rate=1e-4, warmup_steps=1000, multipliers=())
MANY = dict(learning_rate=3e-4, warmup_steps=10_000, multipliers=(("^encoder/", 1 / 30),))
# The decoder is frozen, and therefore in 16 bits, except its autoencoder.
FROZEN = dict(param_dtype="bfloat16", dtype="bfloat16", remat="full")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  given = dict(decoder="", encoder=ENCODER, source="folder:pictures", eval_source="")
  words = dict(template_share=0.25, templates=str(pathlib.Path(__file__).parent / "vilex_templates.txt"))
  words |= dict(caption_share=0.0, words_win=False, place="", subject="", recoloured=0.0, clean_text=False)
  recipe = dict(batch_size=0, accumulation=0, gpu=0, family="sd15", size=0, debug=False, tiny=False)
  args = config_lib.parse_arg(arg, **given, **words, **recipe)
  config = full(args)
  if not (args.tiny or args.debug):
    return config
  # The small versions have their own text-to-image model.
  stages = config_lib.load_beside(__file__, "vilex_digits.py", debug=args.debug, tiny=args.tiny)
  shrink(config, stages.vilex)
  stages.vilex = config
  return stages


def full(args) -> ml_collections.ConfigDict:
  layout = config_lib.choose("family", args.family, LAYOUTS)
  decoder = args.decoder or layout.published
  section = diffusers.section_of(decoder, args.family)
  size = args.size or section["image_size"][0]
  mage, path = args.encoder.startswith("mage:"), args.encoder.removeprefix("mage:")
  encoder: dict = dict(name="vit", **SO400M) if path in PUBLISHED else dict(name="pretrained")
  if not mage:
    encoder.update(dtype="bfloat16", scan=True, remat="none" if args.gpu else "dots")
  if args.gpu not in (0, 1):
    raise UserError(f"config argument ':gpu={args.gpu}': give 1, or leave it out for many devices")
  xl, batch_size = args.family == "sdxl", args.batch_size or (64 if args.gpu else 2048)
  accumulation = args.accumulation or (batch_size // (1 if xl else 4) if args.gpu else 8 if xl else 2)
  captions = args.caption_share or args.words_win
  # No flips with captions, which may mention left and right.
  kind = "bpe_clean" if args.clean_text else "bpe"
  words = f"|tokenize('{kind}:{section['folder'] or args.family}/tokenizer', 77)" if captions else ""
  flip = "" if captions else "|flip_lr"
  random = f"|sized_crop({size})" if xl else f"|resize_small({size})|random_crop({size})"
  centre = f"|sized_crop({size}, 'center')" if xl else f"|resize_small({size})|center_crop({size})"
  return ml_collections.ConfigDict(
    dict(
      batch_size=batch_size,
      accumulation=max(accumulation, 1),
      total_steps=100_000 if args.gpu else 300_000,
      log_every_steps=100,
      checkpoint=dict(save_steps=5000, save_minutes=15.0, keep=2),
      data=dict(
        source=args.source,
        eval_source=args.eval_source or None,
        preprocess=f"decode(3){flip}{random}{words}" if xl else f"decode(3){random}{flip}{words}",
        eval_preprocess=f"decode(3){centre}{words}",
      ),
      pretrained=dict(decoder=decoder, encoder=path),
      objective=dict(
        name="vilex",
        decoder={**section, "image_size": (size, size), "clean_text": args.clean_text, **FROZEN},
        encoder=encoder,
        pretrained_encoder=not mage,
        train_encoder=not args.gpu,
        tokens=75,
        pool_width=1024,
        pool_depth=5,
        pool_heads=16,
        tail_drop=dict(distribution="uniform", full=0.25),
        # Texts need the decoder's tokenizer.
        words=config_lib.words_beside(args, templated=args.template_share if args.decoder else 0.0),
        crop_sizes=xl,  # it is told the true ones
        dtype="bfloat16",
        sampling=dict(steps=25, sampler="dpm", image_guidance=2.0, text_guidance=2.0),
      ),
      optimizer=dict(main=dict(name="adafactor", clip_norm=1.0, **(ONE_GPU if args.gpu else MANY))),
      evals=dict(
        validation=dict(type="loss", every_steps=10_000),
        # For photographs features="mobilenet_v2:/path/to.npz" is more informative than pixels.
        reconstruction=dict(type="vilex", every_steps=10_000, num_tokens=(1, 4, 16, 75), num_images=64),
      ),
      # Large parameters that no rule matches, such as the frozen U-Net's, are split over fsdp.
      # The first is Adafactor's state, which is small.
      sharding=(("/v(_row|_col)?/", ()), *config_lib.TRANSFORMER_RULES),
    )
  )


def shrink(config: ml_collections.ConfigDict, small: ml_collections.ConfigDict) -> None:
  """Keeps optimizer and recipe, and takes data, networks and lengths from vilex_digits.py."""
  for key in set(small) - {"optimizer"}:
    config[key] = small[key]
  config.accumulation = 1
  # Training from scratch in a short run needs the same larger learning rate for all parameters.
  for key in ("learning_rate", "warmup_steps", "multipliers"):
    config.optimizer.main[key] = small.optimizer.main[key]
