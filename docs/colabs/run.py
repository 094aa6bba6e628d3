"""Runs notebooks in this folder and keeps their outputs.

python docs/colabs/run.py generate edit features vilex
"""

import os
import pathlib
import sys
from collections.abc import Mapping

import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent
ROOT = FOLDER.parents[1]
KEPT = ("text/plain", "image/png")


def read(name: str) -> nbformat.NotebookNode:
  """A notebook of this folder by its name."""
  return nbformat.read(FOLDER / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def installs(cell: nbformat.NotebookNode) -> bool:
  """Whether the cell installs packages, which is left out."""
  return "install" in cell.metadata.get("tags", [])


def execute(notebook: nbformat.NotebookNode, env: Mapping[str, str] = os.environ) -> None:
  """Runs the cells of a notebook in a fresh kernel in the repository, except installs."""
  whole, notebook.cells = notebook.cells, [cell for cell in notebook.cells if not installs(cell)]
  try:
    NotebookClient(
      notebook,
      timeout=900,
      kernel_name="python3",
      record_timing=False,
      resources={"metadata": {"path": str(ROOT)}},
    ).execute(env={**env, "PYTHONPATH": str(ROOT)})
  finally:
    notebook.cells = whole


def store(name: str) -> None:
  """Runs a notebook and writes it with its outputs."""
  notebook = read(name)
  metadata = {**notebook.metadata}
  execute(notebook)
  notebook.metadata = nbformat.from_dict({**metadata, "language_info": {"name": "python"}})
  for cell in notebook.cells:
    for output in cell.get("outputs", ()):
      if "data" in output:
        output.data = {kind: value for kind, value in output.data.items() if kind in KEPT}
  nbformat.write(notebook, FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
  for name in sys.argv[1:]:
    store(name)
