"""SigLIP, B/16, on pictures with captions: contrastive learning with a sigmoid loss (Zhai et al. 2023).

  python -m maskgen.main --workdir=runs/siglip_base \
    --config=configs/siglip_base.py:source='tar:/data/{000..999}.tar',tokenizer=weights/clip_tokenizer

`source` are pictures with captions, as in docs/your_pictures.md; `tokenizer` is a folder with CLIP's
vocabulary. For CLIP's loss set objective.loss="softmax", temperature=0.07 and embedding_width=512. For LiT, a
frozen image encoder, set objective.trained="text", pretrained.encoder to a trained model and
objective.encoder to dict(name="pretrained").

Hardware: 32 accelerators of 40 GB or more are meant for the published batch of 32,768 pairs. The paper's
data, WebLI, is not public. The authors of this file have only run `:tiny` and `:debug`.

From the paper and its code: the loss, where its temperature and bias begin, the batch, the image encoder with
attention pooling, the second moment's decay. Chosen here: the length of the run, warm-up and weight decay.
The text encoder is CLIP's, which is causal and reads byte pairs; SigLIP's is neither.

Arguments:
  :tiny          this recipe on captioned digits, five minutes on 2 cores that others use, too
  :debug         2 steps of tiny networks
  :source        pictures with captions
  :eval_source   others to evaluate on; by default a tenth of `source` is held out
  :tokenizer     a folder with CLIP's `vocab.json` and `merges.txt`
  :batch_size    pairs per step; all are compared with each other, so there is no accumulation
"""

import ml_collections

from maskgen import config as config_lib

# What a class of captioned digits may be called.
TEMPLATES = (
  "a {}",
  "a large red {} in the middle on a blue background",
  "a small green {} at the top left on a purple background",
  "a large yellow {} at the bottom on a teal background",
  "a small pink {} at the right on a green background",
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  given = dict(source="tar:pairs-{000..999}.tar", eval_source="", tokenizer="clip_tokenizer")
  args = config_lib.parse_arg(arg, **given, batch_size=32_768, debug=False, tiny=False)
  captions = dict(text_tokenizer=f"bpe:{args.tokenizer}", length=64)
  preprocess = f"decode(3)|resize(224)|tokenize({captions['text_tokenizer']!r}, {captions['length']})"
  config = ml_collections.ConfigDict(
    dict(
      batch_size=args.batch_size,
      total_steps=275_000,
      log_every_steps=100,
      checkpoint=dict(save_steps=5000, save_minutes=15.0, keep=2),
      data=dict(
        source=args.source,
        eval_source=args.eval_source or None,
        preprocess=preprocess,
        eval_preprocess=preprocess,
      ),
      objective=dict(
        name="contrastive",
        encoder=dict(
          name="vit",
          image_size=(224, 224),
          patch=16,
          width=768,
          depth=12,
          heads=12,
          pooling="attention",
          dtype="bfloat16",
          remat="dots",
          scan=True,
        ),
        captions=captions,
        text_encoder=dict(
          width=768,
          depth=12,
          heads=12,
          hidden=3072,
          activation="gelu_tanh",
          epsilon=1e-6,
          dtype="bfloat16",
          remat="dots",
        ),
        loss="sigmoid",
        temperature=0.1,
        bias=-10.0,
      ),
      optimizer=dict(
        main=dict(learning_rate=1e-3, warmup_steps=10_000, b2=0.95, weight_decay=1e-4, clip_norm=1.0)
      ),
      evals=dict(retrieval=dict(type="retrieval", every_steps=5000, num_images=5000)),
      sharding=config_lib.BLOCK_RULES,
    )
  )
  if args.tiny or args.debug:
    shrink(config, config_lib.load_beside(__file__, "diffusion_digits.py", debug=args.debug), args.debug)
  return config


def shrink(config: ml_collections.ConfigDict, small: ml_collections.ConfigDict, debug: bool) -> None:
  """Keeps the recipe and takes data and lengths from the captioned digits."""
  for key in ("checkpoint", "data"):
    config[key] = small[key]
  steps = 2 if debug else 1500
  config.update(batch_size=8 if debug else 64, total_steps=steps, log_every_steps=min(50, steps))
  sizes = dict(width=16 if debug else 64, depth=1 if debug else 3, heads=4, dtype="float32", remat="none")
  config.objective.encoder.update(image_size=(16, 16), patch=4, **sizes, scan=False)
  config.objective.text_encoder.update(**sizes, hidden=4 * sizes["width"])
  config.objective.captions = small.objective.captions
  config.optimizer.main.warmup_steps = 0 if debug else 100
  config.evals = dict(
    zero_shot=dict(type="zero_shot", every_steps=500, templates=TEMPLATES),
    retrieval=dict(type="retrieval", every_steps=500, num_images=16 if debug else 1000),
  )
