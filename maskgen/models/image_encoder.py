"""Image encoders: one contract for every network that turns images into vectors.

These words mean the same everywhere:

- *Patch tokens* (`encode`), [b, n, d]: the last block's output after the encoder's final normalisation, one
  vector per patch or code, without the class position.
- The *pooled* vector (`pool`), float32 [b, d]: the mean over all n positions, with nothing masked, or what a
  ViT's `pooling` says, such as the output at the class position. A MAGE encoder takes it before its final
  normalisation (Li et al. 2023, section 4.2), a ViT after it. Classification heads use this vector.
- *Features* (`features`), float32 [b, d]: the pooled vector, standardised over d without parameters. The
  prediction function `features` of every objective returns them; probes, nearest neighbours and few-shot
  evaluations use them.
- A *masked mean* is the mean over the positions of a masked image that an encoder sees. The contrastive loss
  of MAGE-C takes it over patch tokens; no evaluation does.

Letters: b batch, h w c image, n patches or codes, d width.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen import config as config_lib
from maskgen import images as images_lib
from maskgen.models import latents
from maskgen.models.mage import Encoder
from maskgen.models.transformer import check_attention
from maskgen.models.vit import ViT, block_states, class_attention
from maskgen.models.vqgan import VQGAN
from maskgen.numerics.positions import Positions

IMAGE_CHANNELS = 3
Batch = Mapping[str, jax.Array]


class States(NamedTuple):
  """What an encoder computes on the way, for models that it teaches.

  Attributes:
    outputs: of its blocks, [l, b, p + n, d], with p = 1 for a class position in front of the patches, or 0.
    attention: float32 [b, n], how much the class position attends to each patch, or None.
  """

  outputs: jax.Array
  attention: jax.Array | None


@dataclasses.dataclass(frozen=True)
class ImageEncoder(abc.ABC):
  """The contract. `params` are the network's parameters; `frozen` holds those of its `parts`, by name.

  A batch has `image`, uint8 or float32 [b, h, w, c] in [0, 1], which is resized if its size differs, or, for
  an encoder with a tokenizer, `tokens`, integers [b, n]. Calls with `rng` apply dropout and drop path.

  Attributes:
    network: the Linen module, with the fields `width`, `dropout`, `drop_path`, `attention` and `dtype`.
    tokenizer: computes the codes that the network sees; None for a network that sees pixels.
  """

  # Whether `pool` reads all parameters that `encode` does.
  pools_patches: ClassVar[bool] = True
  # The kernel [h, w, channels, d] that reads pixels, by path name; empty for a network that sees codes.
  pixels: ClassVar[str] = ""

  network: Any
  tokenizer: VQGAN | None

  @property
  @abc.abstractmethod
  def image_shape(self) -> tuple[int, int, int]:
    """The images (h, w, c) it was trained on."""

  @property
  @abc.abstractmethod
  def layers(self) -> tuple[str, ...]:
    """Regular expressions over parameter paths, from input to output: the embedding, then each block."""

  @property
  @abc.abstractmethod
  def positions(self) -> Positions:
    """The layout of patches or codes, which is that of the parameter `position` where there is one."""

  @abc.abstractmethod
  def init(self, rng: jax.Array, *, pooled: bool = False) -> Any:
    """Fresh parameters: those that `encode` reads, or, if `pooled`, those that `pool` reads."""

  @abc.abstractmethod
  def encode(self, params: Any, frozen: Any, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    """Patch tokens [b, n, d], see above."""

  @abc.abstractmethod
  def pool(self, params: Any, frozen: Any, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    """Pooled vectors, float32 [b, d], see above."""

  @property
  def num_states(self) -> int:
    """The number l of outputs in `states`."""
    return 1

  @property
  def looks(self) -> bool:
    """Whether `states` has the attention to patches."""
    return False

  def states(self, params: Any, frozen: Any, batch: Batch) -> States:
    """What happens in the network; unless an encoder says more, only its patch tokens."""
    return States(self.encode(params, frozen, batch)[None], None)

  @property
  def width(self) -> int:
    """The width d, also of the pooled vector."""
    width: int = self.network.width
    return width

  @property
  def parts(self) -> dict[str, nn.Module]:
    """The frozen networks that compute what `network` sees, by name; each is initialised with images."""
    return {} if self.tokenizer is None else {"tokenizer": self.tokenizer}

  def with_dropout(self, dropout: float, drop_path: float) -> Self:
    """The same encoder with these rates of dropout and drop path.

    Raises:
      UserError: if its attention has no dropout.
    """
    check_attention(self.network.attention, self.network.dtype, dropout)
    return dataclasses.replace(self, network=self.network.clone(dropout=dropout, drop_path=drop_path))

  def _apply(self, method: str, params: Any, *args: Any, rng: jax.Array | None) -> Any:
    rngs = None if rng is None else {"dropout": rng}
    return self.network.apply({"params": params}, *args, train=rng is not None, rngs=rngs, method=method)


@dataclasses.dataclass(frozen=True)
class VitEncoder(ImageEncoder):
  """A ViT on pixels, without frozen parts.

  Attributes:
    section_type: the dataclass of the config section that describes the network.
  """

  section_type: ClassVar[type[nn.Module]] = ViT
  pixels: ClassVar[str] = "patch_embedding/kernel"

  network: ViT
  tokenizer: None = None

  @classmethod
  def from_section(cls, section: Mapping[str, Any], where: str) -> "VitEncoder":
    """Builds it from the fields of `ViT`."""
    network: ViT = config_lib.build_dataclass(ViT, section, where, dropout=0.0, drop_path=0.0)
    return cls(network.clone(hidden=network.hidden or 4 * network.width))

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return (*self.network.image_size, self.network.channels)

  @property
  def layers(self) -> tuple[str, ...]:
    embedding = "(patch_embedding/|input_norm/|condition/|(position|class_token|register_tokens)$)"
    return (embedding, *_blocks(self.network.depth))

  @property
  def positions(self) -> Positions:
    return Positions(self.network.grid, self.network.leading)

  def init(self, rng: jax.Array, *, pooled: bool = False) -> Any:
    images = jnp.zeros((1, *self.network.image_size, self.network.channels))
    return self.network.init(rng, images, method="pool")["params"]

  def inputs(self, frozen: Any, batch: Batch) -> jax.Array:
    """What the network sees as images, float32 [b, h, w, c]."""
    return images_lib.to_float(batch["image"])

  def encode(self, params: Any, frozen: Any, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    found: jax.Array = self._apply("__call__", params, self.inputs(frozen, batch), rng=rng)
    return found

  def pool(self, params: Any, frozen: Any, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    found: jax.Array = self._apply("pool", params, self.inputs(frozen, batch), rng=rng)
    return found

  @property
  def num_states(self) -> int:
    return self.network.depth

  @property
  def looks(self) -> bool:
    return self.network.leading > 0

  def states(self, params: Any, frozen: Any, batch: Batch) -> States:
    network = self.network
    found = block_states(network, params, self.inputs(frozen, batch))
    attention = class_attention(network, params, found) if self.looks else None
    leading, patches = found[1:, :, : network.leading], found[1:, :, network.leading + network.registers :]
    return States(jnp.concatenate([leading, patches], axis=2), attention)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentVitEncoder(VitEncoder):
  """A ViT on the latents of a frozen autoencoder.

  Attributes:
    autoencoder: computes the latents, the "images" of the network.
    image_size: (h, w) of the images that it was trained on.
  """

  pixels: ClassVar[str] = ""

  autoencoder: latents.Autoencoder
  image_size: tuple[int, int]

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return (*self.image_size, self.autoencoder.image_channels)

  @property
  def parts(self) -> dict[str, nn.Module]:
    return {"autoencoder": self.autoencoder}

  def inputs(self, frozen: Any, batch: Batch) -> jax.Array:
    return latents.encode(self.autoencoder, frozen["autoencoder"], _resized(batch, self.image_size))


@dataclasses.dataclass(frozen=True)
class MageEncoder(ImageEncoder):
  """The encoder of a MAGE model, which sees all codes of an image from its frozen tokenizer.

  Attributes:
    image_size: (h, w) of the images that network and tokenizer were trained on.
  """

  pools_patches: ClassVar[bool] = False  # it pools before the final normalisation

  network: Encoder
  tokenizer: VQGAN
  image_size: tuple[int, int]

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return (*self.image_size, self.tokenizer.image_channels)

  @property
  def layers(self) -> tuple[str, ...]:
    return ("(embedding|position|embedding_norm)(/|$)", *_blocks(self.network.depth))

  @property
  def positions(self) -> Positions:
    return Positions(self.tokenizer.token_grid(self.image_shape), leading=1)

  def init(self, rng: jax.Array, *, pooled: bool = False) -> Any:
    tokens = jnp.zeros((1, self.network.num_tokens), jnp.int32)
    if pooled:  # without the final normalisation
      return self.network.init(rng, tokens, method="pool")["params"]
    return self.network.init(rng, tokens, tokens > 0, method="encode")["params"]

  def encode(self, params: Any, frozen: Any, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    tokens = self._tokens(frozen, batch)
    found = self._apply("encode", params, tokens, jnp.zeros(tokens.shape, bool), rng=rng)
    return found[:, 1:]

  def pool(self, params: Any, frozen: Any, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    found: jax.Array = self._apply("pool", params, self._tokens(frozen, batch), rng=rng)
    return found

  def _tokens(self, frozen: Any, batch: Batch) -> Any:
    if "tokens" in batch:
      return batch["tokens"].astype(jnp.int32)
    images = _resized(batch, self.image_size)
    return self.tokenizer.apply({"params": frozen["tokenizer"]}, images, method="tokenize")


def _resized(batch: Batch, size: tuple[int, int]) -> jax.Array:
  """The images of a batch at this (h, w), float32 in [0, 1]."""
  images = images_lib.to_float(batch["image"])
  shape = (len(images), *size, images.shape[-1])
  return images if images.shape == shape else jnp.clip(jax.image.resize(images, shape, "bilinear"), 0.0, 1.0)


def _blocks(depth: int) -> tuple[str, ...]:
  """The blocks of a `Transformer`."""
  return tuple(f"encoder/block_{i}/" for i in range(depth))


# Networks that are image encoders on their own, without an objective.
NETWORKS: dict[str, type[VitEncoder]] = {"vit": VitEncoder}


@dataclasses.dataclass(frozen=True)
class EncoderPart:
  """An image encoder as part of a model: which one, and where it is among the model's variables.

  The parameters of its frozen parts are at "frozen/NAME". The methods are those of the encoder; they take the
  variables of the model, `{"params": {group: tree}, "frozen": tree}`.

  Attributes:
    encoder: the encoder.
    params: path of the tree that contains its parameters, such as "params/main"; it may contain others.
    pooled: whether the model has only the parameters that `pool` reads.
  """

  encoder: ImageEncoder
  params: str
  pooled: bool = False

  def shapes(self) -> dict[str, Any]:
    """Shapes of the encoder's variables within the model's."""
    key, encoder = jax.random.key(0), self.encoder
    params = jax.eval_shape(functools.partial(encoder.init, pooled=self.pooled), key)
    shapes = functools.reduce(lambda tree, name: {name: tree}, reversed(self.params.split("/")), params)
    images = jax.ShapeDtypeStruct((1, *encoder.image_shape), jnp.float32)
    for name, part in encoder.parts.items():
      found: Any = jax.eval_shape(part.init, key, images)["params"]
      shapes["frozen"] = shapes.get("frozen", {}) | {name: found}
    return shapes

  def split(self, variables: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The encoder's parameters and its frozen parts."""
    params = functools.reduce(lambda tree, name: tree[name], self.params.split("/"), variables)
    return params, {name: variables["frozen"][name] for name in self.encoder.parts}

  def layers(self, group: str) -> tuple[str, ...]:
    """The encoder's `layers` for the paths of a parameter group; empty if the encoder is not in it."""
    path = f"{self.params}/"
    if not path.startswith(f"params/{group}/"):
      return ()
    prefix = path.removeprefix(f"params/{group}/")
    return tuple(f"^{prefix}{layer}" for layer in self.encoder.layers)

  def encode(self, variables: Mapping[str, Any], batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    """Patch tokens [b, n, d]."""
    return self.encoder.encode(*self.split(variables), batch, rng)

  def pool(self, variables: Mapping[str, Any], batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    """Pooled vectors, float32 [b, d]."""
    return self.encoder.pool(*self.split(variables), batch, rng)

  def features(self, variables: Mapping[str, Any], batch: Batch) -> jax.Array:
    """Features, float32 [b, d]."""
    return nn.standardize(self.pool(variables, batch), axis=-1, epsilon=1e-6)

  def predict_fns(self) -> dict[str, Callable[..., Any]]:
    """The prediction functions of a model with this encoder: `features` and, if it has them, `patches`."""

    def features(variables, batch, rng):
      return self.features(variables, batch)

    def patches(variables, batch, rng):
      return self.encode(variables, batch).astype(jnp.float32)

    has_patches = self.encoder.pools_patches or not self.pooled
    return {"features": features} | ({"patches": patches} if has_patches else {})
