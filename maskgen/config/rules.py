"""The sharding rules that configs share."""

# Where the parameters of a transformer live on a mesh: (regex over paths, the mesh axis of each dimension).
# An axis of size 1 does nothing; what no rule of a config names is split over fsdp where it is large.
TRANSFORMER_RULES = (
  ("/(query|key|value|up)/kernel$", ("fsdp", "tensor")),
  ("/(query|key|value|up)/bias$", ("tensor",)),
  ("/(out|down)/kernel$", ("tensor", "fsdp")),
  ("(embedding|position)$", (None, "fsdp")),
)
