"""How well generated digits match their captions, and whether the model uses each kind of word."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from maskgen import images as images_lib
from maskgen import sheet
from maskgen.config import fields
from maskgen.data import digit_scenes as scenes
from maskgen.errors import UserError
from maskgen.evaluators.batches import gather, key_shapes, make_keys, one_blas_thread, place
from maskgen.evaluators.context import Batch, Call, Context, Report
from maskgen.evaluators.digit_reader import Reader

_SHOWN_SIDE = 128  # pixels, of pictures on the contact sheet


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Generates a picture for each caption of the evaluation split and reads it; see `data.digit_scenes`.

  Metrics, where K is a kind of words (class, colour, background, size, place):
    `K`: the share of generated pictures that match the caption in this kind; `all`: in all kinds.
    `K_real`, `all_real`: the same for the real pictures of these captions, the upper bound.
    `K_matters`: the increase of the prediction function `loss` with another word of this kind and the same
      noise; about 0 if the model ignores the word.
  Picture `captions`: pictures with their captions, and with the words that were read differently.

  Attributes:
    num_images: the number of captions to evaluate, at most the whole split.
    num_pictures: the number of pictures on the contact sheet.
    seed: image i depends only on this and its caption, at every training step.
    sampling: options of `generate`; see `Context.check_sampling`.
  """

  requires: ClassVar[tuple[str, ...]] = ("generate", "loss")

  context: Context
  num_images: int = 500
  num_pictures: int = 32
  seed: int = 0
  sampling: Mapping[str, Any] = fields.section(took=("steps", "sampler", "guidance"), default_factory=dict)

  def __post_init__(self):
    if self.context.captions is None:
      raise UserError("the objective takes no captions: remove this evaluation")
    if self.num_images < 1 or self.num_pictures < 1:
      raise UserError(
        f"num_images is {self.num_images} and num_pictures is {self.num_pictures}: give at least 1"
      )
    self.context.check_sampling(self.sampling)

  def trace(self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    call("generate", {"key": key_shapes(batch), "caption": batch["caption"]}, **self.sampling)
    call("loss", batch)

  @one_blas_thread
  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Evaluates; `rng` is a typed key, folded with each batch's index."""
    parts: list[dict[str, Any]] = []
    for index, batch in enumerate(self.context.batches("eval")):
      if sum(len(part["said"]) for part in parts) >= self.num_images:
        break
      parts.append(self._measure(variables, batch, jax.random.fold_in(rng, index), index))
    said = list(itertools.chain.from_iterable(part["said"] for part in parts))[: self.num_images]
    arrays = {
      name: np.concatenate([part[name] for part in parts])[: self.num_images]
      for name in parts[0]
      if name != "said"
    }
    wanted = {kind: np.array([one[kind] for one in said]) for kind in scenes.KINDS}
    read = self._reader.read(arrays["made"])
    numbers: dict[str, float] = {}
    for end, values in (("", read), ("_real", self._reader.read(arrays["real"]))):
      hits = {kind: values[kind] == wanted[kind] for kind in scenes.KINDS}
      numbers |= {f"{kind}{end}": float(hits[kind].mean()) for kind in hits}
      numbers[f"all{end}"] = float(np.all(list(hits.values()), axis=0).mean())
    for kind in scenes.KINDS:
      numbers[f"{kind}_matters"] = float(arrays[kind].mean(dtype="float64"))
    cards = [
      self._card(arrays["made"][i], said[i], {kind: int(read[kind][i]) for kind in read})
      for i in range(min(self.num_pictures, len(said)))
    ]
    return Report(numbers, {"captions": sheet.draw({"captions": cards})})

  def _measure(self, variables: Any, batch: Batch, rng: jax.Array, index: int) -> dict[str, Any]:
    """Captions, real and generated pictures, and the added loss of each wrong word, for a batch, [b] each."""
    valid = gather(batch["valid"])
    said = [self._parse(ids) if ok else None for ids, ok in zip(gather(batch["caption"]), valid, strict=True)]
    keys = make_keys(batch, self.seed, index * len(valid))
    inputs = {"key": keys, "caption": batch["caption"]}
    made = self.context.predict["generate"](variables, inputs, rng, **self.sampling)
    found = {"real": images_lib.to_float(batch["image"]), "made": made}
    loss = self.context.predict["loss"]
    right = loss(variables, batch, rng)["loss"]
    for kind in scenes.KINDS:
      texts = [scenes.describe(scenes.contradict(one, kind)) if one else "" for one in said]
      wrong = place(batch, self._captions.read(texts))
      found[kind] = loss(variables, {**batch, "caption": wrong}, rng)["loss"] - right
    arrays = {name: gather(value)[valid] for name, value in found.items()}
    return {**arrays, "said": [one for one in said if one is not None]}

  @property
  def _captions(self):
    assert self.context.captions is not None
    return self.context.captions

  def _parse(self, ids: np.ndarray) -> dict[str, int]:
    text = self._captions.opened.decode(ids)
    said = scenes.parse(text)
    if said is None or said.keys() != scenes.KINDS.keys():
      raise UserError(
        f"'{text}' is not a caption of the evaluation split of captioned_digits: evaluate on that split"
      )
    return said

  @functools.cached_property
  def _reader(self) -> Reader:
    return Reader(self.context)

  def _card(self, picture: np.ndarray, said: dict[str, int], read: dict[str, int]) -> sheet.Card:
    large = images_lib.enlarge(images_lib.to_uint8(picture), _SHOWN_SIDE)
    wrong = [scenes.KINDS[kind][read[kind]] for kind in scenes.KINDS if read[kind] != said[kind]]
    return sheet.Card([large], [scenes.describe(said)], ", ".join(wrong))
