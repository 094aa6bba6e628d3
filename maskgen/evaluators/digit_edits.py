"""How well pictures follow prompts of an image and words: the digit stays, and words change one attribute."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from maskgen.config import fields
from maskgen.data import digit_scenes as scenes
from maskgen.errors import UserError, nearest
from maskgen.evaluators import pictures, prompted
from maskgen.evaluators.batches import make_keys, one_blas_thread, valid_rows
from maskgen.evaluators.context import Batch, Call, Context, Report
from maskgen.evaluators.digit_reader import Reader
from maskgen.evaluators.prompted import IMAGE, WORD
from maskgen.evaluators.vilex import check_tokens


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Edits evaluation images of captioned digits with words next to their tokens; see `data.digit_scenes`.

  A prompt changes one kind K of words that describe an image, such as its background, to another value.
  Metrics end in `_k<tokens of the image>_s<text guidance>`:
    `K_followed`: the share of pictures that show what the word says.
    `K_class_kept`: the share of pictures in which the classifier predicts the source's class.
    `K_both`: both.
    `K_rest_kept`: the share of pictures that agree with the source in all other kinds except the class.
  `class_real`: the share of sources for which the classifier predicts their class, the upper bound.
  Picture `edits`: images, and a row for each word, with the most tokens and the highest guidance.

  One image costs at most 3 * steps calls of the frozen network for each kind, number of tokens and guidance.

  Attributes:
    prompts: the prompt for each kind to change: "{}" is the image, "*" the word or words.
    num_tokens: numbers of tokens of the image; if empty, powers of two and all.
    text_guidance: values of the text guidance.
    num_images: the number of images to edit, at most the whole split.
    num_pictures: the number of images in the picture.
    seed: image i depends on this, i and its source, at every training step.
    sampling: other options of `generate`; see `Context.check_sampling`.
  """

  requires: ClassVar[tuple[str, ...]] = ("encode", "generate")

  context: Context
  prompts: Mapping[str, str] = dataclasses.field(
    default_factory=lambda: {"background": "{} on a * background", "colour": "a * {}"}
  )
  num_tokens: tuple[int, ...] = ()
  text_guidance: tuple[float, ...] = (2.0, 4.0)
  num_images: int = 128
  num_pictures: int = 12
  seed: int = 0
  sampling: Mapping[str, Any] = fields.section(
    took=("steps", "sampler", "image_guidance"), default_factory=dict
  )

  def __post_init__(self):
    if self.context.class_names != scenes.KINDS["class"] or self.context.captions is None:
      raise UserError(
        "it needs data.source='captioned_digits' and an objective that takes captions: remove this evaluation"
      )
    prompted.check_options(self)
    if not isinstance(self.prompts, Mapping) or not self.prompts:
      raise UserError(f"prompts is {self.prompts!r}: give a prompt for each kind to change")
    for kind in self.prompts:
      self._check_prompt(kind)

  def _check_prompt(self, kind: str) -> None:
    prompt, kinds = self.prompts[kind], [kind for kind in scenes.KINDS if kind != "class"]
    if kind not in kinds:
      raise UserError(f"prompts has '{kind}', which cannot be changed{nearest(kind, kinds)}")
    prompted.check_prompt(kind, prompt)
    texts = [prompt.replace(WORD, word) for word in scenes.KINDS[kind]]
    said = prompted.words_around(self.context, texts)["num_words"].sum(axis=1)
    assert self.context.captions is not None
    max_words = self.context.captions.length - 2 - max(self._numbers)
    if max(said) > max_words:
      raise UserError(
        f"prompts.{kind} is '{prompt}': {max_words} words fit next to {max(self._numbers)} tokens, shorten it"
      )

  def _options(self, guidance: float) -> dict[str, Any]:
    return {**self.sampling, "text_guidance": guidance}

  def trace(self, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    tokens = call("encode", batch)
    prompted.trace(self.context, call, batch, tokens, **self._options(self.text_guidance[0]))

  @property
  def _numbers(self) -> tuple[int, ...]:
    return check_tokens(self.context, self.num_tokens)

  @functools.cached_property
  def _reader(self) -> Reader:
    return Reader(self.context)

  @one_blas_thread
  def run(self, variables: Any, rng: jax.Array) -> Report:
    """Evaluates; `rng` is a typed key."""
    like, sources = self._collect(variables, rng)
    real = self._reader.read(np.asarray(sources["image"], np.float32) / 255.0)
    said = [{kind: int(real[kind][i]) for kind in real} for i in range(len(sources["image"]))]
    numbers = {"class_real": float(np.mean(real["class"] == sources["label"]))}
    for kind, prompt in self.prompts.items():
      wanted = np.array([scenes.contradict(one, kind)[kind] for one in said])
      texts = [prompt.replace(WORD, scenes.KINDS[kind][value]) for value in wanted]
      for k, guidance in itertools.product(self._numbers, self.text_guidance):
        read = self._reader.read(self._draw(variables, rng, like, sources, texts, k, guidance))
        followed, kept = read[kind] == wanted, read["class"] == sources["label"]
        rest = [read[other] == real[other] for other in scenes.KINDS if other not in (kind, "class")]
        hits = {
          "followed": followed,
          "class_kept": kept,
          "both": followed & kept,
          "rest_kept": np.all(rest, 0),
        }
        end = f"k{k}_s{guidance:g}"
        numbers |= {f"{kind}_{name}_{end}": float(np.mean(hit)) for name, hit in hits.items()}
    return Report(numbers, {"edits": self._sheet(variables, rng, like, sources)})

  def _collect(self, variables: Any, rng: jax.Array) -> tuple[Batch, dict[str, np.ndarray]]:
    """A batch that defines size and sharding; image, label, tokens float32 [n, d] and key data of sources."""
    parts: list[dict[str, np.ndarray]] = []
    like: dict[str, jax.Array] = {}
    for index, batch in enumerate(self.context.batches("eval")):
      if sum(len(part["label"]) for part in parts) >= self.num_images:
        break
      like = {"valid": batch["valid"]}
      found = {
        "image": batch["image"],
        "label": batch["label"],
        "tokens": self.context.predict["encode"](variables, batch, rng),
        "key": jax.random.key_data(make_keys(batch, self.seed, index * len(batch["valid"]))),
      }
      parts.append({name: valid_rows(batch, value) for name, value in found.items()})
    return like, {
      name: np.concatenate([part[name] for part in parts])[: self.num_images] for name in parts[0]
    }

  def _draw(
    self,
    variables: Any,
    rng: jax.Array,
    like: Batch,
    sources: Mapping[str, np.ndarray],
    texts: Sequence[str],
    k: int,
    guidance: float,
  ) -> np.ndarray:
    """Pictures float32 [m, h, w, c] for m prompts and sources, with k tokens of each source."""
    return prompted.draw(self.context, variables, rng, like, sources, texts, k, **self._options(guidance))

  def _sheet(
    self, variables: Any, rng: jax.Array, like: Batch, sources: Mapping[str, np.ndarray]
  ) -> np.ndarray:
    texts = [IMAGE]
    for kind, prompt in self.prompts.items():
      texts += [prompt.replace(WORD, word) for word in scenes.KINDS[kind]]
    first = {name: values[: self.num_pictures] for name, values in sources.items()}
    count = len(first["label"])
    repeated = {name: np.concatenate([values] * len(texts)) for name, values in first.items()}
    prompts = [text for text in texts for _ in range(count)]
    most = max(self._numbers), max(self.text_guidance)
    made = self._draw(variables, rng, like, repeated, prompts, *most)
    rows = {"images": first["image"]}
    rows |= {text: made[i * count : (i + 1) * count] for i, text in enumerate(texts)}
    return pictures.named(rows)
