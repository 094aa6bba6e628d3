"""The user-facing API: `maskgen.load(...)` and the classes of the models that it returns.

An objective names its class in its attribute `serving`.
"""

from maskgen.serving.classifier import Classifier
from maskgen.serving.generative import GenerativeModel
from maskgen.serving.image_words import ImageWords
from maskgen.serving.loading import load
from maskgen.serving.model import Model
from maskgen.serving.text_to_image import TextToImageModel
from maskgen.serving.token_model import TokenModel
from maskgen.serving.tokenizer import Tokenizer

__all__ = [
  "Classifier",
  "GenerativeModel",
  "ImageWords",
  "Model",
  "TextToImageModel",
  "TokenModel",
  "Tokenizer",
  "load",
]
