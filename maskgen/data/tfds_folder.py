"""Finds data sets prepared by TFDS: DATA_DIR/NAME[/CONFIG]/VERSION. Nothing here uses the network."""

import difflib
import os
import re

import tensorflow_datasets as tfds
from etils import epath

from maskgen.errors import UserError, nearest

# Archives that must be downloaded manually, as they require accepting a licence.
_ARCHIVES = {"imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")}


def data_dir() -> epath.Path:
  """TFDS's data folder: the environment variable TFDS_DATA_DIR, or ~/tensorflow_datasets."""
  return epath.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def parse_name(name: str) -> tuple[str, str | None]:
  """Splits NAME, NAME/CONFIG or NAME:CONFIG.

  Raises:
    UserError: if it is none of these.
  """
  match = re.fullmatch(r"([\w-]+)(?:[/:]([^/:]+))?", name)
  if not match:
    raise UserError(f"'{name}' is not the name of a TFDS data set: write NAME or NAME/CONFIG")
  return match[1], match[2]


def find(root: epath.Path, name: str, config: str | None) -> epath.Path | None:
  """Returns the folder of the highest completely prepared version, or None."""
  folder = root / name / config if config else root / name
  if not folder.is_dir():
    return None
  # TFDS uses another name for a folder until it is complete.
  versions = [child for child in folder.iterdir() if tfds.core.Version.is_valid(child.name)]
  complete = [child for child in versions if (child / "dataset_info.json").exists()]
  return max(complete, key=lambda child: tfds.core.Version(child.name), default=None)


def find_or_explain(root: epath.Path, name: str, config: str | None) -> epath.Path:
  """Returns the folder of a prepared data set.

  Raises:
    UserError: if it is not prepared; says how to prepare it, or which name or config exists instead.
  """
  found = find(root, name, config)
  if found:
    return found
  full_name = f"{name}/{config}" if config else name
  others = [other for other in _folders(root / name) if find(root, name, other)]
  if others and not config:
    raise UserError(f"TFDS data set '{name}' has configs: write {' or '.join(f'{name}/{c}' for c in others)}")
  if not others:
    check_known(root, name)
  archives = missing_archives(root, name)
  first = f"put {' and '.join(archives)} into '{manual_dir(root)}' and " if archives else ""
  raise UserError(
    f"TFDS data set '{full_name}' is not prepared in '{root}' (TFDS_DATA_DIR): {first}run "
    f"python -m maskgen.tools.prepare_data --name={full_name}"
    + (f", or use {' or '.join(f'{name}/{c}' for c in others)}" if others else "")
  )


def check_known(root: epath.Path, name: str) -> None:
  """Checks that TFDS can prepare a data set.

  Raises:
    UserError: if there is none with this name.
  """
  known = {"digits", *tfds.list_builders(with_community_datasets=False)}
  if name in known:
    return
  prepared = [folder for folder in _folders(root) if folder != "downloads"]
  close = difflib.get_close_matches(name, {*known, *prepared}, n=1, cutoff=0.5)  # there are hundreds
  raise UserError(
    f"TFDS data set '{name}' is unknown and not prepared in '{root}'{nearest(name, close or prepared)}"
  )


def manual_dir(root: epath.Path) -> epath.Path:
  """The folder in which TFDS expects manually downloaded files."""
  return root / "downloads" / "manual"


def missing_archives(root: epath.Path, name: str) -> list[str]:
  """Returns the names of archives that must be downloaded manually and are missing."""
  return [archive for archive in _ARCHIVES.get(name, ()) if not (manual_dir(root) / archive).exists()]


def _folders(root: epath.Path) -> list[str]:
  return sorted(child.name for child in root.iterdir() if child.is_dir()) if root.is_dir() else []
