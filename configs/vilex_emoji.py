"""Images as words for a text-to-image model of emoji (ViLex): change a drawing by words; no download.

  python -m maskgen.main --config=configs/vilex_emoji.py --workdir=runs/vilex_emoji
  python -m maskgen.tools.vilex prompt --model=runs/vilex_emoji/vilex --image=cook.png \
    --prompt="{} with dark skin" --out=edited.png

Two stages: a text-to-image diffusion model of the emoji, then its ViLex encoder, both as for digits. The
evaluation `edits` knows the one right picture of every edit, which was never trained on, see docs/emoji.md.

Hardware: two CPU cores and 4 GB of memory; the lengths are meant for 90 minutes. Full size has not been run.

Arguments:
  :seed   the seed of everything
  :tiny   ten minutes, to try everything
  :debug  2 steps of tiny networks
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = config_lib.parse_arg(arg, debug=False, tiny=False, seed=0)
  config = config_lib.load_beside(__file__, "vilex_digits.py", arg).to_dict()
  named = config_lib.load_beside(__file__, "emoji.py", arg).to_dict()["mage_text"]
  decoder, vilex = config["decoder"], config["vilex"]
  few = dict(num_images=4, num_pictures=4) if args.debug else dict(num_images=24 if args.tiny else 64)
  model = decoder["objective"] | dict(image_size=(32, 32), captions=named["objective"]["captions"])
  if not args.debug:
    # 16 x 16 squares of 2 x 2 pixels: twice the side of the digits, and a resolution more.
    model["unet"] |= dict(channels=(48, 64, 96), depths=(0, 1, 1), heads=(4, 4, 4), layout=16)
  steps = 2 if args.debug else 150 if args.tiny else 2000
  decoder |= dict(total_steps=steps, log_every_steps=min(50, steps), data=named["data"], objective=model)
  decoder["evals"] = dict(
    validation=dict(type="loss", every_steps=1000), emoji=dict(type="emoji", every_steps=1000, **few)
  )
  steps, aligned = (2, 1) if args.debug else (150, 100) if args.tiny else (2400, 2000)
  vilex |= dict(total_steps=steps, log_every_steps=min(50, steps), data=named["data"])
  vilex["objective"] |= dict(decoder=model, alignment_steps=aligned)
  vilex["objective"]["encoder"] |= dict(image_size=(32, 32))
  # Any word may be the one that a prompt says: "a woman {}", "{} cook", "{} with dark skin".
  vilex["objective"]["words"] |= dict(subject=())
  vilex["evals"] = dict(
    validation=dict(type="loss", every_steps=1000),
    reconstruction=dict(type="vilex", every_steps=steps, num_tokens=(1, 8), **few),
    edits=dict(type="emoji_edits", every_steps=steps, num_tokens=(4, 8), text_guidance=(2.0, 4.0), **few),
  )
  return ml_collections.ConfigDict(config)
