"""The JSON files of published text-to-image models, so that their sizes are known without a download.

Missing keys have the defaults of diffusers and transformers. Weights require the folder itself, which also
contains the tokenizers.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Layout(NamedTuple):
  """A published folder.

  Attributes:
    published: its name among `maskgen.importers.published.PUBLISHED`.
    text_encoders: the `config.json` of each text encoder.
    unet, vae, scheduler: the configs of the other parts.
    image_size: (h, w) of the images that it was trained with.
    start_id, end_id: of the tokenizers.
    padding_ids: of each text encoder's tokenizer.
  """

  published: str
  text_encoders: tuple[Mapping[str, Any], ...]
  unet: Mapping[str, Any]
  vae: Mapping[str, Any]
  scheduler: Mapping[str, Any]
  image_size: tuple[int, int]
  padding_ids: tuple[int, ...]
  start_id: int = 49406
  end_id: int = 49407


_CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
_OPEN_CLIP_H = dict(
  hidden_size=1024,
  intermediate_size=4096,
  num_attention_heads=16,
  num_hidden_layers=23,
  hidden_act="gelu",
  projection_dim=512,
)
_OPEN_CLIP_G = dict(
  architectures=("CLIPTextModelWithProjection",),
  hidden_size=1280,
  intermediate_size=5120,
  num_attention_heads=20,
  num_hidden_layers=32,
  hidden_act="gelu",
  projection_dim=1280,
)
_VAE = dict(
  block_out_channels=(128, 256, 512, 512),
  down_block_types=("DownEncoderBlock2D",) * 4,
  up_block_types=("UpDecoderBlock2D",) * 4,
  layers_per_block=2,
)
_SCHEDULER = dict(
  _class_name="PNDMScheduler",
  beta_end=0.012,
  beta_schedule="scaled_linear",
  beta_start=0.00085,
  clip_sample=False,
  num_train_timesteps=1000,
  set_alpha_to_one=False,
  skip_prk_steps=True,
  steps_offset=1,
)
# The id of the padding token "!" is 0.
_END, _EXCLAMATION = 49407, 0

LAYOUTS = {
  "sd15": Layout(
    "stable_diffusion_15",
    (_CLIP_L,),
    dict(cross_attention_dim=768, attention_head_dim=8),
    _VAE,
    _SCHEDULER,
    (512, 512),
    (_END,),
  ),
  # The model for 512 pixels; the one for 768 predicts v and is otherwise the same.
  "sd21": Layout(
    "stable_diffusion_21_base",
    (_OPEN_CLIP_H,),
    dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
    _VAE,
    _SCHEDULER,
    (512, 512),
    (_EXCLAMATION,),
  ),
  "sdxl": Layout(
    "stable_diffusion_xl_base",
    (_CLIP_L, _OPEN_CLIP_G),
    dict(
      block_out_channels=(320, 640, 1280),
      down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
      up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
      transformer_layers_per_block=(1, 2, 10),
      attention_head_dim=(5, 10, 20),
      cross_attention_dim=2048,
      use_linear_projection=True,
      addition_embed_type="text_time",
      addition_time_embed_dim=256,
      projection_class_embeddings_input_dim=2816,
    ),
    _VAE | dict(scaling_factor=0.13025),
    _SCHEDULER | dict(_class_name="EulerDiscreteScheduler", timestep_spacing="leading"),
    (1024, 1024),
    (_END, _EXCLAMATION),
  ),
}
