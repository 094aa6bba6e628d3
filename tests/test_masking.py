import math
from fractions import Fraction

import jax
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from maskgen.errors import UserError
from maskgen.numerics import masking
from maskgen.numerics.masking import MaskRatio

DEFAULT = MaskRatio()


def draw(count: int, num_tokens: int, ratio: MaskRatio = DEFAULT, seed: int = 0):
  mask, kept = jax.jit(masking.random_mask, static_argnums=(1, 2))(
    jax.random.split(jax.random.key(seed), count), num_tokens, ratio
  )
  return np.asarray(mask), np.asarray(kept)


def truncated_normal(ratio: MaskRatio):
  low, high = ((bound - ratio.mean) / ratio.std for bound in (ratio.low, ratio.high))
  return scipy.stats.truncnorm(low, high, loc=ratio.mean, scale=ratio.std)


@pytest.mark.parametrize("ratio", [DEFAULT, MaskRatio(mean=0.3, std=0.5, low=0.1, high=0.7)])
def test_ratio_follows_the_truncated_normal(ratio):
  sample = np.asarray(ratio.sample(jax.random.split(jax.random.key(1), 5000)))
  assert ratio.low <= sample.min() and sample.max() <= ratio.high
  assert scipy.stats.kstest(sample, truncated_normal(ratio).cdf).pvalue > 0.01


def test_as_many_tokens_are_masked_as_the_ratio_says_rounded_up():
  num_tokens, draws = 16, 5000
  mask, _ = draw(draws, num_tokens)
  found = np.bincount(mask.sum(axis=1), minlength=num_tokens + 1)
  # ceil(n * r) = m where (m - 1) / n < r <= m / n.
  expected = draws * np.diff(truncated_normal(DEFAULT).cdf(np.arange(-1, num_tokens + 1) / num_tokens))
  possible = expected > 0
  assert found[~possible].sum() == 0
  assert scipy.stats.chisquare(found[possible], expected[possible]).pvalue > 0.01


@pytest.mark.parametrize("low", ["0", "0.07", "0.3", "0.5", "0.55", "0.6", "0.9"])
@pytest.mark.parametrize("num_tokens", [10, 50, 100, 256])
def test_a_fixed_ratio_rounds_as_exact_arithmetic_does(num_tokens, low):
  ratio = MaskRatio(low=float(low), high=float(low))
  exact = math.ceil(num_tokens * Fraction(low))
  mask, kept = draw(2, num_tokens, ratio)
  assert (mask.sum(axis=1) == exact).all()
  # All that is masked is dropped, so all that is kept is visible.
  assert kept.shape == (2, num_tokens - exact)
  assert not np.take_along_axis(mask, kept, axis=1).any()


@pytest.mark.parametrize("num_tokens,low", [(16, 0.5), (15, 0.5), (9, 0.1), (7, 0.0)])
def test_kept_positions(num_tokens, low):
  mask, kept = draw(500, num_tokens, MaskRatio(low=low))
  assert kept.dtype == np.int32 and kept.shape == (500, num_tokens - math.ceil(num_tokens * low))
  assert (np.diff(kept, axis=1) > 0).all()  # ascending, so also unique
  assert kept.min() >= 0 and kept.max() < num_tokens
  dropped = np.ones_like(mask)
  np.put_along_axis(dropped, kept, False, axis=1)
  assert (mask | ~dropped).all()


def test_all_positions_are_equally_likely():
  num_tokens, draws = 16, 8000
  mask, kept = draw(draws, num_tokens)
  # Positions of one example exclude each other, which only shrinks the statistic below.
  for counts in (mask.sum(axis=0), np.bincount(kept.ravel(), minlength=num_tokens)):
    share = counts.mean() / draws
    deviations = (counts - counts.mean()) / math.sqrt(draws * share * (1 - share))
    assert np.square(deviations).sum() < scipy.stats.chi2(num_tokens - 1).ppf(0.999)
  assert mask.any(axis=0).all() and not mask.all(axis=0).any()


def test_an_example_depends_on_its_key_alone():
  keys = jax.random.split(jax.random.key(3), 6)
  mask, kept = masking.random_mask(keys, 16, DEFAULT)
  alone_mask, alone_kept = masking.random_mask(keys[4:5], 16, DEFAULT)
  np.testing.assert_array_equal(mask[4:5], alone_mask)
  np.testing.assert_array_equal(kept[4:5], alone_kept)
  assert len(np.unique(mask, axis=0)) > 1


@pytest.mark.parametrize(
  "wrong", [dict(low=0.8, high=0.6), dict(low=-0.1), dict(high=1.1), dict(std=0.0), dict(low=math.nan)]
)
def test_wrong_ratios_are_refused(wrong):
  with pytest.raises(UserError, match="mask ratio"):
    MaskRatio(**wrong)


def test_token_mask_covers_touched_tokens_and_one_ring():
  pixels = np.zeros((1, 256, 256), bool)
  pixels[:, 64:192, 64:192] = True
  expected = np.zeros((16, 16), bool)
  expected[3:13, 3:13] = True
  np.testing.assert_array_equal(masking.token_mask(pixels, 16).reshape(16, 16), expected)


@pytest.mark.parametrize("size,factor", [((16, 24), 4), ((6, 6), 1), ((8, 16), 8)])
def test_token_mask_is_a_dilation_cut_at_the_borders(size, factor):
  rng = np.random.default_rng(0)
  pixels = rng.random((20, *size)) < 0.01
  pixels[0] = False
  pixels[1, 0, 0] = pixels[2, -1, -1] = pixels[3, 0, -1] = True
  found = np.asarray(masking.token_mask(pixels, factor)).reshape(20, size[0] // factor, size[1] // factor)
  for image, tokens in zip(pixels, found, strict=True):
    rows, columns = np.nonzero(image)
    touched = np.zeros_like(tokens)
    touched[rows // factor, columns // factor] = True
    np.testing.assert_array_equal(tokens, scipy.ndimage.binary_dilation(touched, np.ones((3, 3))))
  assert not found[0].any()
