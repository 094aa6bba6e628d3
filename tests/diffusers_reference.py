"""Writes what PyTorch's diffusers and transformers compute to files for tests/test_parity_diffusers.py.

A separate program: TensorFlow and transformers cannot share a process. Usage: FOLDER [MERGES], with CLIP's
`bpe_simple_vocab_16e6.txt.gz`; then FOLDER inversions, with an `inversion.safetensors` beside each model.
"""

import gzip
import json
import pathlib
import shutil
import sys

import diffusers
import numpy as np
import safetensors.torch
import torch
import transformers
from safetensors.numpy import save_file

from maskgen.importers.diffusers_layouts import LAYOUTS

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = ["c a", "ca t</w>", "t h", "th e</w>", "o n</w>", "a t</w>"]
PROMPTS = ["the cat on the mat", "a cat"]
NEGATIVE = "on a dog"
TEXTS = [
  *(
    "",
    "a photo of a cat",
    "A  Photo\tof a\nDOG.",
    "don't we'll they're I'm you've he'd it's",
    "x²½Ⅷ 3.14 1,000",
  ),
  *(
    "naïve café Ünïcödé Ⅻ",
    "日本語のテキスト",
    "emoji 😀👍🏽 ☃",
    "a!!! b... c?!",
    "under_score __init__ a_b",
    "ﬁ ﬂ ™ ©",
  ),
  *(
    "!",
    "!!",
    "hello!world",
    "Straße İstanbul",
    "مرحبا بالعالم",
    "हिन्दी में",
    "한국어",
    "e\u0301 vs é",
    "a\u00a0b\u2003c",
  ),
  *("C++ & C# <b>html</b> [x] {y} (z) \\ / | ~ ` @ # $ % ^ * + =", "supercalifragilisticexpialidocious"),
  *(
    "1girl, masterpiece, (best quality:1.2), 8k",
    "it\u2019s \u2018quoted\u2019 “text” — dash \u2013 en… end",
    "'s 't 're lone",
  ),
  *(
    "tabs\t\tand\r\nlines",
    "ALL CAPS AND mIxEd",
    "word " * 100,
    "a1b2c3",
    "100% of $5.00",
    "N'T 'S 'LL",
    "\u200bzero",
  ),
]

TEXT = {family: layout.text_encoders for family, layout in LAYOUTS.items()}
UNET = {family: layout.unet for family, layout in LAYOUTS.items()}
VAE = {family: layout.vae for family, layout in LAYOUTS.items()}
SCHEDULE = LAYOUTS["sd15"].scheduler
SCHEDULERS = {family: layout.scheduler for family, layout in LAYOUTS.items()}
# As of the model for 768 pixels.
SCHEDULERS["sd21"] = SCHEDULE | dict(_class_name="DDIMScheduler", prediction_type="v_prediction")

SAMPLERS = dict(ddim=diffusers.DDIMScheduler, dpm=diffusers.DPMSolverMultistepScheduler)

# The same families, tiny.
SMALL_TEXT = dict(vocab_size=520, max_position_embeddings=12, eos_token_id=519)
TINY_TEXT = dict(
  sd15=[dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=3)],
  sd21=[
    dict(hidden_size=16, intermediate_size=24, num_attention_heads=4, num_hidden_layers=2, hidden_act="gelu")
  ],
  sdxl=[
    dict(hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2),
    dict(
      hidden_size=16,
      intermediate_size=24,
      num_attention_heads=4,
      num_hidden_layers=3,
      hidden_act="gelu",
      projection_dim=10,
    ),
  ],
)
TINY_UNET = dict(
  sd15=UNET["sd15"]
  | dict(block_out_channels=[8, 8, 16, 16], norm_num_groups=4, cross_attention_dim=16, attention_head_dim=4),
  sd21=UNET["sd21"]
  | dict(
    block_out_channels=[8, 16, 24, 24],
    norm_num_groups=4,
    cross_attention_dim=16,
    attention_head_dim=[1, 2, 3, 3],
    layers_per_block=1,
    upcast_attention=True,
    resnet_time_scale_shift="scale_shift",  # as no published model has it
  ),
  sdxl=UNET["sdxl"]
  | dict(
    block_out_channels=[8, 16, 16],
    norm_num_groups=4,
    layers_per_block=1,
    transformer_layers_per_block=[1, 1, 2],
    attention_head_dim=[1, 2, 4],
    cross_attention_dim=24,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=58,
  ),
)
TINY_VAE = dict(
  block_out_channels=[8, 8, 16],
  down_block_types=["DownEncoderBlock2D"] * 3,
  up_block_types=["UpDecoderBlock2D"] * 3,
  norm_num_groups=4,
)


def build(family, small):
  """Builds text encoders, U-Net and autoencoder, full-size or tiny."""
  texts = []
  for i, options in enumerate((TINY_TEXT if small else TEXT)[family]):
    config = transformers.CLIPTextConfig(**options, **(SMALL_TEXT if small else {}))
    kind = transformers.CLIPTextModelWithProjection if i else transformers.CLIPTextModel
    texts.append(kind(config))
  unet = diffusers.UNet2DConditionModel(**(TINY_UNET if small else UNET)[family])
  vae = diffusers.AutoencoderKL(**VAE[family] | (TINY_VAE if small else {}))
  return texts, unet, vae


def saved(module):
  """The config of a network, as it is saved."""
  if isinstance(module, transformers.PreTrainedModel):
    return module.config.to_diff_dict() | dict(architectures=[type(module).__name__])
  return dict(module.config)


def shapes(family):
  """Names and shapes of all tensors of the full-size models, without allocating them."""
  with torch.device("meta"):
    texts, unet, vae = build(family, small=False)
  named = [*zip(("text_encoder", "text_encoder_2"), texts, strict=False), ("unet", unet), ("vae", vae)]
  return {
    part: dict(
      config=saved(module), shapes={name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    )
    for part, module in named
  }


def randomize(module):
  """Randomises all parameters: ones and zeros of initialisers would hide swapped parameters."""
  with torch.no_grad():
    for parameter in module.parameters():
      fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
      if parameter.ndim > 1:
        parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)
      else:
        parameter.add_(torch.randn_like(parameter) / fan_in**0.5)


def tokenizer(folder, merges, padding, length):
  """Writes a tokenizer with the files of the published ones."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  characters = [chr(i) for i in printable] + [chr(256 + i) for i in range(256 - len(printable))]
  tokens = [*characters, *(c + "</w>" for c in characters), *("".join(pair.split()) for pair in merges)]
  tokens += [START, END]
  folder.mkdir(parents=True)
  (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
  (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
  special = dict(bos_token=START, eos_token=END, unk_token=END, pad_token=padding)
  (folder / "special_tokens_map.json").write_text(json.dumps(special))
  settings = dict(tokenizer_class="CLIPTokenizer", model_max_length=length)
  (folder / "tokenizer_config.json").write_text(json.dumps(special | settings))
  return transformers.CLIPTokenizer.from_pretrained(folder)


def channels_last(tensor):
  return np.ascontiguousarray(tensor.numpy().transpose(0, 2, 3, 1))


def normal(generator, *shape):
  return torch.randn(shape, generator=generator)


@torch.no_grad()
def parts(family, texts, unet, vae):
  """Inputs and outputs of each module, channels last, 0 .. 1 for images."""
  generator = torch.Generator().manual_seed(1)
  arrays = {}
  for i, (encoder, options) in enumerate(zip(texts, TINY_TEXT[family], strict=True)):
    ids = torch.randint(0, 519, (3, 12), generator=generator)
    end = torch.tensor([3, 7, 11])
    for row, position in enumerate(end):
      ids[row, position:] = 519
    given = encoder(ids, output_hidden_states=True)
    arrays |= {f"text_{i}/ids": ids.int().numpy(), f"text_{i}/end": end.int().numpy()}
    arrays |= {
      f"text_{i}/last": given.last_hidden_state.numpy(),
      f"text_{i}/penultimate": given.hidden_states[-2].numpy(),
      f"text_{i}/pooled": (given.text_embeds if "projection_dim" in options else given.pooler_output).numpy(),
    }
  noisy, time = normal(generator, 2, 4, 8, 16), torch.tensor([3, 987])
  context = normal(generator, 2, 12, unet.config.cross_attention_dim)
  added = None
  if family == "sdxl":
    sizes = torch.tensor([[32.0, 64, 0, 5, 32, 64], [512, 768, 10, 0, 1024, 1024]])
    added = dict(text_embeds=normal(generator, 2, 10), time_ids=sizes)
    arrays |= {"unet/pooled": added["text_embeds"].numpy(), "unet/sizes": sizes.numpy()}
  predicted = unet(noisy, time, context, added_cond_kwargs=added).sample
  arrays |= {
    "unet/noisy": channels_last(noisy),
    "unet/time": time.int().numpy(),
    "unet/context": context.numpy(),
  }
  arrays["unet/predicted"] = channels_last(predicted)
  images, latents = torch.rand((2, 3, 16, 32), generator=generator), normal(generator, 2, 4, 4, 8)
  moments = vae.encode(2 * images - 1).latent_dist
  scale = vae.config.scaling_factor
  arrays |= {
    "vae/images": channels_last(images),
    "vae/mean": channels_last(moments.mean * scale),
    "vae/std": channels_last(moments.std * scale),
    "vae/latents": channels_last(latents),
    "vae/decoded": channels_last(vae.decode(latents / scale).sample / 2 + 0.5),
  }
  return arrays


def reference(folder, family):
  """Saves a tiny model in the published layout, with the outputs of its parts and its pipeline."""
  torch.manual_seed(0)
  texts, unet, vae = build(family, small=True)
  for module in (*texts, unet, vae):
    randomize(module.eval())
  paddings = dict(sd15=[END], sd21=["!"], sdxl=[END, "!"])[family]
  scheduler = getattr(diffusers, SCHEDULERS[family]["_class_name"]).from_config(SCHEDULERS[family])
  names = ("tokenizer", "tokenizer_2")
  tokenizers = {
    name: tokenizer(folder / "tokenizers" / name, MERGES, padding, 12)
    for name, padding in zip(names, paddings, strict=False)
  }
  shared = dict(vae=vae, text_encoder=texts[0], unet=unet, scheduler=scheduler, **tokenizers)
  if family == "sdxl":
    pipeline = diffusers.StableDiffusionXLPipeline(**shared, text_encoder_2=texts[1], add_watermarker=False)
  else:
    optional = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline = diffusers.StableDiffusionPipeline(**shared, **optional)
  pipeline.set_progress_bar_config(disable=True)
  # In several files, as large networks are.
  pipeline.save_pretrained(folder / "model", max_shard_size="500KB")
  (folder / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULERS[family]))
  shutil.copytree(folder / "model", folder / "published")
  for name in tokenizers:  # today they are saved in another form than those published
    shutil.rmtree(folder / "published" / name)
    shutil.copytree(folder / "tokenizers" / name, folder / "published" / name)

  arrays = parts(family, texts, unet, vae)
  noise = normal(torch.Generator().manual_seed(2), len(PROMPTS), 4, 8, 16)
  arrays["noise"] = channels_last(noise)
  for name, kind in SAMPLERS.items():
    pipeline.scheduler = kind.from_config(SCHEDULERS[family])
    latents = pipeline(
      PROMPTS,
      negative_prompt=None if family == "sdxl" else [NEGATIVE] * len(PROMPTS),
      latents=noise,
      height=32,
      width=64,
      num_inference_steps=4,
      guidance_scale=3.0,
      output_type="latent",
    ).images
    with torch.no_grad():
      images = vae.decode(latents / vae.config.scaling_factor).sample
    arrays |= {f"{name}/latents": channels_last(latents), f"{name}/images": channels_last(images / 2 + 0.5)}
  save_file(arrays, folder / "reference.safetensors")


@torch.no_grad()
def inversion(folder, prompt, word="<cat>"):
  """Saves the encoded prompt in which a word is a textual inversion."""
  pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "model")
  file = folder / "inversion.safetensors"
  if hasattr(pipeline, "text_encoder_2"):
    for name, number in (("clip_l", ""), ("clip_g", "_2")):
      encoder, tokenizer = (getattr(pipeline, part + number) for part in ("text_encoder", "tokenizer"))
      tensor = safetensors.torch.load_file(file)[name]
      pipeline.load_textual_inversion(tensor, token=word, text_encoder=encoder, tokenizer=tokenizer)
  else:
    pipeline.load_textual_inversion(str(file), token=word)
  found = pipeline.encode_prompt(
    prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
  )
  arrays = {"context": found[0]} | ({"pooled": found[2]} if len(found) > 2 else {})
  save_file({name: array.numpy() for name, array in arrays.items()}, folder / "inverted.safetensors")


def schedules():
  """The timesteps that samplers visit, and their noise levels."""
  found = []
  for spacing in ("leading", "linspace", "trailing"):
    for betas in ("linear", "scaled_linear", "squaredcos_cap_v2"):
      options = SCHEDULERS["sd15"] | dict(timestep_spacing=spacing, beta_schedule=betas)
      for name, kind in SAMPLERS.items():
        scheduler = kind.from_config(options)
        for steps in (1, 4, 7, 30):
          scheduler.set_timesteps(steps)
          levels = scheduler.alphas_cumprod[::111].tolist()
          found.append((options, name, steps, scheduler.timesteps.tolist(), levels))
  return found


def main():
  folder = pathlib.Path(sys.argv[1])
  if sys.argv[2:] == ["inversions"]:
    for family in UNET:
      inversion(folder / family, "the <cat> on the mat")
    return
  for family in UNET:
    reference(folder / family, family)
  (folder / "shapes.json").write_text(json.dumps({family: shapes(family) for family in UNET}))
  (folder / "schedules.json").write_text(json.dumps(schedules()))
  if len(sys.argv) > 2:
    merges = gzip.decompress(pathlib.Path(sys.argv[2]).read_bytes()).decode().split("\n")[1:48895]
    clip = tokenizer(folder / "clip", merges, END, 77)
    ids = [clip(text).input_ids for text in TEXTS]
    padded = [clip(text, padding="max_length", truncation=True).input_ids for text in TEXTS]
    (folder / "clip.json").write_text(json.dumps(dict(texts=TEXTS, ids=ids, padded=padded)))


if __name__ == "__main__":
  main()
