"""Hue shifts."""

import colorsys

import jax
import numpy as np

from maskgen import images

PICTURES = np.random.default_rng(0).random((7, 4, 5, 3)).astype(np.float32)


def test_only_hues_are_shifted():
  shift = np.arange(7, dtype=np.int32)
  turned = np.asarray(jax.jit(images.shift_hues)(PICTURES, shift))
  for before, after, by in zip(PICTURES, turned, shift, strict=True):
    for pixel, other in zip(before.reshape(-1, 3), after.reshape(-1, 3), strict=True):
      hue, lightness, saturation = colorsys.rgb_to_hls(*map(float, pixel))
      expected = colorsys.hls_to_rgb((hue + by / 6) % 1, lightness, saturation)
      np.testing.assert_allclose(other, expected, atol=1e-5)


def test_a_full_turn_changes_nothing():
  for shift in (0, 6):
    np.testing.assert_array_equal(images.shift_hues(PICTURES, np.full(7, shift, np.int32)), PICTURES)


def test_hue_shifts_are_invertible():
  shift = np.arange(7, dtype=np.int32)
  back = images.shift_hues(images.shift_hues(PICTURES, shift), 6 - shift)
  np.testing.assert_allclose(back, PICTURES, atol=1e-6)
