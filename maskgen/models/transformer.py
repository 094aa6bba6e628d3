"""Transformer blocks, pre-norm (Dosovitskiy et al. 2021) unless stated, with the initialisation of MAE.

Letters: b batch, n positions, h heads, d width. Between attentions the positions of all examples form one
axis, [b * n, d]: if n is odd, as with a class position, TPUs pad [b, n, d] and take several times as long to
compile.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen import sharding
from maskgen.errors import UserError, nearest
from maskgen.models import fused_attention
from maskgen.models import remat as remat_lib
from maskgen.numerics import dropout, rotary

kernel_init = nn.initializers.xavier_uniform()
# MAE initialises one fused [d, 3d] projection: the limit sqrt(6 / 4d) for each of the three.
qkv_init = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
embedding_init = nn.initializers.normal(0.02)
ATTENTION = ("auto", "xla", "cudnn", "pallas")
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "gelu_tanh": nn.gelu,
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # of OpenAI's CLIP
}
# The projections inside attention that have a bias: of queries, keys and values.
QKV = "qkv"
# With a second product as gate (Shazeer 2020); the blocks of DINOv2's largest model have it.
SWIGLU = "swiglu"


def check_attention(attention: str, dtype: str, dropout: float) -> None:
  """Checks a choice of implementation.

  Raises:
    UserError: if it does not exist, or does not support the dtype or dropout.
  """
  if attention not in ATTENTION:
    raise UserError(f"attention '{attention}' does not exist{nearest(attention, ATTENTION)}")
  if attention == "cudnn" and (dropout or dtype == "float32"):
    raise UserError(
      f"attention 'cudnn' needs a 16-bit dtype and dropout 0, not {dtype} and {dropout}: use 'auto'"
    )


class Dropout(nn.Module):
  """Sets each value to 0 with probability `rate`, and scales the others to keep the mean."""

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:  # any shape
    if not train or not self.rate:
      return x
    return dropout.drop(x, dropout.seeds(self.make_rng("dropout"), x.shape[:1]), self.rate)


class DropPath(nn.Module):
  """Sets a residual branch to 0 for whole examples, and scales the others to keep the mean.

  Stochastic depth (Huang et al. 2016).
  """

  @nn.compact
  def __call__(self, x: jax.Array, length: int, rate: jax.Array) -> jax.Array:  # [b * n, d], n, scalar
    draw = jax.random.uniform(self.make_rng("dropout"), (x.shape[0] // length, 1))
    keep = jnp.where(draw >= rate, 1.0 / (1.0 - rate), 0.0).astype(x.dtype)
    return x * jnp.repeat(keep, length, axis=0)


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  attention: str,
  seeds: dropout.Seeds | None = None,
  rate: float = 0.0,
  causal: bool = False,
  seen: jax.Array | None = None,
) -> jax.Array:
  """Scaled dot-product attention [b, n, h, d / h], softmax in float32; if `causal`, to no later position.

  Weights are dropped at `rate` by `seeds` of [b, h], if given. With `seen`, bool [b, n], no position attends
  to those where it is False; XLA then computes it.

  "auto" uses cuDNN's fused kernel on NVIDIA GPUs where it applies: 16-bit dtypes, no dropout on the weights,
  and heads whose width is a multiple of 8 up to 128; programs with it have been made, but not run. On TPUs it
  uses a Pallas kernel where that applies, for self-attention of up to about four hundred positions, as
  "pallas" does everywhere: by the TPU compiler's estimate, XLA takes several times as long, which writes
  scores to HBM. Otherwise it uses XLA.
  """
  width = query.shape[-1]
  platform = sharding.platform()
  fused = attention == "pallas" or (attention == "auto" and platform == "tpu")
  if fused and not causal and seen is None and fused_attention.fits(query, key):
    return fused_attention.attend(query, key, value, seeds, rate)
  fits = seeds is None and query.dtype.itemsize == 2 and width % 8 == 0 and width <= 128
  if seen is None and (attention == "cudnn" or (attention == "auto" and fits and platform == "gpu")):
    return _attend_by_cudnn(query, key, value, causal)
  scores = jnp.einsum("bqhc,bkhc->bhqk", query, key, preferred_element_type=jnp.float32)
  if causal:
    earlier = jnp.tri(query.shape[1], key.shape[1], dtype=bool)
    scores = jnp.where(earlier[None, None], scores, -jnp.inf)
  if seen is not None:
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
  weights = jax.nn.softmax(scores / width**0.5).astype(query.dtype)
  weights = weights if seeds is None else dropout.drop(weights, seeds, rate)
  return jnp.einsum("bhqk,bkhc->bqhc", weights, value)


def _attend_by_cudnn(query: jax.Array, key: jax.Array, value: jax.Array, causal: bool) -> jax.Array:
  """`attend` by cuDNN's kernel. JAX has no gradients of odd lengths, which get one more position, unseen."""
  length, keys = query.shape[1], key.shape[1]
  query, key, value = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value))
  mask = None
  if keys % 2:
    mask = jnp.broadcast_to(jnp.arange(keys + 1) < keys, (1, 1, query.shape[1], keys + 1))
  found = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal, implementation="cudnn")
  return found[:, :length]


class Attention(nn.Module):
  """Multi-head self-attention with dropout on the weights; softmax in float32.

  Queries, keys and values are separate projections, so that a tensor-parallel mesh can split them by heads.

  If the collection `cache` is mutable, keys and values [b, n, h, d / h] are stored there. With `at`, int32
  [b, q], x holds only these positions, all distinct: their keys and values replace those in the cache, and
  all others are unchanged. For `seen` see `attend`.

  With `waves`, queries and keys are rotated by their positions, see `maskgen.numerics.rotary`.
  """

  heads: int
  dropout: float = 0.0
  dtype: str = "float32"
  attention: str = "auto"
  qkv_bias: str = QKV

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    length: int,
    *,
    train: bool,
    at: jax.Array | None = None,
    waves: jax.Array | None = None,
    seen: jax.Array | None = None,
  ) -> jax.Array:
    width = x.shape[-1]  # x is [b * n, d], or [b * q, d]
    if width % self.heads:
      raise UserError(f"a width of {width} does not divide into {self.heads} heads")

    def project(name: str) -> jax.Array:  # [b, n, h, d / h]
      has_bias = name[0] in self.qkv_bias
      y = nn.Dense(width, has_bias, kernel_init=qkv_init, dtype=self.dtype, name=name)(x)
      y = sharding.constrain_batch(y, "tensor")
      return y.reshape(-1, length, self.heads, width // self.heads)

    query, key, value = project("query"), project("key"), project("value")
    if waves is not None:
      query, key = rotary.rotate(query, waves), rotary.rotate(key, waves)
    if self.is_mutable_collection("cache"):
      self.put_variable("cache", "key", key)
      self.put_variable("cache", "value", value)
    elif at is not None:
      renew = jax.vmap(lambda old, new, at: old.at[at].set(new, unique_indices=True))
      key = renew(self.get_variable("cache", "key"), key, at)
      value = renew(self.get_variable("cache", "value"), value, at)
    seeds = None
    if train and self.dropout:
      seeds = dropout.seeds(self.make_rng("dropout"), (query.shape[0], self.heads))
    y = attend(query, key, value, attention=self.attention, seeds=seeds, rate=self.dropout, seen=seen)
    y = remat_lib.keep(y.reshape(x.shape))
    y = nn.Dense(width, kernel_init=kernel_init, dtype=self.dtype, name="out")(y)
    return sharding.constrain_batch(y)


class Mlp(nn.Module):
  """Two layers with an activation between, one of `ACTIVATIONS` or `SWIGLU`, and dropout after each."""

  hidden: int
  dropout: float = 0.0
  dtype: str = "float32"
  activation: str = "gelu"

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:  # [..., d] -> [..., d]
    def widen(name: str) -> jax.Array:
      y = nn.Dense(self.hidden, kernel_init=kernel_init, dtype=self.dtype, name=name)(x)
      return sharding.constrain_batch(y, "tensor")

    if self.activation == SWIGLU:
      y = nn.silu(widen("gate")) * widen("up")
    else:
      y = ACTIVATIONS[self.activation](widen("up"))
    y = Dropout(self.dropout)(y, train=train)
    y = nn.Dense(x.shape[-1], kernel_init=kernel_init, dtype=self.dtype, name="down")(y)
    y = sharding.constrain_batch(y)
    return Dropout(self.dropout)(y, train=train)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); the fields are those of `Transformer`.

  A condition [b, c] scales and shifts the outputs of both norms, and scales both branches, at first by 0
  (adaLN-Zero, Peebles and Xie 2023, section 3.2).
  """

  heads: int
  dropout: float = 0.0
  dtype: str = "float32"
  attention: str = "auto"
  hidden: int = 0
  activation: str = "gelu"
  post_norm: bool = False
  epsilon: float = 1e-6
  layer_scale: bool = False
  qkv_bias: str = QKV

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    length: int,
    drop_path: jax.Array | None = None,
    *,
    train: bool,
    at: jax.Array | None = None,
    condition: jax.Array | None = None,
    waves: jax.Array | None = None,
    seen: jax.Array | None = None,
  ) -> jax.Array:  # [b * n, d], n -> [b * n, d]
    parts: list[jax.Array] = []
    if condition is not None:
      modulation = nn.Dense(
        6 * x.shape[-1], kernel_init=nn.initializers.zeros, dtype=self.dtype, name="modulation"
      )
      parts = jnp.split(jnp.repeat(modulation(condition), length, axis=0), 6, axis=-1)

    def branch(y: jax.Array, name: str) -> jax.Array:
      if self.layer_scale:
        y = y * self.param(f"{name}_scale", nn.initializers.ones, (x.shape[-1],)).astype(y.dtype)[None]
      if parts:
        y = y * parts[2 if name == "attention" else 5]
      return y if drop_path is None else DropPath()(y, length, drop_path)

    def norm(name: str) -> Callable[[jax.Array], jax.Array]:
      plain = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=f"{name}_norm")
      if not parts:
        return plain
      shift, scale = parts[:2] if name == "attention" else parts[3:5]
      return lambda y: plain(y) * (1.0 + scale) + shift

    first, second = norm("attention"), norm("mlp")
    options = (self.heads, self.dropout, self.dtype, self.attention, self.qkv_bias)
    attention = Attention(*options, name="attention")
    mlp = Mlp(self.hidden or 4 * x.shape[-1], self.dropout, self.dtype, self.activation, name="mlp")
    y = x if self.post_norm else first(x)
    y = attention(y, length, train=train, at=at, waves=waves, seen=seen)
    x = x + branch(Dropout(self.dropout)(y, train=train), "attention")
    if self.post_norm:
      x = first(x)
      return second(x + branch(mlp(x, train=train), "mlp"))
    return x + branch(mlp(second(x), train=train), "mlp")


class Transformer(nn.Module):
  """A stack of blocks.

  Attributes:
    depth: the number of blocks.
    heads, dropout, dtype, attention: of each block; for `attention` see `attend`.
    remat: what the backward pass recomputes, see `maskgen.models.remat`.
    scan: whether to loop over one compiled block, which compiles faster and uses less memory with `remat`,
      or to compile each block separately. Results and parameters are the same: the blocks' parameters are
      stacked on use, so that names, rules and checkpoints do not depend on it. On CPUs it only has an effect
      with `remat`.
    drop_path: the probability with which an example skips each of the last block's two branches during
      training; 0 for the first block, and linear in between.
    hidden: width inside the MLPs, by default 4 d.
    activation: inside the MLPs, one of `ACTIVATIONS` or `SWIGLU`.
    post_norm: whether each norm comes after its sum, as in BERT, and not before the branch.
    epsilon: of the norms.
    layer_scale: whether each branch is multiplied by a learned vector (Touvron et al. 2021).
    qkv_bias: which projections inside attention have a bias: of queries, keys and values.
  """

  depth: int
  heads: int
  dropout: float = 0.0
  dtype: str = "float32"
  attention: str = "auto"
  remat: str = "none"
  scan: bool = False
  drop_path: float = 0.0
  hidden: int = 0
  activation: str = "gelu"
  post_norm: bool = False
  epsilon: float = 1e-6
  layer_scale: bool = False
  qkv_bias: str = QKV

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    *,
    train: bool,
    at: jax.Array | None = None,
    condition: jax.Array | None = None,
    waves: jax.Array | None = None,
    seen: jax.Array | None = None,
  ) -> jax.Array:
    """[b, n, d] -> [b, n, d]; see `Attention` for `at`, `waves`, `seen` and `cache`, else `Block`.

    If the collection `states` is mutable, x and the output of each block are stored, [depth + 1, b, n, d].
    """
    fields = ("heads", "dropout", "dtype", "attention", "hidden", "activation", "post_norm", "epsilon")
    options = {name: getattr(self, name) for name in (*fields, "layer_scale", "qkv_bias")}
    shape, length = x.shape, x.shape[1]
    x = x.reshape(-1, x.shape[-1])
    if self.is_initializing():
      for i in range(self.depth):
        x = Block(**options, name=f"block_{i}")(x, length, train=train, condition=condition, waves=waves)
      return x.reshape(shape)

    block = Block(**options, parent=None)

    keep, watch = self.is_mutable_collection("cache"), self.is_mutable_collection("states")

    def run(x: jax.Array, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
      params, key, rate, cache = inputs
      y, kept = block.apply(
        {"params": params, "cache": cache},
        sharding.constrain_batch(x),
        length,
        rate,
        train=train,
        at=at,
        condition=condition,
        waves=waves,
        seen=seen,
        rngs={} if key is None else {"dropout": key},
        mutable=["cache"] if keep else [],
      )
      return y, (kept.get("cache"), y if watch else None)

    run = remat_lib.remat(run, self.remat, in_scan=self.scan)
    keys, rates = [None] * self.depth, [None] * self.depth
    if train and (self.dropout or self.drop_path):
      keys = list(jax.random.split(self.make_rng("dropout"), self.depth))
    if train and self.drop_path:
      rates = list(jnp.linspace(0.0, self.drop_path, self.depth))
    first = x
    params: Any = self.variables["params"]
    caches: Any = [{}] * self.depth if at is None else self.get_variable("cache", "blocks")
    inputs = [
      (self._cast(params[f"block_{i}"]), *rest)
      for i, rest in enumerate(zip(keys, rates, caches, strict=True))
    ]
    if self.scan:
      # On a CPU, stacking parameters and what the backward pass needs costs more than it saves.
      unroll = sharding.platform() == "cpu" and self.remat == "none"
      together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
      x, stacked = jax.lax.scan(run, x, together, unroll=unroll)
      kept = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(self.depth)]
    else:
      kept = []
      for one in inputs:
        x, stored = run(x, one)
        kept.append(stored)
    if keep:
      self.put_variable("cache", "blocks", [cache for cache, _ in kept])
    if watch:
      states = jnp.stack([first, *(state for _, state in kept)])
      self.put_variable("states", "blocks", states.reshape(-1, *shape))
    return x.reshape(shape)

  def _cast(self, params: Any) -> Any:
    """Casts kernels as layers would, before they are gathered and stacked."""
    return jax.tree.map(lambda leaf: leaf.astype(self.dtype) if leaf.ndim > 1 else leaf, params)
