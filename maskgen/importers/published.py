"""Published weights by name: where they are, and under which licence their repositories stand."""

from typing import NamedTuple


class Published(NamedTuple):
  """Weights that somebody published.

  Attributes:
    format: what `maskgen.tools.convert` calls it.
    address: where a browser fetches the file.
    license: of the repository that links to it.
  """

  format: str
  address: str
  license: str


_DRIVE = "https://drive.google.com/file/d"
_MASKGIT = "https://storage.googleapis.com/maskgit-public/checkpoints"
PUBLISHED = {
  "mage_vit_base": Published("mage", f"{_DRIVE}/1Q6tbt3vF0bSrv5sPrjpFu8ksG3vTsVX2/view", "MIT"),
  "mage_vit_large": Published("mage", f"{_DRIVE}/15xBPa8EIa0IRUiRYtXiYOC9JZVyMIFrB/view", "MIT"),
  "mage_c_vit_base": Published("mage", f"{_DRIVE}/1069p6ZURt-xLFYrHfUiySQt1VCmWsun3/view", "MIT"),
  "mage_c_vit_large": Published("mage", f"{_DRIVE}/1GOz8l6N-3LcUrM6a--TnBztN7NJpZ-Hp/view", "MIT"),
  "mage_tokenizer": Published("vqgan_pytorch", f"{_DRIVE}/13S_unB87n6KKuuMdyMnyExW0G1kplTbP/view", "MIT"),
  "maskgit_tokenizer_256": Published(
    "maskgit_flax", f"{_MASKGIT}/tokenizer_imagenet256_checkpoint", "Apache-2.0"
  ),
  "maskgit_tokenizer_512": Published(
    "maskgit_flax", f"{_MASKGIT}/tokenizer_imagenet512_checkpoint", "Apache-2.0"
  ),
}
