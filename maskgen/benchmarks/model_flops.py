"""The arithmetic of a training step."""

from collections.abc import Mapping
from typing import Any

from maskgen import objectives
from maskgen.config import fields
from maskgen.costs import flops
from maskgen.training.experiment import Experiment


def model_flops(experiment: Experiment, batch: Mapping[str, Any]) -> int:
  """Counts FLOPs of the matrix products and convolutions of one training step, over all devices.

  The count does not depend on how the step is run: rematerialised computation does not count, and a fused
  attention kernel counts as the products that it replaces.

  Args:
    experiment: the experiment.
    batch: a global training batch, or its shapes; nothing is computed.
  """
  section = experiment.config.objective
  plain = {
    path: field.metadata["plain"]
    for path, field, value in fields.walk(type(experiment.objective), section)
    if field.metadata.get("operational") and value != field.metadata["plain"]
  }
  objective = objectives.build(fields.replace(section, plain))
  target = experiment.targets
  return flops.count(experiment.make_update(objective, 1), target["state"], target["frozen"], batch)
