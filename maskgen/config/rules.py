"""Sharding rules shared by configs."""

# The sharding of a transformer's parameters: (regex over paths, the mesh axis of each dimension). Axes of
# size 1 have no effect; large parameters that no rule matches are split over fsdp.
BLOCK_RULES = (
  ("/(query|key|value|up)/kernel$", ("fsdp", "tensor")),
  ("/(query|key|value|up)/bias$", ("tensor",)),
  ("/(out|down)/kernel$", ("tensor", "fsdp")),
)
TRANSFORMER_RULES = (*BLOCK_RULES, ("(embedding|position)$", (None, "fsdp")))
