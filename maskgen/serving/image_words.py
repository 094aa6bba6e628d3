"""Images as words for a frozen text-to-image model (ViLex), as in "a {} on a red background".

Letters: s images in a prompt, n tokens of an image, k of them that are used, d their width, m words, p pieces
of a prompt between its images.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from maskgen import images as images_lib
from maskgen.errors import UserError, counted
from maskgen.numerics.prompts import PLACE
from maskgen.serving import requests, token_files
from maskgen.serving.model import Model

# The number of tokens of every image, or a list with one for each; None for as many as fit.
Numbers = int | Sequence[int | None] | None


class ImageWords(Model):
  """A ViLex model: encodes images as vectors among words, and generates images from such prompts.

  model = maskgen.load("runs/vilex_digits/vilex")
  tokens = model.encode(images)  # float32 [b, n, d]
  made = model.generate(prompt="a {} on a red background", images=[image])
  """

  objective: Any  # such as `maskgen.objectives.vilex.Objective`

  def encode(self, images: images_lib.Pictures, num_tokens: int | None = None) -> np.ndarray:
    """Returns the first `num_tokens` tokens of images, by default all, float32 [b, k, d].

    They take the place of word embeddings in prompts; the first ones carry the most important information.
    """
    number = self._check_number(num_tokens)
    return self._each("encode", {"image": self.check_images(images)})[:, :number]

  def reconstruct(
    self, images: images_lib.Pictures, num_tokens: int | None = None, seed: int = 0, **options: Any
  ) -> np.ndarray:
    """Reconstructs images from their first `num_tokens` tokens, by default all; keeps their dtype.

    Different seeds give variations. Options are those of `generate`.
    """
    checked = self.check_images(images)
    number = np.full((len(checked), 1), self._check_number(num_tokens), np.int32)
    request = {"image": checked, "number": number, "key": requests.keys(seed, len(checked))}
    return images_lib.like(checked, self._each("reconstruct", request, **self._options(options)))

  def generate(
    self,
    seed: int = 0,
    batch: int | None = None,
    prompt: str | Sequence[str] | None = None,
    images: Sequence[np.ndarray] | np.ndarray | None = None,
    num_tokens: Numbers = None,
    negative_prompt: str | Sequence[str] | None = None,
    **options: Any,
  ) -> np.ndarray:
    """Generates images, float32 [batch, h, w, c] in [0, 1]; image i depends on the seed, i and the prompt.

    Args:
      seed: random seed.
      batch: the number of images; by default one per prompt, or the leading axis of `images`.
      prompt: a text, or one per generated image, with "{}" in place of each image. Without "{}", images come
        before the words, or after them if the model was trained that way.
      images: the images of the prompt: each [h, w, c], or its tokens [k, d] from `encode`; or with a leading
        axis b, one for each generated image.
      num_tokens: the number of tokens of every image, or a list with one for each; by default all that fit.
      negative_prompt: a text, or one per generated image, that guidance steers away from; this requires an
        `image_guidance` other than 1, in a prompt of words alone a `text_guidance` other than 1.
      **options: the fields of `maskgen.models.vilex.ImageWordsSampling`; by default as in the config.
    """
    checked = self._options(options)
    request = self.request(seed, batch, prompt, images, num_tokens, negative_prompt)
    first = "image_guidance" if "vectors" in request else "text_guidance"
    if "negative" in request and checked.get(first, getattr(self.objective.sampling, first)) == 1:
      of = "with images" if "vectors" in request else "of words"
      raise UserError(
        f"negative_prompt has no effect on a prompt {of} at {first}=1: set another {first}, or leave it out"
      )
    return self._generate(request, checked)

  def request(
    self,
    seed: int,
    batch: int | None = None,
    prompt: str | Sequence[str] | None = None,
    images: Sequence[np.ndarray] | np.ndarray | None = None,
    num_tokens: Numbers = None,
    negative_prompt: str | Sequence[str] | None = None,
    *,
    start: int = 0,
  ) -> dict[str, Any]:
    """The batch for the prediction function `generate`, see there: images `start` to `start + batch`."""
    vectors = [self._vectors(image) for image in self._in_turn(images)]
    listed = isinstance(prompt, Iterable) and not isinstance(prompt, str)
    texts: list[Any] = [""] if prompt is None else list(prompt) if listed else [prompt]
    if not texts or not all(isinstance(text, str) for text in texts):
      raise UserError(f"prompt is {prompt!r}: give a text, or one per generated image")
    rows = max(len(texts), *(len(tokens) for tokens in vectors), 1)
    batch = requests.count(rows if batch is None else batch)
    if len(texts) not in (1, batch):
      raise UserError(
        f"prompt has {len(texts)} texts for {counted(batch, 'image')}: give one, or one for each"
      )
    laid = self._lay_out(texts, vectors, num_tokens, batch)
    request = {"key": requests.keys(seed, batch, start), **laid}
    if negative_prompt is not None:
      if not laid:
        raise UserError("negative_prompt needs a prompt that it is compared with: give words or images, too")
      request["negative"] = requests.captions(negative_prompt, batch, self.objective.texts)
    return request

  def interpolate(
    self, first: np.ndarray, second: np.ndarray, count: int = 5, seed: int = 0, **options: Any
  ) -> np.ndarray:
    """Interpolates between two images, float32 [count, h, w, c], all from the same noise.

    Args:
      first: an image [h, w, c], or its tokens [k, d].
      second: likewise; the smaller number of tokens is used for both.
      count: the number of images, including both ends.
      seed: of the noise.
      **options: as for `generate`, including `prompt` and `negative_prompt`.
    """
    start, end = (self._vectors(image)[0] for image in (first, second))
    made = [self.generate(seed, 1, images=[tokens], **options) for tokens in between(start, end, count)]
    return np.concatenate(made)

  def nearest_words(self, tokens: np.ndarray, count: int = 5) -> list[list[tuple[str, float]]]:
    """The words of the vocabulary nearest to each token of an image, with their cosines, the nearest first.

    Tokens are no words, and need not be near any: small cosines mean that no word says what a token does.

    Args:
      tokens: of an image, float [k, d], from `encode`.
      count: the number of words for each token.
    """
    count = requests.whole("count", count, least=1)
    texts, vectors, scale = self._vocabulary
    own, unit = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (tokens / scale, vectors))
    cosines = own @ unit.T
    order = np.argsort(-cosines, axis=-1, kind="stable")[:, :count]
    return [[(texts[i], float(row[i])) for i in best] for row, best in zip(cosines, order, strict=True)]

  @functools.cached_property
  def _vocabulary(self) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The words of the decoder, their vectors, and the scale of an image's tokens."""
    decoder, params = self.objective.text_to_image, self.variables["frozen"]["decoder"]
    table, scale = np.asarray(decoder.vocabulary(params)), np.asarray(decoder.scale(params))
    tokenizer = self.objective.texts.opened
    texts = [tokenizer.decode([i]) for i in range(len(table))]
    # Neither special ids nor pieces that only begin a word.
    known = [i for i, text in enumerate(texts) if tokenizer.encode(text) == [i]]
    return [texts[i] for i in known], table[np.array(known)], scale

  def look(self, images: images_lib.Pictures) -> np.ndarray:
    """Where the pooling looks for each token of images, float32 [b, n, h', w'] over the encoder's patches.

    The weights of its attention, the mean of heads and layers; those of a token sum to 1. The encoder has
    mixed patches before, so that a patch stands for more than its pixels.
    """
    weights = np.asarray(self._look(self.variables, {"image": self.check_images(images)}))
    return weights.reshape(*weights.shape[:2], *self.objective.image_encoder.encoder.positions.grid)

  @functools.cached_property
  def _look(self) -> Callable[[Any, Any], jax.Array]:
    part, pool = self.objective.image_encoder, self.objective.pool

    def look(variables: Any, batch: Any) -> Any:
      return pool.looks(variables["params"]["main"]["pool"], part.encode(variables, batch))

    return jax.jit(look)

  def lay_out(
    self, prompt: str, images: Sequence[np.ndarray], num_tokens: Numbers = None
  ) -> dict[str, np.ndarray]:
    """Assembles the inputs of the prediction function `generate` for one prompt.

    Args:
      prompt: as for `generate`.
      images: the tokens of its images, float [k, d] with k <= n.
      num_tokens: the number of tokens of every image, or a list with one for each; None means all that are
        given, or an equal share of what fits next to the words and the other images.

    Returns:
      For images, `vectors` [s, n, d] and `number` int32 [s]; for words, `words` int32 [p, m] and `num_words`
      int32 [p], where p is s + 1.

    Raises:
      UserError: if the numbers of "{}" and of images differ, a word is out-of-vocabulary, or the prompt is
        too long.
    """
    pieces = prompt.split(PLACE)
    if len(pieces) == 1:
      nothing = [""] * len(images)
      pieces = [prompt, *nothing] if self.objective.words.place == "behind" else [*nothing, prompt]
    if len(pieces) != len(images) + 1:
      places, given = counted(len(pieces) - 1, "place"), counted(len(images), "image")
      raise UserError(f"the prompt '{prompt}' has {places} {PLACE} for {given}: give one for each, or none")
    tokenizer, limit = self.objective.texts.opened, self.objective.text_to_image.max_prompt_tokens
    for piece in pieces:
      unknown = tokenizer.unknown(piece)
      if unknown is not None:
        raise UserError(f"the prompt '{prompt}' has the out-of-vocabulary word {unknown}")
    ids = [tokenizer.encode(piece) for piece in pieces]
    num_words = [len(piece) for piece in ids]
    number = self._share_tokens(prompt, images, num_tokens, limit - sum(num_words))
    laid: dict[str, np.ndarray] = {}
    if images:
      vectors = [np.pad(tokens, ((0, self.objective.tokens - len(tokens)), (0, 0))) for tokens in images]
      laid |= {"vectors": np.stack(vectors).astype(np.float32), "number": np.array(number, np.int32)}
    if any(num_words):
      words = np.array([piece + [0] * (limit - len(piece)) for piece in ids], np.int32)
      laid |= {"words": words, "num_words": np.array(num_words, np.int32)}
    return laid

  def write_tokens(self, path: epath.PathLike, tokens: np.ndarray) -> None:
    """Writes tokens of images, float [b, k, d]; see `token_files.write_tokens`."""
    token_files.write_tokens(path, tokens)

  def write_embedding(self, path: epath.PathLike, tokens: np.ndarray) -> None:
    """Writes an image's tokens, float [k, d], as a textual inversion; see `token_files.write_embedding`."""
    token_files.write_embedding(path, tokens, self.objective.text_to_image.model.text_widths)

  def read_tokens(self, path: epath.PathLike) -> np.ndarray:
    """Reads a token file or a textual inversion, float32 [b, k, d]; see `token_files.read_tokens`."""
    return token_files.read_tokens(
      path, self.objective.text_to_image.model.text_widths, self.objective.tokens
    )

  def _check_number(self, num_tokens: int | None) -> int:
    """Returns the number of tokens of an image, by default all; checks that the model has as many."""
    most = self.objective.tokens
    if num_tokens is None:
      return most
    if not isinstance(num_tokens, int | np.integer) or not 1 <= num_tokens <= most:
      raise UserError(f"num_tokens is {num_tokens!r}: this model has 1 to {most} per image")
    return int(num_tokens)

  def _in_turn(self, images: Iterable[np.ndarray] | None) -> Iterable[np.ndarray]:
    """Returns the images of a prompt; rejects a single image, whose rows would be mistaken for images."""
    if isinstance(images, Image.Image) or getattr(images, "shape", None) == self.objective.image_shape:
      raise UserError("images is a single image: give a list, images=[image]")
    return () if images is None else images

  def _vectors(self, image: np.ndarray) -> np.ndarray:
    """The tokens [b, k, d] of an image of a prompt, see `generate`; b is 1 without a leading axis."""
    given = images_lib.as_array(image)
    is_tokens = given.ndim > 1 and given.shape[-1] == sum(self.objective.text_to_image.model.text_widths)
    if is_tokens and given.ndim < 4:
      self._check_number(given.shape[-2])
      return given.reshape(-1, *given.shape[-2:])
    return self.encode(given if given.ndim == 4 else given[None])

  def _lay_out(
    self, prompts: Sequence[str], images: Sequence[np.ndarray], num_tokens: Numbers, batch: int
  ) -> dict[str, np.ndarray]:
    """`lay_out` for a batch: row i uses prompt i and row i of images [b, k, d]; a single one is for all."""
    for tokens in images:
      if len(tokens) not in (1, batch):
        raise UserError(
          f"an image of the prompt has {len(tokens)} rows for a batch of {batch}: give one image, or one per "
          "generated image"
        )
    rows = [
      self.lay_out(prompts[i % len(prompts)], [tokens[i % len(tokens)] for tokens in images], num_tokens)
      for i in range(batch)
    ]
    nothing = {name: np.zeros_like(value) for row in rows for name, value in row.items()}
    return {name: np.stack([row.get(name, none) for row in rows]) for name, none in nothing.items()}

  def _share_tokens(
    self, prompt: str, images: Sequence[np.ndarray], num_tokens: Numbers, limit: int
  ) -> list[int]:
    """The number of tokens of each image in a prompt with space for `limit` of them; words are never cut."""
    if num_tokens is None or isinstance(num_tokens, int | np.integer):
      wanted: list[int | None] = [num_tokens] * len(images)
    else:
      wanted = list(num_tokens)
    if len(wanted) != len(images):
      raise UserError(
        f"num_tokens has {counted(len(wanted), 'number')} for {counted(len(images), 'image')}: give one for "
        "each, or one for all"
      )
    if limit < len(images):
      needs, excess = counted(len(images), "image"), counted(-limit, "token")
      what = f"leaves no room for {needs}" if images else f"is {excess} too long"
      raise UserError(f"the prompt '{prompt}' {what}: shorten it")
    left, sharing = limit, 0
    for number, tokens in zip(wanted, images, strict=True):
      if number is None:
        sharing += 1
      elif self._check_number(number) > len(tokens):
        raise UserError(
          f"num_tokens is {number}, but only {len(tokens)} tokens of the image are given: give a lower number"
        )
      else:
        left -= number
    if left < sharing:
      rest = f" and leaves too few for {counted(sharing, 'other image')}" if sharing else ""
      raise UserError(
        f"num_tokens asks for {counted(limit - left, 'token')}{rest}: next to the words "
        f"of '{prompt}', at most {limit} fit"
      )
    share = left // max(sharing, 1)
    return [
      min(len(tokens), share) if number is None else number
      for number, tokens in zip(wanted, images, strict=True)
    ]


def between(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
  """Interpolates tokens spherically between two images, float32 [count, k, d], including both ends.

  Args:
    first: float [k, d].
    second: likewise; the smaller k is used for both.
    count: the number of steps, at least 1.

  Raises:
    UserError: if `count` is less than 1.
  """
  count = requests.whole("count", count, least=1)
  first, second = first[: len(second)], second[: len(first)]
  return np.stack([_on_arc(first, second, share) for share in np.linspace(0.0, 1.0, count)])


def _on_arc(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
  """Rotates each vector of [k, d] towards its counterpart by a share of the angle between them."""

  def norm(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=-1, keepdims=True)

  cosine = (first * second).sum(-1, keepdims=True) / np.maximum(norm(first) * norm(second), 1e-12)
  angle = np.arccos(np.clip(cosine, -1.0, 1.0))
  sine = np.sin(angle)
  # The arc between parallel vectors is a line.
  flat = sine < 1e-4
  safe = np.where(flat, 1.0, sine)
  of_first = np.where(flat, 1.0 - share, np.sin((1.0 - share) * angle) / safe)
  of_second = np.where(flat, share, np.sin(share * angle) / safe)
  return (of_first * first + of_second * second).astype(np.float32)
