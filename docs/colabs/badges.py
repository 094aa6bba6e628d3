"""Lets the notebooks open in Colab: python docs/colabs/badges.py https://github.com/OWNER/maskgen

Adds a badge to the first cell of each notebook and to README.md, and lets the first code cell clone the
repository in Colab. A fork repeats it with its own address.
"""

import pathlib
import re
import sys

import nbformat

FOLDER = pathlib.Path(__file__).parent
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
_ADDRESS = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+")
_BADGES = re.compile(r" ?" + re.escape(BADGE) + r"\([^)]*\)")
_CLONES = re.compile(r'if "COLAB_RELEASE_TAG" in os\.environ:\n(?:  .*\n)+else:\n  (%cd \.\./\.\.)')
_BY_HAND = "In Colab, upload or clone the repository first, and replace `../..` by its folder."
_CLONED = "In Colab, this also clones the repository."


def badge(repository: str, name: str) -> str:
  """Markdown that opens a notebook of this folder."""
  path = repository.removeprefix("https://github.com/")
  return f"{BADGE}(https://colab.research.google.com/github/{path}/blob/main/docs/colabs/{name}.ipynb)"


def install(source: str, repository: str) -> str:
  """The code cell that installs, which clones the repository where only the notebook was opened."""
  source = _CLONES.sub(r"\1", source).replace("import os\n", "")
  clone = f"  !git clone -q {repository} maskgen\n  %cd maskgen\n"
  return "import os\n" + source.replace(
    "%cd ../..", f'if "COLAB_RELEASE_TAG" in os.environ:\n{clone}else:\n  %cd ../..'
  )


def add(folder: pathlib.Path, repository: str) -> None:
  """Changes the notebooks of a folder and their list.

  Raises:
    ValueError: if `repository` is not the address of one at GitHub, where Colab reads from.
  """
  repository = repository.removesuffix("/").removesuffix(".git")
  if not _ADDRESS.fullmatch(repository):
    raise ValueError(
      f"'{repository}' is not https://github.com/OWNER/NAME: give the address of the repository"
    )
  listed = (folder / "README.md").read_text()
  for file in sorted(folder.glob("*.ipynb")):
    notebook = nbformat.read(file, as_version=nbformat.NO_CONVERT)
    title, how, code = notebook.cells[:3]
    link = badge(repository, file.stem)
    heading, rest = _BADGES.sub("", title.source).split("\n\n", 1)
    title.source = f"{heading}\n\n{link}\n\n{rest.lstrip()}"
    how.source = how.source.replace(_BY_HAND, _CLONED)
    code.source = install(code.source, repository)
    nbformat.write(notebook, file)
    row = re.escape(f"| [{file.name}]({file.name})") + f"(?:{_BADGES.pattern})?"
    listed = re.sub(row, f"| [{file.name}]({file.name}) {link}", listed)
  (folder / "README.md").write_text(listed)


if __name__ == "__main__":
  try:
    add(FOLDER, " ".join(sys.argv[1:]))
  except ValueError as error:
    sys.exit(f"error: {error}")
