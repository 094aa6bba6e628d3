"""Images as words for a text-to-image model of handwritten digits (ViLex); no download.

  python -m maskgen.main --config=configs/vilex_digits.py --workdir=runs/vilex_digits
  python -m maskgen.main --config=configs/vilex_digits.py:decoder=runs/diffusion_digits --workdir=runs/vilex

The first command also trains the text-to-image model of configs/diffusion_digits.py. An image becomes up to
eight vectors among the words of a prompt, see docs/vilex.md. The encoder is trained from scratch here, so
that its first steps align it with captions.

Hardware: two CPU cores and 3 GB of memory; about 40 minutes, half of them for the text-to-image model. Expect
pictures from eight tokens to show the class of their source in 87% of cases, from one token in 70%, and from
captions in 98%; docs/results.md has all numbers. `:debug` and `:tiny` were run as well.

Arguments:
  :decoder  a trained model of configs/diffusion_digits.py; by default it is trained first
  :encoder  `mage:PATH` for the encoder of a trained MAGE model instead of a small ViT
  :seed     the seed of everything
  :tiny     ten minutes, half of them evaluations, to try everything; digits are barely legible
  :debug    2 steps of tiny networks
"""

import ml_collections

from maskgen import config as config_lib
from maskgen import storage
from maskgen.errors import UserError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = config_lib.parse_arg(arg, decoder="", encoder="", debug=False, tiny=False, seed=0)
  if args.encoder and not args.encoder.startswith("mage:"):
    raise UserError(f"config argument ':encoder={args.encoder}': give mage:PATH, with a trained MAGE model")
  if args.decoder:
    return ml_collections.ConfigDict(vilex(args, args.decoder, storage.load_config(args.decoder)))
  given = dict(debug=args.debug, tiny=args.tiny, seed=args.seed)
  decoder = config_lib.load_beside(__file__, "diffusion_digits.py", **given).to_dict()
  stages = dict(decoder=decoder, vilex=vilex(args, "stage:decoder", decoder))
  return ml_collections.ConfigDict(dict(stages=tuple(stages), **stages))


def vilex(args, path: str, decoder: dict) -> dict:
  alignment_steps, steps = (1, 2) if args.debug else (300, 500) if args.tiny else (3000, 3600)
  small, mage = args.debug, args.encoder.removeprefix("mage:")
  few = dict(num_images=8, num_pictures=2) if small else {}
  vit = dict(
    name="vit",
    image_size=(16, 16),
    patch=4,
    width=16 if small else 96,
    depth=1 if small else 4,
    heads=4,
  )
  return dict(
    seed=args.seed,
    batch_size=8 if small else 64,
    total_steps=steps,
    log_every_steps=min(50, steps),
    checkpoint=dict(save_steps=500, save_minutes=5.0, keep=2),
    data={key: decoder["data"][key] for key in ("source", "preprocess", "eval_preprocess")},
    pretrained=dict(decoder=path, **(dict(encoder=mage) if mage else {})),
    objective=dict(
      name="vilex",
      decoder=decoder["objective"],
      encoder=dict(name="pretrained") if mage else vit,
      tokens=8,
      pool_width=16 if small else 96,
      pool_depth=1 if small else 2,
      pool_heads=4,
      tail_drop=dict(distribution="uniform", full=0.5),
      # Tokens that are never trained next to words lose the class when words shift them, and tokens that
      # words never contradict override them.
      words=dict(share=0.4, place="within", subject=DIGITS, recoloured=0.4),
      alignment_steps=alignment_steps,
      min_timestep=400,
      sampling=dict(steps=2 if small else 20, sampler="dpm", image_guidance=2.0, text_guidance=2.0),
    ),
    optimizer=dict(
      main=dict(
        learning_rate=2e-3,
        warmup_steps=0 if small else 100,
        b2=0.99,
        weight_decay=0.01,
        clip_norm=1.0,
        # A pretrained encoder changes slowly. At the paper's 1/30 a small MAGE learns too little of digits.
        multipliers=(("^encoder/", 0.3),) if mage else (),
      )
    ),
    ema=dict(main=0.99 if args.tiny else 0.998),
    evals=dict(
      validation=dict(type="loss", every_steps=1000),
      reconstruction=dict(type="vilex", every_steps=steps, features="glyphs", classifier="svc", **few),
      edits=dict(type="digit_edits", every_steps=steps, num_tokens=(4, 8), text_guidance=(1.0, 2.0), **few),
      probe=dict(
        type="probe", every_steps=steps, num_images=64 if small else 10_000, shots=(1,), baselines=False
      ),
    ),
  )
