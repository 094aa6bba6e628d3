"""Image tokenizers and masked generative encoders in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
  from maskgen.pretrained import available as available
  from maskgen.serving import Model as Model
  from maskgen.serving import load as load

_PUBLIC = {"Model": "maskgen.serving", "available": "maskgen.pretrained", "load": "maskgen.serving"}
# Modules that version 0.1 had in other places: `from maskgen import optim` still works.
_MOVED = {
  "checkpoint": "maskgen.storage",
  "editing": "maskgen.numerics.editing",
  "lexicon": "maskgen.serving.lexicon",
  "masking": "maskgen.numerics.masking",
  "optim": "maskgen.training.optim",
}


def __getattr__(name: str) -> Any:
  # JAX takes seconds to import: `import maskgen` alone stays cheap.
  if name in _PUBLIC:
    return getattr(importlib.import_module(_PUBLIC[name]), name)
  if name in _MOVED:
    return importlib.import_module(_MOVED[name])
  raise AttributeError(f"module 'maskgen' has no attribute '{name}'")
