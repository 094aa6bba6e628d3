"""Losses as pure functions: float32 inputs, one value per example unless stated otherwise.

Letters: b batch, n tokens, K classes or codes, d width, m vectors.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
  """Cross-entropy with (1 - s) on the target and s spread evenly over all K classes.

  Args:
    logits: [..., K].
    targets: int [...], in 0 .. K-1.
    label_smoothing: s in [0, 1).

  Returns:
    float32 [...].
  """
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
  return (1.0 - label_smoothing) * nll - label_smoothing * log_p.mean(axis=-1)


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Cross-entropy with targets that are probabilities of classes; both [..., K], result float32 [...]."""
  return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(axis=-1)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean of values [b, n] over the positions where mask [b, n] is True; [b], 0 where there are none."""
  weights = mask.astype(values.dtype)
  return (values * weights).sum(axis=-1) / jnp.maximum(weights.sum(axis=-1), 1.0)


def mean_per_example(values: jax.Array) -> jax.Array:
  """Mean over all axes but the first; [b]."""
  return values.reshape(values.shape[0], -1).mean(axis=-1)


def nt_xent(embeddings: jax.Array, candidates: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
  """Contrastive loss of two views of each example (NT-Xent of SimCLR, Chen et al. 2020, equation 1).

  The positive of a view is the example's other view; its negatives are both views of all other examples. If
  the batch is sharded over devices, `candidates` are the gathered embeddings, and `embeddings` stay sharded.

  Args:
    embeddings: [b, 2, d], of any norm: they are normalised.
    candidates: the same embeddings, see above.
    temperature: of the softmax over cosines, above 0.

  Returns:
    loss: float32 [b], a mean over both views.
    nearest: float32 [b], the fraction of an example's views whose positive is nearer than every negative.
  """
  b, views, width = embeddings.shape
  own, others = (unit_length(x.astype(jnp.float32)) for x in (embeddings, candidates))
  positive = (own * own[:, ::-1]).sum(axis=-1) / temperature  # [b, 2]
  cosines = jnp.einsum("ivd,jd->ivj", own, others.reshape(-1, width), precision="highest")
  same = jnp.arange(b)[:, None] == jnp.arange(b * views)[None] // views  # [b, 2b]
  # Not -inf, whose gradient is NaN for an example without negatives.
  negatives = jnp.where(same[:, None], jnp.finfo(jnp.float32).min, cosines / temperature)
  loss = jax.nn.softplus(jax.nn.logsumexp(negatives, axis=-1) - positive)
  nearest = (positive > negatives.max(axis=-1)).astype(jnp.float32)
  return loss.mean(axis=-1), nearest.mean(axis=-1)


def info_nce(
  anchors: jax.Array, positives: jax.Array, candidates: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
  """Contrastive loss of pairs (InfoNCE, van den Oord et al. 2018, equation 4).

  Args:
    anchors: [b, d], of any norm: all are normalised.
    positives: [b, d], one for each anchor; those of the others are its negatives.
    candidates: the positives of the global batch, gathered if it is sharded over devices.
    temperature: of the softmax over cosines, above 0.

  Returns:
    loss: float32 [b].
    nearest: float32 [b], 1 where an anchor's positive is nearer than every negative.
  """
  anchors, positives, candidates = (
    unit_length(x.astype(jnp.float32)) for x in (anchors, positives, candidates)
  )
  logits = jnp.einsum("id,jd->ij", anchors, candidates, precision="highest") / temperature
  positive = (anchors * positives).sum(axis=-1) / temperature
  others = jnp.where(jnp.eye(len(anchors), len(candidates), dtype=bool), -jnp.inf, logits)
  return jax.nn.logsumexp(logits, axis=-1) - positive, (positive > others.max(axis=-1)).astype(jnp.float32)


def uniformity(features: jax.Array) -> jax.Array:
  """The mean squared cosine of all pairs of vectors [b, d], each with itself included; float32 scalar.

  The squared cosines of all pairs are the squared entries of the second moment, so nothing is gathered.
  """
  unit = unit_length(features.astype(jnp.float32))
  moment = jnp.einsum("bd,be->de", unit, unit, precision="highest") / len(unit)
  return jnp.square(moment).sum()


def centroid_contrast(
  embeddings: jax.Array,
  centroids: jax.Array,
  ids: jax.Array,
  *,
  temperature: float,
  neighbours: int,
  neighbour_temperature: float,
) -> tuple[jax.Array, jax.Array]:
  """Contrast of vectors with all centroids of clusters, as in LEASE.

  The targets are a softmax over the centroid of a vector's cluster and those nearest to it, by their cosines
  to the former.

  Args:
    embeddings: [..., d], of any norm: they are normalised.
    centroids: float32 [K, d], of unit norm.
    ids: int [...], the clusters of the vectors, in 0 .. K-1.
    temperature: of the softmax over the cosines to all centroids, above 0.
    neighbours: how many other centroids share the target; less than K.
    neighbour_temperature: of the softmax that shares it, above 0.

  Returns:
    loss: float32 [...].
    nearest: float32 [...], 1 where the centroid of the vector's cluster is the nearest one.
  """
  own = unit_length(embeddings.astype(jnp.float32))
  log_p = jax.nn.log_softmax(jnp.einsum("...d,kd->...k", own, centroids, precision="highest") / temperature)
  cosines = jnp.einsum("...d,kd->...k", centroids[ids], centroids, precision="highest")
  largest, shared = jax.lax.top_k(cosines, neighbours + 1)
  weights = jax.nn.softmax(largest / neighbour_temperature)
  loss = -(weights * jnp.take_along_axis(log_p, shared, axis=-1)).sum(axis=-1)
  return loss, (log_p.argmax(axis=-1) == ids).astype(jnp.float32)


def contrast(
  own: jax.Array, others: jax.Array, scale: jax.Array, bias: jax.Array | None, chunk: int
) -> tuple[jax.Array, jax.Array]:
  """Contrastive loss of each embedding with the matching one of `others`, among all of them.

  Without a bias it is a cross-entropy over `others`, one direction of CLIP's (Radford et al. 2021, figure 3);
  with one, the sum of a logistic loss for each pair (SigLIP, Zhai et al. 2023, section 3.2). If the batch is
  sharded over devices, `others` are gathered, and each device compares its rows with `chunk` of them at a
  time, again in the backward pass: the logits of all b x b pairs are never stored.

  Args:
    own: float32 [b, d], of length 1.
    others: float32 [b, d], of length 1; row i matches row i.
    scale: a scalar, by which cosines are multiplied.
    bias: a scalar that is added to all logits, or None.
    chunk: the largest number of `others` to compare with at once; they are split into the fewest equal parts,
      the last of which may be smaller.

  Returns:
    loss: float32 [b].
    nearest: float32 [b], whether the matching one is nearer than all others.
  """
  b, width = own.shape
  count = -(-b // chunk)
  size = -(-b // count)
  surplus = count * size - b
  lowest = jnp.finfo(jnp.float32).min  # not -inf, whose gradient is NaN
  rows = jnp.arange(b)

  def logits_of(cosines: jax.Array) -> jax.Array:
    return cosines * scale + (0.0 if bias is None else bias)

  @jax.checkpoint
  def compare(carry: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
    total, best = carry
    numbers, candidates = part
    logits = logits_of(jnp.einsum("id,jd->ij", own, candidates, precision="highest"))
    logits = jnp.where(numbers < b, logits, lowest) if surplus else logits
    same = rows[:, None] == numbers[None]
    if bias is None:
      total = jnp.logaddexp(total, jax.nn.logsumexp(logits, axis=1))
    else:
      total = total + jax.nn.softplus(jnp.where(same, -logits, logits)).sum(axis=1)
    return (total, jnp.maximum(best, jnp.where(same, lowest, logits).max(axis=1))), None

  start = (jnp.full(b, lowest) if bias is None else jnp.zeros(b), jnp.full(b, lowest))
  filled = jnp.pad(others, ((0, surplus), (0, 0))) if surplus else others
  parts = (jnp.arange(count * size).reshape(count, size), filled.reshape(count, size, width))
  (total, best), _ = jax.lax.scan(compare, start, parts)
  positive = logits_of((own * others).sum(axis=-1))
  return total - positive if bias is None else total, (positive > best).astype(jnp.float32)


def unit_length(x: jax.Array) -> jax.Array:
  """Vectors [..., d], each divided by its length."""
  return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-12)


def generator_loss(fake_logits: jax.Array) -> jax.Array:
  """Non-saturating generator loss -log sigmoid(D(fake)) (Goodfellow et al. 2014, section 3)."""
  return jax.nn.softplus(-fake_logits)


def discriminator_loss(real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
  """Logistic discriminator loss -log sigmoid(D(real)) - log(1 - sigmoid(D(fake)))."""
  return jax.nn.softplus(-real_logits) + jax.nn.softplus(fake_logits)


def hinge_generator_loss(fake_logits: jax.Array) -> jax.Array:
  """-D(fake), the generator's side of the hinge loss (Lim & Ye 2017, section 3)."""
  return -fake_logits


def hinge_discriminator_loss(real_logits: jax.Array, fake_logits: jax.Array) -> jax.Array:
  """max(0, 1 - D(real)) + max(0, 1 + D(fake)) (Lim & Ye 2017, section 3)."""
  return jax.nn.relu(1.0 - real_logits) + jax.nn.relu(1.0 + fake_logits)


# The losses of the generator and of the discriminator.
ADVERSARIAL = {
  "logistic": (generator_loss, discriminator_loss),
  "hinge": (hinge_generator_loss, hinge_discriminator_loss),
}


def lecam_penalty(
  real_logits: jax.Array, fake_logits: jax.Array, real_anchor: jax.Array, fake_anchor: jax.Array
) -> jax.Array:
  """(D(real) - fake anchor)^2 + (D(fake) - real anchor)^2 (LeCAM of Tseng et al. 2021, equation 4).

  The anchors are scalars, moving averages of the logits of real and of fake images. The penalty keeps the
  discriminator from separating the two ever further.
  """
  return jnp.square(real_logits - fake_anchor) + jnp.square(fake_logits - real_anchor)


def rectified_lecam_penalty(
  real_logits: jax.Array, fake_logits: jax.Array, real_anchor: jax.Array, fake_anchor: jax.Array
) -> jax.Array:
  """LeCAM as in MAGVIT's published code: on batch means, and only where real images score higher.

  max(0, mean D(real) - fake anchor)^2 + max(0, real anchor - mean D(fake))^2, a scalar. The spread within a
  batch does not count, nor does a discriminator that confuses the two.
  """
  real, fake = real_logits.mean(), fake_logits.mean()
  return jnp.square(jax.nn.relu(real - fake_anchor)) + jnp.square(jax.nn.relu(real_anchor - fake))


# The forms of LeCAM's regularisation.
LECAM = {"squared": lecam_penalty, "rectified": rectified_lecam_penalty}


def r1_penalty(discriminate: Callable[[jax.Array], jax.Array], real: jax.Array) -> jax.Array:
  """Squared gradient norm of the discriminator at real images (R1 of Mescheder et al. 2018, equation 9).

  Args:
    discriminate: images [b, h, w, c] -> logits [b]; each logit depends only on its own image.
    real: [b, h, w, c].

  Returns:
    [b]; the caller applies the usual factor gamma / 2.
  """
  gradient = jax.grad(lambda images: discriminate(images).sum())(real)
  return jnp.square(gradient).reshape(real.shape[0], -1).sum(axis=-1)


def code_entropy_loss(distances: jax.Array, temperature: float = 0.01) -> jax.Array:
  """Entropy term that keeps codes in use (from MaskGIT's published tokenizer code).

  Mean entropy of each vector's soft assignment minus the entropy of the mean assignment: low when each
  assignment is certain and all codes are used equally. It couples the whole batch.

  Args:
    distances: squared distances [m, K] from vectors to codes.
    temperature: of the softmax over negative distances.

  Returns:
    A scalar.
  """
  log_p = jax.nn.log_softmax(-distances / temperature)
  p = jnp.exp(log_p)
  mean_p = p.mean(axis=0)
  sample_entropy = -(p * log_p).sum(axis=-1).mean()
  mean_entropy = -(mean_p * jnp.log(mean_p + 1e-8)).sum()
  return sample_entropy - mean_entropy
