"""Text-conditional MAGE on scikit-learn's digits in colour; no download.

  python -m maskgen.main --config=configs/mage_text_cond.py --workdir=runs/mage_text_cond
  python -m maskgen.tools.generate --model=runs/mage_text_cond/mage_text --out=digits.png --count=8 \
    --prompt="a large red three in the middle on a blue background" \
    --prompt="a small pink seven at the top left on a green background"

Three stages: tokenizer and MAGE, much as in `quickstart.py`, on the captioned digits of `diffusion_digits.py`
without captions; then the encoder is frozen, and the decoder is conditioned on captions, with its own text
encoder.

Hardware: two CPU cores and 2 GB of memory; about 25 minutes. Expect 23 dB from the tokenizer, and 91% of the
last stage's pictures to match their whole caption; most errors are in the class. Prompts without size or
place work less well, as tokens are sampled independently.

Arguments:
  :seed   the seed of everything
  :tiny   a minute of training for each stage, to try everything
  :debug  2 steps of each stage, tiny networks
"""

import ml_collections

from maskgen import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = config_lib.parse_arg(arg, debug=False, tiny=False, seed=0)
  small = config_lib.load_beside(__file__, "quickstart.py", arg).to_dict()
  captioned = config_lib.load_beside(__file__, "diffusion_digits.py", arg).to_dict()
  tokenizer, mage = small["tokenizer"], small["mage"]
  # Digits without captions for the first two stages; the data already contains shifts.
  plain = {**captioned["data"], "preprocess": "decode(3)", "eval_preprocess": "decode(3)"}
  # One of 4 x 4 tokens cannot encode two colours and a stroke; 8 x 8 are sharp without a discriminator.
  finer = dict(multipliers=(1, 2), strides=(2,), codebook_size=256)
  for stage in (tokenizer, mage):
    stage["data"] = plain
    stage["objective"]["tokenizer"] |= finer
  for name in ("discriminator", "adversarial_start", "r1_weight"):
    del tokenizer["objective"][name]
  tokenizer["objective"]["adversarial_weight"] = 0.0
  del tokenizer["optimizer"]["discriminator"]
  del mage["evals"]["generation"]
  mage["evals"]["probe"] |= dict(num_images=64 if args.debug else 10_000, baselines=False)
  reader = captioned["objective"]
  text = {
    **mage,
    "data": captioned["data"],
    "pretrained": {"mage": "stage:mage"},
    "objective": {
      **mage["objective"],
      "name": "mage_text",
      "captions": reader["captions"],
      "condition_width": reader["text_encoder"]["width"],
      # One visible token reveals the background: its word only matters if all tokens are masked.
      "mask_ratio": dict(mean=1.0, std=0.2, low=0.5, high=1.0),
      "text_encoder": reader["text_encoder"],
      "sampling": {**mage["objective"]["sampling"], "guidance": 2.0},
    },
    "evals": captioned["evals"],
  }
  stages = dict(tokenizer=tokenizer, mage=mage, mage_text=text)
  return ml_collections.ConfigDict({**stages, "stages": tuple(stages)})
