"""Models that classify images."""

import numpy as np

from maskgen import images as images_lib
from maskgen.serving.tokenizer import Tokenizer


class Classifier(Tokenizer):
  """A classifier on an image encoder; with the tokenizer, if the encoder has one.

  model = maskgen.load("runs/finetune")
  probabilities = model.classify(images)  # float32 [b, classes]
  names = [model.classes[best] for best in probabilities.argmax(axis=-1)]
  features = model.features(images)  # float32 [b, d], below the head
  """

  def classify(self, images: images_lib.Pictures) -> np.ndarray:
    """Returns class probabilities, float32 [b, classes], in the order of `classes`, their names."""
    return self._each("classify", {"image": self.check_images(images)})
