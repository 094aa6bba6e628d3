"""Images as words for a text-to-image model of emoji (ViLex): change a drawing by words; no download.

  python -m maskgen.main --config=configs/vilex_emoji.py --workdir=runs/vilex_emoji
  python -m maskgen.tools.vilex prompt --model=runs/vilex_emoji/vilex --image=cook.png:1 \
    --prompt="{}, dark skin tone" --out=edited.png

Two stages: a text-to-image diffusion model of the emoji, then its ViLex encoder, both as for digits. The
evaluation `edits` knows the one right picture of every edit, which was never trained on, see docs/emoji.md.

Hardware: two CPU cores and 4 GB of memory; about 85 minutes, 60 of them for the text-to-image model. Of
people and hands in a skin tone that was held out, it draws 99% of the bases and 90% of the tones from names;
from one token of a picture in another tone and words for the tone, 70% and 83%. The result comes with maskgen
as `emoji-vilex`.

Arguments:
  :decoder  a trained text-to-image model, such as runs/vilex_emoji/decoder: only the encoder is trained
  :seed     the seed of everything
  :tiny     18 minutes of one core, to try everything: rough shapes of emoji, few of them right
  :debug    2 steps of tiny networks
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = config_lib.parse_arg(arg, decoder="", debug=False, tiny=False, seed=0)
  shared = dict(debug=args.debug, tiny=args.tiny, seed=args.seed)
  config = config_lib.load_beside(__file__, "vilex_digits.py", **shared).to_dict()
  named = config_lib.load_beside(__file__, "emoji.py", **shared).to_dict()["mage_text"]
  decoder, vilex = config["decoder"], config["vilex"]
  few = dict(num_images=4, num_pictures=4) if args.debug else dict(num_images=24 if args.tiny else 64)
  model = decoder["objective"] | dict(image_size=(32, 32), captions=named["objective"]["captions"])
  # A name has one right picture: more guidance only adds specks.
  model["sampling"] |= dict(guidance=1.0)
  if not args.debug:
    # 8 x 8 squares of 4 x 4 pixels, with attention among the 4 x 4 below them.
    model |= dict(patch=4, text_encoder=dict(width=96, depth=2, heads=4, hidden=192))
    model["unet"] |= dict(channels=(32, 80), depths=(0, 1), heads=(4, 4))
    # At the full rate the text encoder soon confuses words such as "light" and "dark".
    decoder["optimizer"]["main"] |= dict(learning_rate=6e-3, multipliers=(("^text_encoder/", 0.1),))
  steps = 2 if args.debug else 1000 if args.tiny else 18_000
  decoder |= dict(
    batch_size=8 if args.debug else 32,
    total_steps=steps,
    log_every_steps=min(100, steps),
    data=named["data"],
    objective=model,
    ema=dict(main=0.998 if args.tiny else 0.999),
  )
  decoder["evals"] = dict(
    validation=dict(type="loss", every_steps=2000),
    emoji=dict(type="emoji", every_steps=4500, **few),
    generation=named["evals"]["generation"] | dict(every_steps=9000),
  )
  steps, aligned = (2, 1) if args.debug else (500, 300) if args.tiny else (9000, 6000)
  vilex |= dict(
    batch_size=8 if args.debug else 32, total_steps=steps, log_every_steps=min(100, steps), data=named["data"]
  )
  small = {} if args.debug else dict(pool_width=64, pool_depth=1)
  vilex["objective"] |= dict(decoder=model, alignment_steps=aligned, **small)
  vilex["objective"]["encoder"] |= dict(
    image_size=(32, 32), **({} if args.debug else dict(width=64, depth=3))
  )
  vilex["objective"]["sampling"] |= dict(image_guidance=1.0, text_guidance=1.0)
  # Any word may be the one that a prompt says: "a woman {}", "{} cook", "{} with dark skin".
  vilex["objective"]["words"] |= dict(subject=())
  vilex["evals"] = dict(
    validation=dict(type="loss", every_steps=1000),
    reconstruction=dict(type="vilex", every_steps=steps, num_tokens=(1, 2, 4, 8), **few),
    edits=dict(
      type="emoji_edits",
      every_steps=steps,
      prompts=dict(tone="{}, * skin tone", form="a * {}", role="{} *"),
      num_tokens=(1, 2, 4, 8),
      text_guidance=(1.0, 2.0),
      **few,
    ),
  )
  if args.decoder:
    return ml_collections.ConfigDict({**vilex, "pretrained": {"decoder": args.decoder}})
  return ml_collections.ConfigDict(config)
