"""Resizing against the programs that it equals."""

import numpy as np
import pytest
from PIL import Image

from maskgen.data.cpu_tf import tf
from maskgen.numerics import resizing


@pytest.mark.parametrize("sides", [(32, 32), (64, 50), (256, 256), (299, 299), (512, 301)])
def test_bilinear_tf1_is_tensorflows_in_every_bit(sides):
  images = np.random.default_rng(0).integers(256, size=(2, *sides, 3)).astype(np.float32)
  expected = tf.compat.v1.image.resize_bilinear(images, (299, 299)).numpy()
  np.testing.assert_array_equal(resizing.bilinear_tf1(images, 299), expected)


@pytest.mark.parametrize("sides", [(32, 48), (512, 300)])
def test_bicubic_pillow_is_pillows(sides):
  image = np.random.default_rng(1).integers(256, size=sides).astype(np.float32)
  expected = np.asarray(Image.fromarray(image).resize((299, 299), Image.Resampling.BICUBIC))
  found = np.asarray(resizing.bicubic_pillow(image[None, :, :, None], 299))[0, :, :, 0]
  np.testing.assert_allclose(found, expected, atol=2e-4)  # of 255


@pytest.mark.parametrize("side", [32, 512])
def test_bilinear_half_pixel_is_tensorflows_without_antialiasing(side):
  images = np.random.default_rng(2).integers(256, size=(1, side, side, 3)).astype(np.float32)
  expected = tf.image.resize(images, (299, 299), antialias=False).numpy()
  np.testing.assert_allclose(resizing.bilinear_half_pixel(images, 299), expected, atol=2e-2)
