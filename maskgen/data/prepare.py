"""Prepares data sets with TFDS, downloading what is not there, for the source `tfds:NAME`."""

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
  """A prepared data set: NAME or NAME/CONFIG, its folder, its file format and the sizes of its splits."""

  name: str
  folder: epath.Path
  file_format: str
  splits: dict[str, int]


def locate(root: epath.Path, name: str) -> Prepared | None:
  """Returns a data set that is prepared in the data folder `root`, or None.

  Raises:
    UserError: if neither TFDS nor the folder knows the name, or the config.
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

  A preparation that was interrupted is begun again; complete downloads are kept.

  Args:
    root: the data folder.
    name: NAME, which stands for its default config if it has any, or NAME/CONFIG.
    file_format: "array_record" or "tfrecord".

  Raises:
    UserError: if the name is unknown, files that are fetched by hand are missing, or it fails.
  """
  name, config = _full_name(root, name)
  _check_manual_files(root, name)
  try:
    builder = _builder_class(name)(config=config, data_dir=root, file_format=file_format)
    if builder.data_path.exists():
      raise UserError(f"'{builder.data_path}' is there but incomplete: remove it and start again")
    _check_connection(root, builder)
    builder.download_and_prepare()
  except UserError:
    raise
  except Exception as error:  # whatever the code of one data set, or a network, can raise
    reason = " ".join(str(error).split()) or type(error).__name__
    raise UserError(f"'{name}' cannot be prepared in '{root}': {reason}") from error
  prepared = locate(root, f"{name}/{config}" if config else name)
  if not prepared:
    raise UserError(f"'{name}' was not written to '{root}': remove what is there and start again")
  return prepared


def _full_name(root: epath.Path, name: str) -> tuple[str, str | None]:
  """Splits a name and adds the config that it stands for."""
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
  """Checks that the files of a data set which are fetched by hand are there.

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
    raise UserError(f"'{name}' needs files in '{folder}' that are fetched by hand: {text}")


def _check_connection(root: epath.Path, builder: tfds.core.DatasetBuilder) -> None:
  """Checks that there is a network, as TFDS itself tries for minutes.

  Raises:
    UserError: if there is none, and nothing was downloaded before.
  """
  urls = [url for url in builder.url_infos or () if url.startswith("http")]
  if not urls:
    return
  try:
    urllib.request.urlopen(urls[0], timeout=_SECONDS_TO_CONNECT).close()  # reads the headers only
  except urllib.error.HTTPError:
    pass  # an answer, if not the one to a download
  except (OSError, ValueError) as error:
    problem = f"'{builder.name}' cannot be downloaded from {urls[0]} ({error})"
    if not (root / "downloads").exists():
      raise UserError(
        f"{problem}: check the network, or prepare it on a machine that has one and copy it to '{root}'"
      ) from error
    logging.getLogger("maskgen").warning("%s; trying with what was downloaded before", problem)
