"""Emoji from words: tokenizer, MAGE, then text-conditional MAGE, on 3,408 drawings of 32 pixels; no download.

  python -m maskgen.main --config=configs/emoji.py --workdir=runs/emoji
  python -m maskgen.tools.generate --model=runs/emoji/mage_text --out=emoji.png --count=4 \
    --prompt="woman firefighter, dark skin tone" --prompt="a man cook with light skin"

The data set comes with maskgen, see docs/emoji.md. The evaluation `emoji` checks whether pictures are those
that their captions name, for combinations that were never trained on and, apart from them, for some that
were.

Hardware: two CPU cores and 3 GB of memory; the lengths are meant for an hour. Full size has not been run.

Arguments:
  :seed   the seed of everything
  :tiny   ten minutes, to try everything
  :debug  2 steps of each stage, tiny networks
"""

import ml_collections

from maskgen import config as config_lib
from maskgen.data import emoji

# The longest name has 19 words and punctuation marks.
CAPTIONS = dict(text_tokenizer=f"list:{' '.join(emoji.load().words)}", length=24)


def data(captions: dict | None = None) -> dict:
  read = f"|tokenize({captions['text_tokenizer']!r}, {captions['length']})" if captions else ""
  return dict(source="emoji", preprocess="decode(3)" + read, eval_preprocess="decode(3)" + read)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = config_lib.parse_arg(arg, debug=False, tiny=False, seed=0)
  config = config_lib.load_beside(__file__, "mage_text_cond.py", arg).to_dict()
  # 8 x 8 tokens: a quarter of the length of 16 x 16, whose pictures are not easier to tell apart.
  network = config["tokenizer"]["objective"]["tokenizer"]
  if not args.debug:
    network |= dict(multipliers=(1, 2, 4), strides=(2, 2), codebook_size=1024)
    config["tokenizer"]["optimizer"]["generator"] |= dict(learning_rate=4e-3, warmup_steps=100)
  few = dict(num_images=4, num_pictures=4) if args.debug else dict(num_images=60) if args.tiny else {}
  for name, tiny, full in (("tokenizer", 150, 1200), ("mage", 200, 1200), ("mage_text", 300, 2000)):
    stage, steps = config[name], 2 if args.debug else tiny if args.tiny else full
    stage |= dict(total_steps=steps, log_every_steps=min(50, steps), data=data())
    stage["objective"] |= dict(image_size=(32, 32), tokenizer=network)
    stage["evals"] = dict(validation=dict(type="loss", every_steps=steps))
  tokenizer, mage, text = (config[name] for name in config["stages"])
  tokenizer["evals"] = dict(
    reconstruction=dict(type="reconstruction", every_steps=300),
    emoji=dict(type="emoji", every_steps=600, **few),
  )
  mage["evals"]["samples"] = dict(type="samples", every_steps=1000, masks=("center", "right"))
  wider = {} if args.debug else dict(width=128, decoder_width=128, decoder_depth=4)
  mage["objective"] |= wider
  text["data"] = data(CAPTIONS)
  text["objective"] |= {**wider, "captions": CAPTIONS}
  # A name has one right picture: nothing is gained from rare codes.
  text["objective"]["sampling"] |= dict(temperature=1.0)
  text["evals"]["emoji"] = dict(type="emoji", every_steps=1000, **few)
  return ml_collections.ConfigDict(config)
