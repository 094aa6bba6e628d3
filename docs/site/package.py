"""Completes the description of the package when it is built: links that also work outside the repository.

The repository's address is an environment variable, so that builds of forks point to themselves:

  MASKGEN_REPOSITORY=https://github.com/OWNER/maskgen python -m build
"""

import os
import pathlib
import re

from hatchling.metadata.plugin.interface import MetadataHookInterface

NAME = "MASKGEN_REPOSITORY"
_LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?![a-z]+:|#)([^)\s]+)\)")


def absolute(text: str, repository: str) -> str:
  """Markdown whose relative links lead to the repository at GitHub, and its pictures to their raw files."""
  return _LINK.sub(
    lambda m: f"{m[1]}{m[2]}{repository}/{'raw' if m[1] else 'blob'}/main/{m[3]})",
    text,
  )


class CustomMetadataHook(MetadataHookInterface):
  """Adds the readme and the addresses of the project."""

  def update(self, metadata: dict) -> None:
    text = (pathlib.Path(self.root) / "README.md").read_text()
    repository = os.environ.get(NAME, "").rstrip("/")
    if repository:
      text = absolute(text, repository)
      metadata["urls"] = {
        "Repository": repository,
        "Documentation": f"{repository}/tree/main/docs",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        "Issues": f"{repository}/issues",
      }
    metadata["readme"] = {"content-type": "text/markdown", "text": text}
