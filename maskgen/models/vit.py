"""The image encoder of SigLIP: a vision transformer that returns one vector per patch (Zhai et al. 2023).

Letters: b batch, h w image, n patches, d width.
"""

import flax.linen as nn
import jax

from maskgen import sharding
from maskgen.config import check_at_least, check_dtype, fields
from maskgen.errors import UserError
from maskgen.models.remat import REMAT, check_remat
from maskgen.models.transformer import Transformer, check_attention, embedding_init, kernel_init


class ViT(nn.Module):
  """Pre-norm blocks over patches with learned positions, no class position; the defaults are ViT-B/16's.

  So400m/14 has patch=14, width=1152, depth=27, heads=16 and hidden=4304.

  Attributes:
    image_size: (h, w) of its input; images of other sizes are resized.
    patch: side of a patch, in pixels.
    width, depth, heads: d, the number of blocks, and the heads of each.
    hidden: width inside the MLPs, by default 4 d.
    dropout, drop_path: during training, see `Transformer`.
    dtype: the type of the computation; parameters are float32.
    attention, remat, scan: how the blocks are run, see `Transformer`.
  """

  image_size: tuple[int, int] = (224, 224)
  patch: int = 16
  width: int = 768
  depth: int = 12
  heads: int = 12
  hidden: int = 0
  dropout: float = 0.0
  drop_path: float = 0.0
  dtype: str = fields.precision("float32")
  attention: str = fields.operational("auto", plain="xla")
  remat: str = fields.operational("none", less_memory=REMAT[1:])
  scan: bool = fields.operational(False)

  def __post_init__(self):
    check_at_least(self, 1, "patch", "width", "depth", "heads")
    check_at_least(self, 0, "hidden")
    check_dtype(self.dtype)
    check_attention(self.attention, self.dtype, self.dropout)
    check_remat(self.remat)
    if len(self.image_size) != 2 or any(side < 1 or side % self.patch for side in self.image_size):
      raise UserError(f"image_size is {self.image_size}: give (height, width), multiples of {self.patch}")
    if self.width % self.heads:
      raise UserError(f"a width of {self.width} does not divide into {self.heads} heads")
    super().__post_init__()

  @property
  def num_patches(self) -> int:
    """The number of patches of an image."""
    return (self.image_size[0] // self.patch) * (self.image_size[1] // self.patch)

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
    """Images float32 [b, h, w, c] in [0, 1], of any size, to float [b, n, d], normalised, row by row."""
    shape = (images.shape[0], *self.image_size, images.shape[-1])
    if images.shape != shape:
      images = jax.image.resize(images, shape, "bilinear")
    side = (self.patch, self.patch)
    x = nn.Conv(
      self.width, side, side, "VALID", kernel_init=kernel_init, dtype=self.dtype, name="patch_embedding"
    )(2.0 * images - 1.0)
    position = self.param("position", embedding_init, (self.num_patches, self.width))
    x = x.reshape(x.shape[0], -1, self.width) + sharding.gather(position)[None]
    x = Transformer(
      self.depth,
      self.heads,
      dropout=self.dropout,
      dtype=self.dtype,
      attention=self.attention,
      remat=self.remat,
      scan=self.scan,
      drop_path=self.drop_path,
      hidden=self.hidden,
      tanh_gelu=True,
      name="encoder",
    )(sharding.constrain_batch(x.astype(self.dtype)), train=train)
    return nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="encoder_norm")(x)
