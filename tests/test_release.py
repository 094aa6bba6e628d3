"""What the package says of itself, and what its images are built from."""

import importlib.util
import re
import tomllib

import pytest

REPOSITORY = "https://example.org/owner/maskgen"


@pytest.fixture
def package(repository):
  """The hook that completes the package's description when it is built."""
  pytest.importorskip("hatchling", reason="the extra 'test' installs hatchling, which builds the package")
  spec = importlib.util.spec_from_file_location("package", repository / "docs/site/package.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_package_shows_the_readme_with_absolute_links(package, repository, monkeypatch):
  monkeypatch.setenv(package.NAME, f"{REPOSITORY}/")
  found: dict = {}
  package.CustomMetadataHook(str(repository), {}).update(found)
  text = found["readme"]["text"]
  pictures, links = (re.findall(rf"{mark}\[[^\]]*\]\(([^)]+)\)", text) for mark in ("!", "(?<!!)"))
  assert pictures and links
  for kind, addresses in {"raw": pictures, "blob": links}.items():
    for address in addresses:
      path = address.removeprefix(f"{REPOSITORY}/{kind}/main/")
      assert path.startswith("https://") or (repository / path.partition("#")[0]).is_file(), address
  assert all(url.startswith(REPOSITORY) for url in found["urls"].values())


def test_without_an_address_it_shows_the_readme_as_it_is(package, repository, monkeypatch):
  monkeypatch.delenv(package.NAME, raising=False)
  found: dict = {}
  package.CustomMetadataHook(str(repository), {}).update(found)
  assert found == {
    "readme": {"content-type": "text/markdown", "text": (repository / "README.md").read_text()}
  }


def test_images_are_built_from_what_the_build_reads(repository):
  file = (repository / "launch/Dockerfile").read_text()
  copied = [name for line in re.findall(r"^COPY (.*) \S+$", file, re.MULTILINE) for name in line.split()]
  assert all((repository / name).exists() for name in copied)
  project = tomllib.loads((repository / "pyproject.toml").read_text())
  assert project["tool"]["hatch"]["metadata"]["hooks"]["custom"]["path"].startswith(tuple(copied))
  assert {*re.findall(r"EXTRA=(\w+)", file)} <= project["project"]["optional-dependencies"].keys()


def test_the_readme_begins_with_what_it_is_not(repository):
  first = " ".join((repository / "README.md").read_text().splitlines()[:8])
  assert "unrelated to MaskGen" in first and "1d-tokenizer" in first
