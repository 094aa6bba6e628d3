"""Sets of generated images on disk, written by any number of processes in any order.

A set is a folder with `manifest.json`, which says how the images are made, and one of

- png: a file for each image, `00000123.png` for image 123, in exactly its size; with `labels.csv` or
  `captions.csv`, so that the data source `folder:` reads them, too;
- npz: `samples.npz` with `arr_0`, uint8 [n, h, w, 3], and with classes `arr_1`, int64 [n], the layout of
  ADM's evaluation (Dhariwal and Nichol 2021); until the set is complete, each batch as `part_START_STOP.npy`.
"""

import abc
import concurrent.futures
import csv
import io
import json
import logging
import time
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from maskgen import files, tree
from maskgen import images as images_lib
from maskgen.errors import UserError
from maskgen.serving.model import Model

SAMPLES = "samples.npz"
# The keys of a manifest that may differ when a set is continued.
_ABOUT = ("model", "made_with")
_END_OF_PNG = b"IEND\xaeB`\x82"
_REGENERATE = "delete it, and run the same command again"
_SECONDS = 10.0  # between lines about the progress

log = logging.getLogger("maskgen")


class SampleSet(abc.ABC):
  """The images `start` to `start + count` of a model, in a folder.

  Args:
    folder: an existing one.
    manifest: with `start`, `count` and `image_shape` (h, w, c), and whatever else decides about the images.
    labels: the class of each image, int [count], or None.
    captions: the caption of each image, or None.
  """

  def __init__(
    self,
    folder: epath.Path,
    manifest: Mapping[str, Any],
    labels: np.ndarray | None = None,
    captions: list[str] | None = None,
  ):
    self.folder = folder
    self.start: int = manifest["start"]
    self.count: int = manifest["count"]
    self.image_shape = tuple(manifest["image_shape"])
    self.labels = labels
    self.captions = captions

  @abc.abstractmethod
  def missing(self) -> np.ndarray:
    """Whether each image is still to be written, bool [count]."""

  @abc.abstractmethod
  def write(self, first: int, images: np.ndarray) -> None:
    """Writes images [b, h, w, c], uint8 or float in [0, 1]; the first of them is image `first`."""

  @abc.abstractmethod
  def finish(self) -> None:
    """Completes a set that misses no image; any number of processes may do so."""


def create(
  folder: epath.Path,
  manifest: Mapping[str, Any],
  labels: np.ndarray | None = None,
  captions: list[str] | None = None,
) -> SampleSet:
  """Begins a set, or continues one that was begun with the same manifest; see `SampleSet`.

  Args:
    folder: where.
    manifest: also with `format`, one of `FORMATS`.
    labels: see `SampleSet`.
    captions: see `SampleSet`.

  Raises:
    UserError: if the folder holds anything else, or a set that was begun with another manifest.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path, now = folder / files.MANIFEST, json.loads(json.dumps(manifest))
  # Listed first: the manifest is older than anything that another process writes meanwhile.
  others = [file.name for file in folder.iterdir() if file.suffix != ".tmp"]
  if path.exists():
    before = files.read_json(path, "give another folder")
    theirs, ours = _settings(before), _settings(now)
    for name in sorted(theirs.keys() | ours.keys()):
      if theirs.get(name) != ours.get(name):
        raise UserError(
          f"{folder} has images with {name} {theirs.get(name)!r}, not {ours.get(name)!r}: give another "
          "folder, or the flags that it was begun with"
        )
    if before.get("made_with") != now.get("made_with"):
      log.warning(
        "%s was begun with %s: the rest of its images, made with %s, may be rounded differently",
        *(folder, before.get("made_with"), now.get("made_with")),
      )
  elif others:
    raise UserError(f"{folder} is not empty: give a new folder for the images")
  else:
    files.replace(path, json.dumps(now, indent=2))
  return FORMATS[manifest["format"]](folder, manifest, labels, captions)


def _settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
  """What decides about the images, by names such as `sampling/steps`."""
  return tree.flatten({key: value for key, value in manifest.items() if key not in _ABOUT})


class Pngs(SampleSet):
  """A file for each image."""

  def missing(self) -> np.ndarray:
    there = {file.name for file in self.folder.iterdir()}
    names = map(self._name, range(self.count))
    return np.array([name not in there or not self._complete(self.folder / name) for name in names], bool)

  def write(self, first: int, images: np.ndarray) -> None:
    for number, image in enumerate(images_lib.to_rgb(images), first - self.start):
      # Not synchronized: `missing` finds a file that a power failure cut off.
      files.replace(self.folder / self._name(number), images_lib.png(image), sync=False)

  def finish(self) -> None:
    columns: dict[str, Any] = {"label": self.labels, "caption": self.captions}
    for column, values in columns.items():
      if values is not None:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(("file", column))
        rows.writerows((self._name(number), value) for number, value in enumerate(values))
        files.replace(self.folder / f"{column}s.csv", text.getvalue())

  def _name(self, number: int) -> str:
    return f"{self.start + number:08d}.png"

  def _complete(self, path: epath.Path) -> bool:
    """Whether a file has its end; in stores all have."""
    if "://" in str(path):
      return True
    with path.open("rb") as file:
      file.seek(max(file.seek(0, io.SEEK_END) - len(_END_OF_PNG), 0))
      return file.read() == _END_OF_PNG


class Npz(SampleSet):
  """One file of all images."""

  def missing(self) -> np.ndarray:
    missing = np.ones(self.count, bool)
    if (self.folder / SAMPLES).exists():
      return ~missing
    for first, stop, _ in self._parts():
      missing[first:stop] = False
    return missing

  def write(self, first: int, images: np.ndarray) -> None:
    data, stop = io.BytesIO(), first + len(images)
    np.save(data, images_lib.to_rgb(images))
    files.replace(self.folder / f"part_{first:08d}_{stop:08d}.npy", data.getvalue())

  def finish(self) -> None:
    path = self.folder / SAMPLES
    temporary = self.folder / f"{SAMPLES}.{uuid.uuid4().hex}.tmp"
    if not path.exists():
      try:
        with temporary.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
          self._write_arrays(archive)
        temporary.replace(path)
      except FileNotFoundError:  # another process has finished, and removed the parts
        if not path.exists():
          raise
      finally:
        temporary.unlink(missing_ok=True)
    for _, _, part in self._parts():
      part.unlink(missing_ok=True)

  def _write_arrays(self, archive: zipfile.ZipFile) -> None:
    """Writes the arrays, one part in memory at a time."""

    def opened(name: str) -> IO[bytes]:
      return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)  # without the time

    shape = (self.count, *self.image_shape[:2], 3)
    with opened("arr_0") as out:
      header = {"descr": "|u1", "fortran_order": False, "shape": shape}
      np.lib.format.write_array_header_1_0(out, header)
      done = 0
      for first, stop, part in self._parts():
        if first <= done < stop:  # parts overlap where the size of batches was changed
          out.write(self._read(part, (stop - first, *shape[1:]))[done - first :].tobytes())
          done = stop
      if done < self.count:
        raise FileNotFoundError(f"{self.folder} has no part with image {self.start + done}")
    if self.labels is not None:
      with opened("arr_1") as out:
        np.lib.format.write_array(out, self.labels.astype(np.int64))

  def _read(self, part: epath.Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
      images = np.load(io.BytesIO(part.read_bytes()))
      if (images.dtype, images.shape) != (np.uint8, shape):
        raise ValueError(f"{images.dtype}{list(images.shape)} instead of uint8{list(shape)}")
    except (EOFError, ValueError) as error:
      raise files.damaged(part, error, _REGENERATE) from None
    return images

  def _parts(self) -> Iterator[tuple[int, int, epath.Path]]:
    """First and last image, counted from `start`, and file of each part, in order."""
    for part in sorted(self.folder.glob("part_*_*.npy")):
      first, stop = (int(number) - self.start for number in part.stem.split("_")[1:])
      yield first, stop, part


FORMATS: dict[str, type[SampleSet]] = {"png": Pngs, "npz": Npz}


def fill(
  made: SampleSet,
  model: Model,
  seed: int,
  conditions: Mapping[str, Any],
  options: Mapping[str, Any],
  batch_size: int = 64,
  share: tuple[int, int] = (0, 1),
) -> None:
  """Generates the missing images of a set on all devices of this process, and writes them.

  Image i is always row i mod `batch_size` of a batch of this size on one device, whatever else is generated:
  only another batch size, or another kind of device, may round it differently.

  Args:
    made: the set.
    model: a model that generates.
    seed: image i depends only on this, i and its condition.
    conditions: arguments of `model.request`: one value for each image of the set, or a text for all of them.
    options: of `generate`.
    batch_size: images per batch on each device.
    share: which batches are generated, (i, n): every n-th, from the i-th on.
  """
  spread, devices = model.on_local_devices(), jax.local_device_count()
  missing = made.missing()

  def wanted(batch: int) -> range:
    """The images of a batch that belong to the set, counted from its start."""
    first = batch * batch_size - made.start
    return range(max(first, 0), min(first + batch_size, made.count))

  def request(batch: int) -> dict[str, Any]:
    first = batch * batch_size
    places = np.arange(first - made.start, first - made.start + batch_size).clip(0, made.count - 1)
    given = {
      name: values if isinstance(values, str) else [values[place] for place in places]
      for name, values in conditions.items()
    }
    whole: Any = model
    return dict(whole.request(seed, batch_size, **given, start=first))

  def write(group: Sequence[int], images: np.ndarray) -> None:
    for number, batch in enumerate(group):
      own = wanted(batch)
      first = number * batch_size + made.start + own.start - batch * batch_size
      made.write(made.start + own.start, images[first : first + len(own)])

  last = -(-(made.start + made.count) // batch_size)
  batches = [batch for batch in range(made.start // batch_size, last) if batch % share[1] == share[0]]
  batches = [batch for batch in batches if missing[slice(wanted(batch).start, wanted(batch).stop)].any()]
  log.info("%d of %d images are there; %d batches to make", (~missing).sum(), made.count, len(batches))
  began = said = time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(1) as executor:  # writes while the devices compute
    writing: concurrent.futures.Future[None] | None = None
    for done in range(0, len(batches), devices):
      group = batches[done : done + devices]
      parts = [request(batch) for batch in group]
      parts += parts[-1:] * (devices - len(group))
      joined = {name: jnp.concatenate([part[name] for part in parts]) for name in parts[0]}
      images = spread.call("generate", joined, **options)
      if writing is not None:
        writing.result()
      writing = executor.submit(write, group, images)
      now, number = time.monotonic(), done + len(group)
      if now - said > _SECONDS or number == len(batches):
        said, rate = now, number * batch_size / (now - began)
        left = (len(batches) - number) * batch_size / rate
        log.info(
          "batch %d of %d | %.1f images/s | %d:%02d left",
          number,
          len(batches),
          rate,
          *divmod(round(left), 60),
        )
    if writing is not None:
      writing.result()
