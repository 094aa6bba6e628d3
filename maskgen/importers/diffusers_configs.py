"""Builds our modules from the JSON configs of diffusers and transformers.

Every key is either read, or must have a value that changes nothing, or never affects the computation; any
other key is an error, so that no option is dropped silently.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from maskgen.errors import UserError
from maskgen.models.autoencoder_kl import AutoencoderKL
from maskgen.models.text_encoder import TextEncoder
from maskgen.models.unet import NUM_SIZES, UNet
from maskgen.numerics.diffusion import Schedule

Config = Mapping[str, Any]

# Keys of any config for the origin of a file, its training, or the return types of calls.
_NOTES = (
  *("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values", "_commit_hash"),
  *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "return_dict"),
  *("output_attentions", "output_hidden_states", "use_cache", "sample_size", "dropout"),
  *("attention_dropout", "initializer_factor", "initializer_range", "gradient_checkpointing"),
)


def text_encoder(config: Config, what: str, **options: Any) -> TextEncoder:
  """Builds the text encoder of a `text_encoder/config.json`.

  Its special ids are ignored, since those in published configs belong to another vocabulary; they come from
  the tokenizer.

  Args:
    config: the JSON object.
    what: names it in errors.
    **options: `dtype`, `attention`, `remat` of the module.

  Raises:
    UserError: for an option that is not supported.
  """
  kinds = ("CLIPTextModel", "CLIPTextModelWithProjection")
  kind = (config.get("architectures") or kinds)[0]
  if kind not in kinds:
    raise UserError(f"{what} is of '{kind}', not of {' or '.join(kinds)}: give a folder of Stable Diffusion")
  ids = ("bos_token_id", "eos_token_id", "pad_token_id")
  read = _read(
    config,
    what,
    defaults=dict(
      vocab_size=49408,
      max_position_embeddings=77,
      hidden_size=512,
      num_hidden_layers=12,
      num_attention_heads=8,
      intermediate_size=2048,
      hidden_act="quick_gelu",
      projection_dim=512,
      layer_norm_eps=1e-5,
    ),
    fixed={},
    notes=ids,
  )
  return TextEncoder(
    vocabulary_size=read["vocab_size"],
    positions=read["max_position_embeddings"],
    width=read["hidden_size"],
    depth=read["num_hidden_layers"],
    heads=read["num_attention_heads"],
    hidden=read["intermediate_size"],
    activation=read["hidden_act"],
    projection=read["projection_dim"] if kind == kinds[1] else 0,
    epsilon=read["layer_norm_eps"],
    **options,
  )


def unet(config: Config, what: str, **options: Any) -> UNet:
  """Builds the U-Net of a `unet/config.json`; arguments and errors as for `text_encoder`.

  Despite its name, `attention_head_dim` is the number of heads: diffusers reads it that way to support
  published configs, and rejects its own key `num_attention_heads`.
  """
  read = _read(
    config,
    what,
    defaults=dict(
      in_channels=4,
      out_channels=4,
      block_out_channels=(320, 640, 1280, 1280),
      down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
      up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
      layers_per_block=2,
      transformer_layers_per_block=1,
      attention_head_dim=8,
      cross_attention_dim=1280,
      norm_num_groups=32,
      norm_eps=1e-5,
      addition_embed_type=None,
      addition_time_embed_dim=None,
      projection_class_embeddings_input_dim=None,
      resnet_time_scale_shift="default",
    ),
    fixed=dict(
      act_fn=("silu", "swish"),
      attention_type=("default",),
      center_input_sample=(False,),
      class_embed_type=(None,),
      class_embeddings_concat=(False,),
      conv_in_kernel=(3,),
      conv_out_kernel=(3,),
      cross_attention_norm=(None,),
      downsample_padding=(1,),
      dual_cross_attention=(False,),
      encoder_hid_dim=(None,),
      encoder_hid_dim_type=(None,),
      flip_sin_to_cos=(True,),
      freq_shift=(0,),
      mid_block_only_cross_attention=(None, False),
      mid_block_scale_factor=(1,),
      mid_block_type=("UNetMidBlock2DCrossAttn",),
      num_attention_heads=(None,),
      num_class_embeds=(None,),
      only_cross_attention=(False,),
      resnet_out_scale_factor=(1,),
      resnet_skip_time_act=(False,),
      resnet_time_scale_shift=("default", "scale_shift"),
      reverse_transformer_layers_per_block=(None,),
      time_cond_proj_dim=(None,),
      time_embedding_act_fn=(None,),
      time_embedding_dim=(None,),
      time_embedding_type=("positional",),
      timestep_post_act=(None,),
    ),
    # Softmax is always in float32; a 1x1 convolution and a dense layer are the same projection.
    notes=("upcast_attention", "use_linear_projection", "addition_embed_type_num_heads"),
  )
  channels, levels = read["block_out_channels"], len(read["block_out_channels"])
  attends = [kind == "CrossAttnDownBlock2D" for kind in read["down_block_types"]]
  mirror = ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)]
  down = ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends]
  if (
    down != list(read["down_block_types"]) or mirror != list(read["up_block_types"]) or len(attends) != levels
  ):
    raise UserError(
      f"{what} has blocks {list(read['down_block_types'])} and {list(read['up_block_types'])}: only "
      "(CrossAttn)DownBlock2D, and the same mirrored on the way up, are supported"
    )
  for key in ("layers_per_block", "cross_attention_dim"):
    if not isinstance(read[key], int):
      raise UserError(f"{what} has {key}={read[key]}: only one number for all levels is supported")
  depths = _per_level(read["transformer_layers_per_block"], levels)
  return UNet(
    channels=channels,
    layers=read["layers_per_block"],
    depths=tuple(depth if one else 0 for depth, one in zip(depths, attends, strict=True)),
    middle_depth=depths[-1],
    heads=_per_level(read["attention_head_dim"], levels),
    in_channels=read["in_channels"],
    out_channels=read["out_channels"],
    context_width=read["cross_attention_dim"],
    **_added(read, what),
    scale_shift=read["resnet_time_scale_shift"] == "scale_shift",
    groups=read["norm_num_groups"],
    epsilon=read["norm_eps"],
    **options,
  )


def autoencoder(config: Config, what: str, **options: Any) -> AutoencoderKL:
  """Builds the autoencoder of a `vae/config.json`; arguments and errors as for `text_encoder`."""
  read = _read(
    config,
    what,
    defaults=dict(
      in_channels=3,
      out_channels=3,
      block_out_channels=(64,),
      layers_per_block=1,
      latent_channels=4,
      norm_num_groups=32,
      scaling_factor=0.18215,
      down_block_types=("DownEncoderBlock2D",),
      up_block_types=("UpDecoderBlock2D",),
    ),
    fixed=dict(
      act_fn=("silu", "swish"),
      shift_factor=(None, 0),
      latents_mean=(None,),
      latents_std=(None,),
      use_quant_conv=(True,),
      use_post_quant_conv=(True,),
      mid_block_add_attention=(True,),
    ),
    notes=("force_upcast",),
  )
  levels = len(read["block_out_channels"])
  for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
    if list(read[key]) != [kind] * levels:
      raise UserError(f"{what} has {key}={list(read[key])}: only {levels} times {kind} is supported")
  if read["in_channels"] != read["out_channels"]:
    raise UserError(
      f"{what} has {read['in_channels']} channels in and {read['out_channels']} out: they must be equal"
    )
  return AutoencoderKL(
    channels=read["block_out_channels"],
    layers=read["layers_per_block"],
    image_channels=read["in_channels"],
    latent_channels=read["latent_channels"],
    scale=read["scaling_factor"],
    groups=read["norm_num_groups"],
    **options,
  )


def schedule(config: Config, what: str) -> Schedule:
  """Builds the noise schedule of a `scheduler/scheduler_config.json`.

  The sampler that it names is ignored: all of `maskgen.numerics.diffusion.SAMPLERS` support the schedule.
  Missing keys that only some samplers have get the defaults of `DDIMScheduler.from_config` and
  `DPMSolverMultistepScheduler.from_config`.

  Args:
    config: the JSON object.
    what: names it in errors.

  Raises:
    UserError: for a schedule, prediction or option that is not supported.
  """
  betas = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
  predictions = {"epsilon": "noise", "v_prediction": "v"}
  off = (None, False)
  samplers = (
    *("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"),
    *("EulerDiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),
  )
  read = _read(
    config,
    what,
    defaults=dict(
      num_train_timesteps=1000,
      beta_schedule="linear",
      beta_start=0.0001,
      beta_end=0.02,
      prediction_type="epsilon",
      timestep_spacing="",
      steps_offset=0,
      set_alpha_to_one=True,
    ),
    fixed=dict(
      _class_name=samplers,
      beta_schedule=tuple(betas),
      prediction_type=tuple(predictions),
      trained_betas=off,
      rescale_betas_zero_snr=off,
      thresholding=off,
      clip_sample=off,
      use_karras_sigmas=off,
      use_exponential_sigmas=off,
      use_beta_sigmas=off,
      use_lu_lambdas=off,
      use_flow_sigmas=off,
      use_dynamic_shifting=off,
    ),
    # Keys that only other samplers use, or that belong to an option that is off.
    notes=(
      *("skip_prk_steps", "algorithm_type", "clip_sample_range", "disable_corrector"),
      *("dynamic_thresholding_ratio", "euler_at_final", "final_sigmas_type", "flow_shift"),
      *("interpolation_type", "lambda_min_clipped", "lower_order_final", "predict_x0"),
      *("sample_max_value", "shift_terminal", "sigma_max", "sigma_min", "solver_order"),
      *("solver_p", "solver_type", "time_shift_type", "timestep_type", "variance_type"),
    ),
  )
  if config.get("_class_name") in samplers[:2] and "clip_sample" not in config:
    raise UserError(f"{what} does not have clip_sample=false, so latents would be clipped: add it")
  return Schedule(
    steps=read["num_train_timesteps"],
    betas=betas[read["beta_schedule"]],
    beta_first=read["beta_start"],
    beta_last=read["beta_end"],
    prediction=predictions[read["prediction_type"]],
    spacing=read["timestep_spacing"],
    offset=read["steps_offset"],
    clean_end=read["set_alpha_to_one"],
  )


def _added(read: Config, what: str) -> dict[str, Any]:
  """The fields for what SDXL adds to the time embedding."""
  kind, width = read["addition_embed_type"], read["addition_time_embed_dim"]
  total = read["projection_class_embeddings_input_dim"]
  if kind is None:
    return {}
  if kind != "text_time" or not width or not total or total <= NUM_SIZES * width:
    raise UserError(
      f"{what} has addition_embed_type={kind!r} with addition_time_embed_dim={width} of {total}: only "
      f"'text_time' with {NUM_SIZES} sizes and a pooled text is supported, as in SDXL base"
    )
  return {"pooled_width": total - NUM_SIZES * width, "size_width": width}


def _per_level(value: Any, levels: int) -> tuple[int, ...]:
  return tuple(value) if isinstance(value, tuple) else (value,) * levels


def _read(
  config: Config,
  what: str,
  *,
  defaults: dict[str, Any],
  fixed: Mapping[str, tuple[Any, ...]],
  notes: Collection[str],
) -> dict[str, Any]:
  """Values of the keys of `defaults`, with lists as tuples, after checking every key."""
  for key, value in config.items():
    if key in fixed and value not in fixed[key]:
      choices = " or ".join(repr(choice) for choice in fixed[key])
      raise UserError(f"{what} has {key}={value!r}: only {choices} is supported")
    known = key in defaults or key in fixed or key in notes or key in _NOTES
    # An option newer than this list changes nothing if it is off.
    if not known and value is not None and value is not False:
      raise UserError(f"{what} has {key}={value!r}, which is not supported: remove it if it changes nothing")
  read = defaults | {key: value for key, value in config.items() if key in defaults and value is not None}
  for key, value in read.items():
    if isinstance(defaults[key], tuple) and not isinstance(value, list | tuple):
      raise UserError(f"{what} has {key}={value!r}: give a list")
    if isinstance(value, float) and not math.isfinite(value):
      raise UserError(f"{what} has {key}={value}: give a finite number")
    read[key] = tuple(value) if isinstance(value, list) else value
  return read
