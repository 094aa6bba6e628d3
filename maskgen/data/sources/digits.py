"""The embedded data set: scikit-learn's 1,797 handwritten digits as a TFDS data set."""

import contextlib
import io
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from maskgen.data import tfds_folder
from maskgen.data.cpu_tf import tf
from maskgen.data.sources import Source, check_split, source
from maskgen.errors import UserError

SPLITS = ("train", "test")
_TEST_SIZE = 360


class Digits(tfds.core.GeneratorBasedBuilder):
  """Images uint8 [8, 8, 1] in 0..255 with labels 0..9: 1,437 for training, 360 for testing."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Handwritten digits of 8x8 pixels, as distributed with scikit-learn.",
      homepage="https://archive.ics.uci.edu/dataset/80",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
          "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
        }
      ),
      supervised_keys=("image", "label"),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    del dl_manager  # the data is part of scikit-learn
    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    train, test = train_test_split(
      np.arange(len(labels)), test_size=_TEST_SIZE, stratify=labels, random_state=0
    )
    return {
      "train": self._generate_examples(images, labels, np.sort(train)),
      "test": self._generate_examples(images, labels, np.sort(test)),
    }

  def _generate_examples(
    self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
  ) -> Iterator[tuple[int, dict]]:
    for index in indices:
      yield int(index), {"image": images[index], "label": int(labels[index])}


def prepare() -> Digits:
  """Returns the builder, after writing the data set to TFDS's data folder if it is missing.

  Several processes may call this concurrently.

  Raises:
    UserError: if the data folder cannot be written.
  """
  data_dir = tfds_folder.data_dir()
  builder = Digits(data_dir=data_dir)
  if builder.data_path.exists():
    return builder
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download although there is none
      builder.download_and_prepare()
  except (OSError, tf.errors.OpError) as error:
    # TFDS renames a temporary folder, which fails if another process was faster.
    builder = Digits(data_dir=data_dir)
    if not builder.data_path.exists():
      raise UserError(
        f"the digits cannot be written to '{data_dir}' ({error}): set the environment variable "
        "TFDS_DATA_DIR to a writable folder"
      ) from error
  return builder


def load(split: str) -> tuple[tf.Tensor, tf.Tensor]:
  """Returns an entire split: PNG files as strings [n], and labels int64 [n]."""
  builder, decoders = prepare(), {"image": tfds.decode.SkipDecoding()}
  if builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD:
    records = list(builder.as_data_source(split=split, decoders=decoders))
  else:
    records = list(builder.as_dataset(split=split, decoders=decoders).as_numpy_iterator())
  images = tf.constant([record["image"] for record in records])
  return images, tf.constant([record["label"] for record in records], tf.int64)


@source("digits")
def open_digits(argument: str, split: str) -> Source:
  """Opens a split, held in memory."""
  del argument
  check_split("digits", split, SPLITS)
  images, labels = load(split)

  def fetch(index: tf.Tensor) -> dict[str, tf.Tensor]:
    return {"image": tf.gather(images, index), "label": tf.gather(labels, index)}

  class_names = tuple(str(digit) for digit in range(10))
  return Source("digits", len(images), class_names, fetch, f"{Digits.VERSION} {split}")
