"""What a user calls: `maskgen.load(...)` and the models that it returns, a class per kind.

An objective names its class by its `serving` attribute.
"""

from maskgen.serving.classifier import Classifier
from maskgen.serving.image_words import ImageWords
from maskgen.serving.loading import load
from maskgen.serving.model import Model
from maskgen.serving.text_to_image import TextToImageModel
from maskgen.serving.token_model import TokenModel
from maskgen.serving.tokenizer import Tokenizer

__all__ = ["Classifier", "ImageWords", "Model", "TextToImageModel", "TokenModel", "Tokenizer", "load"]
