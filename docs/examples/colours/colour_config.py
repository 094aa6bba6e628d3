"""A config: the quickstart with our data and preprocessing, and our objective in its second stage.

python -m maskgen.main --config=docs/examples/colours/colour_config.py:tiny --workdir=runs/colours

Arguments: those of quickstart.py.
"""

import ml_collections

from maskgen.config import load_beside


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  config = load_beside(__file__, "quickstart.py", arg)
  for stage in config.stages:
    config[stage].data = dict(
      source="discs:2000", preprocess="decode(3)|tint.tint(0.2)", eval_preprocess="decode(3)"
    )
  config.mage.objective.name = "colour_mage"
  config.mage.objective.bins = 8
  config.mage.evals = dict(
    validation=dict(type="loss", every_steps=1000), colours=dict(type="colour_error", every_steps=1000)
  )
  return config
