"""One objective of a comparison at a common small size; `maskgen.tools.compare` trains many of them.

  python -m maskgen.main --config=configs/arena.py:objective=tokenizer,source=folder:/data/cifar10 \
    --workdir=runs/tokenizer
  python -m maskgen.main --workdir=runs/sorcen \
    --config=configs/arena.py:objective=sorcen,source=folder:/data/cifar10,tokenizer=runs/tokenizer

All objectives have the data, augmentation, network sizes, optimizer and evaluations of `mage_cifar.py:tiny`.
A row of `ROWS` adds what only one of them has. Any other objective needs no row: a module has those of the
common fields that its `Objective` has, such as `width`.

Hardware: minutes on two CPU cores; docs/arena.md says what was run.

Arguments:
  :objective   a row of `ROWS`, a module with an `Objective`, or `tokenizer`
  :source      a data source with classes, by default digits
  :size        pixels of a side, a multiple of 4, by default 32
  :mirror      whether pictures may be flipped
  :tokenizer   the workdir of a tokenizer
  :teacher     for `lease`, `mr_mae` and `mask_align`, a model with an image encoder of patches of 4 pixels
  :words       a text tokenizer of captions, such as bpe:PATH, by default the words of captioned_digits
  :steps       of training, by default 1000
  :seed        the seed of everything
  :rate        multiplies the learning rate
  :features    the feature space of the Frechet distance, by default pixels
  :reference   a file of `maskgen.tools.reference_stats` in that space; by default each run computes it
  :floors      also measure what pixels, codes and clusters of patches reach without training
  :tiny        200 steps instead of 1000
  :debug       tiny networks and evaluations
"""

import ml_collections

from maskgen import config as config_lib
from maskgen import evaluators, objectives
from maskgen.config import fields
from maskgen.training.pretrained import complete

HEADS = dict(contrastive_weight=0.1, projection_hidden=256, projection_width=64)
LEASE = dict(name="lease", clusters=64, neighbours=5)
TAUGHT = dict(teacher=dict(name="pretrained"))
DDIM = dict(steps=25, sampler="ddim")
# What an objective has beside the common fields, and instead of that with `:debug`; `second` makes its second
# view, by default another crop.
ROWS = {
  "mage": dict(objective=dict(name="mage")),
  "mage_c": dict(objective=dict(name="mage_c", temperature=0.2, **HEADS)),
  "sorcen": dict(
    objective=dict(name="sorcen", uniformity_weight=0.01, temperature=0.3, predictor_hidden=128, **HEADS),
    ema=dict(main=(0.996, 1.0)),
  ),
  "lease": dict(objective=dict(**LEASE, **TAUGHT)),
  "lease_own": dict(objective=LEASE, ema=dict(main=0.996)),
  "siglip": dict(objective=dict(name="contrastive", encoder=dict(name="vit"), temperature=0.1, bias=-10.0)),
  "mae": dict(objective=dict(name="masked_pixels", mask_ratio=0.75)),
  "cropmae": dict(
    objective=dict(name="two_view", mask_ratio=0.9, decoder_hidden=384), second="second_crop({}, (0.3, 0.6))"
  ),
  "dmjd": dict(objective=dict(name="dmjd", mask_ratio=0.6, block=2, cells=1)),
  "mr_mae": dict(objective=dict(name="mr_mae", mask_ratio=0.75, **TAUGHT)),
  "mask_align": dict(objective=dict(name="mask_align", blocks=2, **TAUGHT), debug=dict(blocks=1)),
  "lmd": dict(objective=dict(name="lmd", encoder=dict(patch=1))),
  "umd": dict(
    objective=dict(name="umd", encoder=dict(pooling="registers", fixed_positions=False), sampling=DDIM),
    debug=dict(sampling=DDIM | dict(steps=2)),
  ),
}
FLOORS = ("pixels", "patch_clusters", "token_histogram", "token_onehot", "code_vectors")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  args = config_lib.parse_arg(
    arg,
    **dict(objective="mae", source="", size=0, mirror=False, tokenizer="", teacher="", words=""),
    **dict(features="pixels", reference="", steps=0, seed=0, rate=1.0, floors=False, debug=False, tiny=False),
  )
  args.source = args.source or ("synthetic" if args.debug else "digits")
  args.size = args.size or (16 if args.debug else 32)
  small = dict(debug=args.debug, tiny=not args.debug, seed=args.seed)
  stages = config_lib.load_beside(__file__, "mage_cifar.py", **small)
  stages.mage.objective.update(image_size=(args.size, args.size))  # a token is 4 x 4 pixels
  config = stages.tokenizer if args.objective == "tokenizer" else stages.mage
  steps = args.steps = args.steps or (2 if args.debug else 200 if args.tiny else 1000)
  config.update(total_steps=steps, log_every_steps=max(1, min(50, steps // 10)), sharding=())
  config.update(data=pictures(args), checkpoint=dict(save_steps=1000))
  if args.objective == "tokenizer":
    config.objective.image_size = (args.size, args.size)
    config.optimizer.generator.warmup_steps = steps // 4
    config.evals.reconstruction.every_steps = steps
    return config
  row = ROWS.get(args.objective, dict(objective=dict(name=args.objective)))
  own = row["objective"] | (row.get("debug", {}) if args.debug else {})
  config.objective = section(args, stages.mage.objective.to_dict(), own)
  tokenizer = args.tokenizer or "runs/tokenizer"
  models = dict(tokenizer=tokenizer, autoencoder=tokenizer, teacher=args.teacher or "runs/teacher")
  config.pretrained = {key: path for key, path in models.items() if key in config.objective}
  if "captions" in config.objective:
    captions = config.objective.captions
    for key in ("preprocess", "eval_preprocess"):
      config.data[key] += f"|tokenize({captions.text_tokenizer!r}, {captions.length})"
  config.ema = row.get("ema", config.ema)
  config.optimizer.main.update(warmup_steps=steps // 10)
  config.optimizer.main.learning_rate *= args.rate
  objective = objectives.build(complete(config.to_dict())["objective"])
  if objective.batch_spec().views == 2:
    one, second = config.data.preprocess, row.get("second")
    config.data.preprocess = f"{one}|{second.format(args.size)}" if second else f"two_views|{one}"
  config.evals = evaluations(args, steps, objective.predict_fns())
  return config


def section(args, common: dict, own: dict) -> dict:
  """The section of an objective: those of the common fields that it has, and its own."""
  blocks = {key: common[key] for key in ("width", "depth", "heads")}
  vit = dict(image_size=common["image_size"], patch=4, pooling="class", fixed_positions=True)
  captions = config_lib.load_beside(__file__, "diffusion_digits.py").objective.captions.to_dict()
  captions["text_tokenizer"] = args.words or captions["text_tokenizer"]
  common |= dict(encoder=vit | blocks, text_encoder=dict(blocks, hidden=4 * blocks["width"]))
  common |= dict(captions=captions, rise_steps=max(1, 2 * args.steps // 3))
  common["autoencoder"] = dict(name="tokenizer") | {key: common[key] for key in ("image_size", "tokenizer")}
  known = fields.of(objectives.find(own, "config argument ':objective"))
  if "tokenizer" not in known:
    del common["mask_ratio"], common["sampling"]  # of tokens
  shared = {key: value for key, value in common.items() if key in known}
  return shared | {
    key: shared[key] | value if isinstance(value, dict) and key in shared else value
    for key, value in own.items()
  }


def pictures(args) -> dict:
  plain = f"decode(3)|resize_small({args.size})|center_crop({args.size})"
  moved = f"|pad({max(args.size // 16, 1)}, 'reflect')|random_crop({args.size})" + "|flip_lr" * args.mirror
  return dict(source=args.source, preprocess=plain + moved, eval_preprocess=plain)


def evaluations(args, steps: int, able: dict) -> dict:
  """Those that the prediction functions of an objective allow, at a tenth, each third and the end."""
  at = dict(every_steps=-(-steps // 3), first_step=max(steps // 10, 1))
  compared = ("random_encoder",) * (args.seed == 0) + FLOORS * args.floors
  few = 16 if args.debug else None
  found = dict(
    probe=dict(type="probe", **at, num_images=few or 10_000, shots=(), baselines=compared),
    generation=dict(type="generation", **at, num_images=few or 1000, features=args.features),
  )
  found["generation"]["reference"] = args.reference or None
  needs = {name: evaluators.find(name, f"config.evals.{name}").requires for name in found}
  return {name: section for name, section in found.items() if {*needs[name]} <= able.keys()}
