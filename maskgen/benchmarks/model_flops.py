"""How much arithmetic a training step is made of."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from maskgen.costs import flops
from maskgen.training.experiment import Experiment


def model_flops(experiment: Experiment, batch: Mapping[str, Any]) -> int:
  """Counts FLOPs of the matrix products and convolutions of one training step, over all devices.

  These are what the mathematics needs: what rematerialisation computes again is no part of them, and a fused
  attention kernel counts as what it replaces.

  Args:
    experiment: whose step.
    batch: a global training batch, or its shapes; nothing is computed.
  """
  objective: Any = experiment.objective
  plain = {"remat": "none", "attention": "xla"}
  known = {field.name for field in dataclasses.fields(objective)}
  objective = dataclasses.replace(objective, **{name: plain[name] for name in plain.keys() & known})
  target = experiment.targets
  return flops.count(experiment.make_update(objective), target["state"], target["frozen"], batch)
