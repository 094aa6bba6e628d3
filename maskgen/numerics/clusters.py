"""Clusters of features that a run finds while it trains: k-means over batches (Sculley 2010), on cosines.

Features are centred and whitened by running statistics before they are compared, so that neither a common
direction nor a few large ones decide. Letters: m features of a batch, d their width, K clusters.
"""

import jax
import jax.numpy as jnp

from maskgen.numerics.losses import unit_length

# The decay of the running averages once there are enough batches; before, they are means over all batches.
DECAY = 0.99
# A cluster is dead if its share of the features is below this fraction of 1 / K.
DEAD_SHARE = 0.1
# Added to the covariance, as a fraction of the mean variance: whitening shall not enlarge noise.
SHRINKAGE = 0.1

State = dict[str, jax.Array]


def init(count: int, width: int) -> State:
  """The state before the first batch, in which all centroids are zero.

  Args:
    count: K.
    width: d.

  Returns:
    `batches`, their number, int32; `mean` [d] and `covariance` [d, d] of the features; `sums` [K, d] and
    `shares` [K], for each cluster the sum of its whitened features and their number, both per feature of a
    batch.
  """
  return {
    "batches": jnp.int32(0),
    "mean": jnp.zeros((width,)),
    "covariance": jnp.zeros((width, width)),
    "sums": jnp.zeros((count, width)),
    "shares": jnp.zeros((count,)),
  }


def centroids(state: State) -> jax.Array:
  """Unit vectors [K, d]; zero before the first batch."""
  return unit_length(len(state["sums"]) * state["sums"])  # of the order of 1


def whiten(state: State, features: jax.Array) -> jax.Array:
  """Features [m, d] without the mean and correlations of the running statistics, as unit vectors.

  Rotations change no cosine, so a triangular factor serves, which is cheaper than eigenvectors.
  """
  covariance, width = state["covariance"], len(state["mean"])
  ridge = SHRINKAGE * jnp.trace(covariance) / width + 1e-12
  factor = jnp.linalg.cholesky(covariance + ridge * jnp.eye(width))
  inverse = jax.scipy.linalg.solve_triangular(factor, jnp.eye(width), lower=True)
  centred = features.astype(jnp.float32) - state["mean"][None]
  return unit_length(jnp.einsum("md,ed->me", centred, inverse, precision="highest"))


def update(state: State, features: jax.Array, rng: jax.Array) -> tuple[jax.Array, State]:
  """Assigns features to their nearest centroids, and moves these towards them.

  Dead clusters start again at random features of the batch; in the first batch, all do.

  Args:
    state: as `init` or the previous call returned it.
    features: [m, d]; with accumulation, those of a micro-batch are a batch.
    rng: chooses the features at which clusters start.

  Returns:
    int32 [m], the nearest of `centroids(state)`, and the new state.
  """
  batches = state["batches"]
  decay = jnp.minimum(DECAY, batches / (batches + 1.0))
  features, count, m = features.astype(jnp.float32), len(state["shares"]), len(features)

  def mix(name: str, new: jax.Array) -> jax.Array:
    return decay * state[name] + (1.0 - decay) * new

  mean = mix("mean", features.mean(axis=0))
  centred = features - mean[None]
  covariance = mix("covariance", jnp.einsum("md,me->de", centred, centred, precision="highest") / m)
  found = {"batches": batches + 1, "mean": mean, "covariance": covariance}
  white = whiten(found, features)
  ids = jnp.einsum("md,kd->mk", white, centroids(state), precision="highest").argmax(axis=-1)
  shares = mix("shares", jnp.zeros(count).at[ids].add(1.0 / m))
  sums = mix("sums", jnp.zeros_like(state["sums"]).at[ids].add(white / m))
  dead = (shares < DEAD_SHARE / count) | (batches == 0)
  seeds = white[jax.random.randint(rng, (count,), 0, m)]
  found["shares"] = jnp.where(dead, 1.0 / count, shares)
  found["sums"] = jnp.where(dead[:, None], seeds / count, sums)
  return ids.astype(jnp.int32), found


def perplexity(state: State) -> jax.Array:
  """The exponential of the entropy of the clusters' shares: K if all are equally large."""
  shares = state["shares"] / state["shares"].sum()
  return jnp.exp(-(shares * jnp.log(jnp.maximum(shares, 1e-12))).sum())
