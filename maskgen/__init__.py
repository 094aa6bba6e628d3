"""Image tokenizers and masked generative encoders in JAX."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
  from maskgen.api import Model as Model
  from maskgen.api import load as load


def __getattr__(name: str) -> Any:
  # JAX takes seconds to import: `import maskgen` alone stays cheap.
  if name in ("load", "Model"):
    from maskgen import api

    return getattr(api, name)
  raise AttributeError(f"module 'maskgen' has no attribute '{name}'")
