"""The pictures of a folder that are most similar to another picture in a model's features."""

import logging
import pathlib
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from maskgen import images
from maskgen.data.listing import is_hidden, is_picture
from maskgen.demo import pictures
from maskgen.errors import UserError
from maskgen.serving import Model

MOST_PICTURES = 10_000
_BATCH = 64
_THUMBNAIL = 96  # pixels of the longer side
_NEAREST = 8

log = logging.getLogger("maskgen")


class Gallery:
  """Features and thumbnails of the pictures in a folder, computed once; damaged files are left out.

  Raises:
    UserError: if the folder has no readable pictures, or the model has no features.
  """

  def __init__(self, model: Model, folder: str):
    root = pathlib.Path(folder)
    found = (file for file in root.rglob("*") if is_picture(file.name) and file.is_file())
    files = sorted(file for file in found if not any(map(is_hidden, file.relative_to(root).parts)))
    if len(files) > MOST_PICTURES:
      log.warning("--folder=%s: only the first %d of %d pictures are used", folder, MOST_PICTURES, len(files))
      files = files[:MOST_PICTURES]
    self._model = model
    self._entries: list[dict[str, Any]] = []
    features = []
    for start in tqdm(range(0, len(files), _BATCH), desc=f"reading {folder}"):
      fitted = []
      for file in files[start : start + _BATCH]:
        try:
          picture = images.on_white(images.open_picture(file, str(file)))
        except UserError as error:
          log.warning("%s", error)
          continue
        fitted.append(pictures.fit(picture, model))
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        shown = pictures.encode(np.asarray(picture))
        self._entries.append({"name": file.relative_to(root).as_posix(), "image": shown})
      if fitted:
        features.append(self._directions(np.stack(fitted)))
    if not features:
      raise UserError(f"--folder={folder} has no readable pictures: give a folder that has some")
    self._features = np.concatenate(features)

  def nearest(self, picture: Image.Image) -> list[dict[str, Any]]:
    """The most similar pictures, best first: "name", "image", and "share", the cosine between features."""
    cosines = self._features @ self._directions(pictures.fit(picture, self._model)[None])[0]
    best = np.argsort(-cosines, kind="stable")[:_NEAREST]
    return [{**self._entries[i], "share": float(cosines[i])} for i in best]

  def _directions(self, pixels: np.ndarray) -> np.ndarray:
    features = self._model.features(pixels)
    return features / np.linalg.norm(features, axis=1, keepdims=True)
