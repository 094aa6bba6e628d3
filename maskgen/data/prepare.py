"""Downloads and prepares data sets with TFDS, for the source `tfds:NAME`."""

import logging
import urllib.error
import urllib.request
from typing import NamedTuple

import tensorflow_datasets as tfds
from etils import epath

from maskgen.data import tfds_folder
from maskgen.data.sources.digits import Digits
from maskgen.errors import UserError, nearest

_SECONDS_TO_CONNECT = 10


class Prepared(NamedTuple):
  """A prepared data set: NAME or NAME/CONFIG, folder, file format and split sizes."""

  name: str
  folder: epath.Path
  file_format: str
  splits: dict[str, int]


def locate(root: epath.Path, name: str) -> Prepared | None:
  """Returns a data set if it is prepared in the data folder `root`, else None.

  Raises:
    UserError: if neither TFDS nor the folder has the name or the config.
  """
  name, config = _full_name(root, name)
  folder = tfds_folder.find(root, name, config)
  if not folder:
    return None
  info = tfds.builder_from_directory(folder).info
  splits = {split: part.num_examples for split, part in info.splits.items()}
  return Prepared(f"{name}/{config}" if config else name, folder, info.file_format.value, splits)


def prepare(root: epath.Path, name: str, file_format: str) -> Prepared:
  """Downloads and prepares a data set that is not in the data folder `root`.

  An interrupted preparation starts over; complete downloads are kept.

  Args:
    root: the data folder.
    name: NAME, which means its default config if it has any, or NAME/CONFIG.
    file_format: "array_record" or "tfrecord".

  Raises:
    UserError: if the name is unknown, manually downloaded files are missing, or the preparation fails.
  """
  name, config = _full_name(root, name)
  _check_manual_files(root, name)
  try:
    builder = _builder_class(name)(config=config, data_dir=root, file_format=file_format)
    if builder.data_path.exists():
      raise UserError(f"'{builder.data_path}' exists but is incomplete: remove it and start again")
    _check_connection(root, builder)
    builder.download_and_prepare()
  except UserError:
    raise
  except Exception as error:  # anything that the data set's own code or the network raises
    reason = " ".join(str(error).split()) or type(error).__name__
    raise UserError(f"'{name}' cannot be prepared in '{root}': {reason}") from error
  prepared = locate(root, f"{name}/{config}" if config else name)
  if not prepared:
    raise UserError(f"'{name}' was not written to '{root}': empty the folder and start again")
  return prepared


def _full_name(root: epath.Path, name: str) -> tuple[str, str | None]:
  """Splits a name and adds its default config."""
  name, config = tfds_folder.parse_name(name)
  if tfds_folder.find(root, name, config):
    return name, config
  tfds_folder.check_known(root, name)
  builder_class = _builder_class(name)
  configs = list(builder_class.builder_configs)
  if config and config not in configs:
    raise UserError(f"TFDS data set '{name}' has no config '{config}'{nearest(config, configs)}")
  return name, config or builder_class.DEFAULT_BUILDER_CONFIG_NAME or next(iter(configs), None)


def _builder_class(name: str) -> type[tfds.core.DatasetBuilder]:
  return Digits if name == "digits" else tfds.builder_cls(name)


def _check_manual_files(root: epath.Path, name: str) -> None:
  """Checks that files which must be downloaded manually are present.

  Raises:
    UserError: if they are not.
  """
  folder = tfds_folder.manual_dir(root)
  archives = tfds_folder.missing_archives(root, name)
  if archives:
    raise UserError(f"'{name}' needs {' and '.join(archives)} in '{folder}': put them there first")
  instructions = _builder_class(name).MANUAL_DOWNLOAD_INSTRUCTIONS
  if instructions and not (folder.is_dir() and any(folder.iterdir())):
    text = " ".join(instructions.split())
    raise UserError(f"'{name}' needs files in '{folder}' that must be downloaded manually: {text}")


def _check_connection(root: epath.Path, builder: tfds.core.DatasetBuilder) -> None:
  """Checks the network connection, as TFDS itself retries for minutes.

  Raises:
    UserError: if there is none and nothing was downloaded before.
  """
  urls = [url for url in builder.url_infos or () if url.startswith("http")]
  if not urls:
    return
  try:
    urllib.request.urlopen(urls[0], timeout=_SECONDS_TO_CONNECT).close()  # reads the headers only
  except urllib.error.HTTPError:
    pass  # the server responds, if only to a download
  except (OSError, ValueError) as error:
    problem = f"'{builder.name}' cannot be downloaded from {urls[0]} ({error})"
    if not (root / "downloads").exists():
      raise UserError(
        f"{problem}: check the network, or prepare it on a machine that has one and copy it to '{root}'"
      ) from error
    logging.getLogger("maskgen").warning("%s; using earlier downloads", problem)
