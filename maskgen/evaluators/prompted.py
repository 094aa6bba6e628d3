"""Pictures for prompts of one image and words, as evaluations of edits draw them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from maskgen.errors import UserError
from maskgen.evaluators.batches import gather, key_shapes, place
from maskgen.evaluators.context import Batch, Call, Context
from maskgen.evaluators.vilex import as_words

# The places of the image and of the new word in a prompt.
IMAGE, WORD = "{}", "*"


def check_options(edits: Any) -> None:
  """Checks `num_images`, `num_pictures`, `text_guidance` and `sampling` of an evaluator of edits.

  Raises:
    UserError: if one of them is wrong.
  """
  if edits.num_images < 1 or edits.num_pictures < 1 or not edits.text_guidance:
    raise UserError(
      f"num_images is {edits.num_images}, num_pictures {edits.num_pictures} and text_guidance "
      f"{edits.text_guidance}: give at least 1 of each"
    )
  if "text_guidance" in edits.sampling:
    raise UserError("sampling has text_guidance: give all its values as text_guidance instead")
  for guidance in edits.text_guidance:
    edits.context.check_sampling({**edits.sampling, "text_guidance": guidance})


def check_prompt(kind: str, prompt: Any) -> None:
  """Checks that a prompt has a place for the image and one for the word.

  Raises:
    UserError: if not.
  """
  if not isinstance(prompt, str) or prompt.count(IMAGE) != 1 or prompt.count(WORD) != 1:
    raise UserError(f"prompts.{kind} is {prompt!r}: give a text with one {IMAGE} and one {WORD}")


def words_around(context: Context, texts: Sequence[str]) -> dict[str, np.ndarray]:
  """The words before and after the image in each prompt, as `generate` takes them.

  Raises:
    UserError: for words that the model does not know.
  """
  captions = context.captions
  assert captions is not None
  pieces = zip(*(text.split(IMAGE) for text in texts), strict=True)
  return as_words(captions, np.stack([captions.read(piece) for piece in pieces], axis=1))


def trace(
  context: Context,
  call: Call,
  batch: Mapping[str, jax.ShapeDtypeStruct],
  tokens: jax.ShapeDtypeStruct,
  **options: Any,
) -> None:
  """Makes the call of `draw` with shapes: those of an evaluation batch, and of its images' tokens."""
  size = batch["valid"].shape[0]
  inputs = {
    "vectors": jax.ShapeDtypeStruct((size, 1, *tokens.shape[1:]), tokens.dtype),
    "number": jax.ShapeDtypeStruct((size, 1), np.int32),
    "key": key_shapes(batch),
    **jax.eval_shape(lambda: words_around(context, [IMAGE] * size)),
  }
  call("generate", inputs, **options)


def draw(
  context: Context,
  variables: Any,
  rng: jax.Array,
  like: Batch,
  sources: Mapping[str, np.ndarray],
  texts: Sequence[str],
  k: int,
  **options: Any,
) -> np.ndarray:
  """Pictures float32 [m, h, w, c] for m prompts and sources, with k tokens of each source; 0 for words alone.

  Args:
    context: the context of the run.
    variables: of the model.
    rng: a typed key.
    like: a batch that defines size and sharding.
    sources: "tokens" float32 [m, n, d] and "key", the data of their keys.
    texts: the prompts.
    k: the number of tokens.
    **options: of `generate`.
  """
  size, made = len(like["valid"]), []
  arrays = {"vectors": sources["tokens"][:, None], **words_around(context, texts)}
  for start in range(0, len(texts), size):
    rows: np.ndarray = np.arange(start, start + size) % len(texts)  # the surplus repeats the first rows
    batch = {name: place(like, value[rows]) for name, value in arrays.items()}
    batch["number"] = place(like, np.full((size, 1), k, np.int32))
    batch["key"] = jax.random.wrap_key_data(place(like, sources["key"][rows]))
    drawn = context.predict["generate"](variables, batch, rng, **options)
    made.append(gather(drawn)[: len(texts) - start])
  return np.concatenate(made)
