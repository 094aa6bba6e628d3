"""`maskgen.lexicon` of version 0.1, kept for compatibility: `ImageWords` reads and writes token files now."""

from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from maskgen.serving import token_files
from maskgen.serving.token_files import write_tokens

if TYPE_CHECKING:
  from maskgen.objectives import vilex

__all__ = ["read_tokens", "write_embedding", "write_tokens"]


def write_embedding(path: epath.PathLike, tokens: np.ndarray, objective: "vilex.Objective") -> None:
  """See `maskgen.serving.ImageWords.write_embedding`."""
  token_files.write_embedding(path, tokens, objective.text_to_image.model.text_widths)


def read_tokens(path: epath.PathLike, objective: "vilex.Objective") -> np.ndarray:
  """See `maskgen.serving.ImageWords.read_tokens`."""
  return token_files.read_tokens(path, objective.text_to_image.model.text_widths, objective.tokens)
