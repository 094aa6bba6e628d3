"""What a user calls: `maskgen.load(...)` and the models that it returns."""

from maskgen.serving.loading import load
from maskgen.serving.model import Model

__all__ = ["Model", "load"]
