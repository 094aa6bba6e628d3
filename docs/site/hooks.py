"""Makes pages of files outside of docs/, so that each text exists once and links work here and on GitHub."""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[2]
# The page of each file, both by their paths in the repository.
PAGES = {
  "README.md": "docs/index.md",
  "CHANGELOG.md": "docs/changelog.md",
  "CONTRIBUTING.md": "docs/contributing.md",
} | {
  f"maskgen/pretrained/{card.parent.name}/README.md": f"docs/models/{card.parent.name}.md"
  for card in sorted(ROOT.glob("maskgen/pretrained/*/README.md"))
}
FILES = {page: file for file, page in PAGES.items()}


def on_files(files, config):
  """Adds the pages."""
  for file, page in PAGES.items():
    files.append(File.generated(config, page.removeprefix("docs/"), content=(ROOT / file).read_text()))
  return files


def on_page_markdown(markdown, page, config, files):
  """Points links to the pages of their targets, and unescapes `|` in the code of tables."""
  here = "docs/" + page.file.src_uri
  folder = posixpath.dirname(FILES.get(here, here))

  def link(match):
    target = posixpath.normpath(posixpath.join(folder, match[1]))
    return f"]({posixpath.relpath(PAGES.get(target, target), posixpath.dirname(here))}{match[2]}"

  def row(match):
    # GitHub wants the backslash even within code, where Python's Markdown shows it.
    return re.sub(r"`[^`]*`", lambda code: code[0].replace(r"\|", "|"), match[0])

  markdown = re.sub(r"\]\((?![a-z]+:)([^)#\s]+)([#)])", link, markdown)
  return re.sub(r"^\|.*", row, markdown, flags=re.MULTILINE)
