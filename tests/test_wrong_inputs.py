"""Wrong inputs to every command: one sentence that names them, before anything is compiled or written."""

import importlib
import re

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from maskgen.errors import TransientError, UserError

trained = tiny.trained

TINY = f"--config={tiny.FILE}"
NEW = f"{TINY} --workdir=new"
TOKENIZER = f"{TINY}:only=tokenizer"
CHECK = "--workdir=new --mode=check"
MAGE = "--model={mage}"
CODES = "--model={tokenizer}"
ARENA = "--objectives=mae --data=synthetic --out=new"

# The arguments of each command, and what the sentence says.
WRONG = {
  "main": [
    ("", r"required: --config, --workdir"),
    (f"{TINY}", r"required: --workdir"),
    ("--workdir=new", r"required: --config"),
    (f"{TINY} --workdir", r"--workdir: expected one argument"),
    (f"{NEW} --process_count=two", r"--process_count: invalid int value: 'two'"),
    (f"{NEW} --process_count=2", r"--coordinator, --process_count and --process_index"),
    (f"{NEW} --process_index=0", r"--coordinator, --process_count and --process_index"),
    (
      f"{NEW} --coordinator=localhost:1",
      r"--coordinator, --process_count and --process_index",
    ),
    (
      f"{NEW} --coordinator=localhost:1 --process_count=2 --process_index=2",
      r"--process_index=2: give a number from 0 to --process_count - 1",
    ),
    (
      f"{NEW} --coordinator=localhost:1 --process_count=0 --process_index=0",
      r"--process_index=0: give a number",
    ),
    (f"{NEW} --mode=Train", r"--mode: invalid choice: 'Train'"),
    (f"{NEW} --confg=x", r"argument '--confg=x' is not understood"),
    (f"{NEW} --config.=1", r"config"),
    (f"{NEW} --config.mage", r"'--config\.mage' is not understood"),
    (f"{NEW} --config.mage=1", r"config\.mage is a group of keys"),
    (f"{NEW} --config.mge.seed=1", r"config has no key 'mge'; did you mean 'mage'\?"),
    (
      f"{NEW} --config.mage.seeed=1",
      r"config\.mage has no key 'seeed'; did you mean 'seed'\?",
    ),
    (f"{NEW} --config.mage.seed.x=1", r"config\.mage\.seed has no key 'x'"),
    (f"{NEW} --config.seed=1", r"config has no key 'seed'"),
    (f"{NEW} --config.stages=mage", r"config\.stages"),
    (f"{NEW} --config.stages=('nothing',)", r"config\.stages names 'nothing'"),
    (f"{TINY}:stps=3 --workdir=new", r"':stps' does not exist; did you mean 'steps'\?"),
    (f"{TINY}:steps=many --workdir=new", r"':steps' is 'many': it takes values of type int"),
    (f"{TINY}:steps=1.5 --workdir=new", r"':steps' is '1\.5': it takes values of type int"),
    (f"{TINY}:steps --workdir=new", r"':steps' is 'True': it takes values of type int"),
    (f"{TINY}:only=nothing --workdir=new", r"config file .*tiny\.py fails in line \d+ \(KeyError.*nothing"),
    ("--config=empty --workdir=new", r"config file empty does not exist"),
    ("--config=in.png --workdir=new", r"config file in\.png is not a Python file"),
    ("--config=broken.py --workdir=new", r"config file broken\.py is not valid Python"),
    ("--config=raises.py --workdir=new", r"config file raises\.py fails in line 2 \(ZeroDivisionError"),
    ("--config=exits.py --workdir=new", r"config file exits\.py fails in line 2 \(SystemExit"),
    ("--config=plain.py --workdir=new", r"config file plain\.py has no function get_config\(arg\)"),
    ("--config=none.py --workdir=new", r"get_config of none\.py returns NoneType"),
    ("--config=dict.py --workdir=new", r"get_config of dict\.py returns dict"),
    ("--config=noarg.py --workdir=new", r"config file noarg\.py has no function get_config\(arg\)"),
    ("--config=number.py --workdir=new", r"config file number\.py has no function get_config\(arg\)"),
    ("--config=empty_config.py --workdir=new", r"config.* (objective|missing|needs)"),
    (f"{TOKENIZER} --workdir=in.png", r"workdir in\.png is not writable"),
    (f"{TOKENIZER} --workdir=in.png/run", r"workdir in\.png/run is not writable"),
    (f"{TOKENIZER} --workdir={'x' * 300}", r"workdir x+ is not writable \(File name too long\)"),
    (f"{TOKENIZER} --workdir=new --mode=eval", r"new holds no checkpoint|does not exist|no checkpoint yet"),
    (f"{TOKENIZER} --workdir=empty --mode=eval", r"empty is not a model"),
    (f"{TOKENIZER} --workdir=listed", r"listed/config\.json is damaged \(not a JSON object\)"),
    (f"{TOKENIZER} --workdir=scrambled", r"scrambled/config\.json is damaged"),
    *(
      (f"{TOKENIZER} {CHECK} --config.{override}", message)
      for override, message in (
        ("seed=x", r"config\.seed is 'x': it takes values of type int"),
        ("seed=None", r"seed is None"),
        ("seed=1.5", r"config\.seed is '1\.5'"),
        ("batch_size=-8", r"batch_size"),
        ("batch_size=8.0", r"config\.batch_size is '8\.0'"),
        ("accumulation=0", r"accumulation"),
        ("total_epochs=-1.0 --config.total_steps=None", r"total_epochs"),
        ("total_steps=None", r"total_steps"),
        ("log_every_steps=-1", r"log_every_steps"),
        ("checkpoint.keep=0", r"config\.checkpoint.*keep"),
        ("checkpoint.save_minutes=-1.0", r"save_minutes"),
        ("checkpoint=x", r"config\.checkpoint is a group of keys"),
        ("mesh.data=0", r"config\.mesh"),
        ("mesh.data=-2", r"config\.mesh"),
        ("mesh.fsdp=-1", r"config\.mesh"),
        ("mesh.tensor=x", r"config\.mesh\.tensor is 'x'"),
        ("mesh.tensor=16", r"config\.mesh asks for .* devices, there are 8"),
        ("sharding=x", r"sharding"),
        ("sharding=3", r"sharding"),
        ("ema.generator=2.0", r"config: ema\.generator is 2\.0"),
        ("ema.generator=x", r"config\.ema\.generator is 'x'"),
        ("ema.discriminatr=0.5", r"no (key|group) 'discriminatr'"),
        ("data.source=digits:x", r"data source 'digits:x' is malformed"),
        ("data.source=folder", r"data source 'folder' is malformed: write it as 'folder:"),
        ("data.source=folder:in.png", r"in\.png"),
        ("data.source=folder:empty", r"empty"),
        ("data.source=tar:nothing-{0..3}.tar", r"nothing"),
        ("data.source=tar:in.png", r"in\.png"),
        ("data.source=tokens:empty", r"empty"),
        ("data.source=tokens:nothing", r"nothing"),
        ("data.source=tfds:nothing_of_the_kind", r"nothing_of_the_kind"),
        ("data.source=3", r"'3'"),
        ("data.source=", r"config\.data\.source|data source ''"),
        ("data.split=nothing", r"split 'nothing'"),
        ("data.preprocess=", r"preprocess"),
        ("data.preprocess=decode(3)|", r"preprocess"),
        ("data.preprocess=decode(3)|resize", r"resize"),
        ("data.preprocess=decode(3)|resize(0)", r"resize"),
        ("data.preprocess=decode(3)|resize(-16)", r"resize"),
        ("data.preprocess=decode(3)|resize('x')", r"resize"),
        ("data.preprocess=decode(3)|resize(16,17,18,19)", r"resize"),
        ("data.preprocess=decode(3)|__import__('os')", r"__import__"),
        ("data.preprocess=decode(2)|resize(16)", r"decode"),
        ("data.preprocess=resize(16)", r"preprocess"),
        ("data.preprocess=decode(3)|random_crop(64)", r"random_crop"),
        (
          "data.preprocess=decode(3)|resize(8)",
          r"shape \(8, 8, 3\), but eval_preprocess",
        ),
        ("data.eval_preprocess=decode(3)|resize(8)", r"but eval_preprocess .* of shape \(8, 8, 3\)"),
        ("data.shuffle=1", r"config\.data has no key 'shuffle'"),
        ("objective.name=nothing", r"'nothing' does not exist"),
        ("objective.name=", r"objective"),
        ("objective.name=os", r"config\.objective\.name 'os' is .*no dataclass Objective"),
        ("objective.image_size=16", r"config\.objective\.image_size is '16'"),
        ("objective.image_size=(16,)", r"image_size"),
        ("objective.image_size=(16,'x')", r"image_size"),
        ("objective.image_size=(0,0)", r"image_size|0x0"),
        ("objective.image_size=(-16,16)", r"image_size|-16x16"),
        ("objective.tokenizer=x", r"config\.objective\.tokenizer is a group of keys"),
        ("objective.tokenizer.channels=0", r"channels"),
        ("objective.tokenizer.channels=-8", r"channels"),
        ("objective.tokenizer.multipliers=()", r"multipliers"),
        ("objective.tokenizer.multipliers=(1,)", r"multipliers|strides"),
        ("objective.tokenizer.strides=(3,)", r"strides|factor"),
        ("objective.tokenizer.blocks=-1", r"blocks"),
        ("objective.tokenizer.codebook_size=0", r"codebook_size"),
        ("objective.tokenizer.code_width=0", r"code_width"),
        ("objective.tokenizer.image_channels=4", r"channels|config\.data provides"),
        ("objective.tokenizer.dtype=float99", r"float99"),
        ("objective.tokenizer.nothing=1", r"config\.objective\.tokenizer has no key 'nothing'"),
        ("objective.revive_weight=x", r"config\.objective\.revive_weight is 'x'"),
        ("optimizer.generator.learning_rate=x", r"learning_rate is 'x'"),
        ("optimizer.generator.learning_rate=-1.0", r"learning_rate"),
        ("optimizer.generator.warmup_steps=-1", r"warmup_steps"),
        ("optimizer.generator.weight_decay=-1.0", r"weight_decay"),
        ("optimizer.generator.clip_norm=0.0", r"clip_norm"),
        ("optimizer.generator.name=sgdd", r"sgdd"),
        ("optimizer.generator.b1=2.0", r"b1"),
        ("optimizer.generator.multipliers=x", r"multipliers"),
        ("evals.nothing.every_steps=1", r"config\.evals\.nothing needs the key 'type'"),
        ("evals.reconstruction.every_steps=-1", r"every_steps"),
        ("evals.reconstruction.every_steps=x", r"every_steps is 'x'"),
        ("evals.x.type=os --config.evals.x.every_steps=1", r"type 'os' is .*no dataclass Evaluator"),
        ("evals.x.type=generation --config.evals.x.every_steps=1", r"config\.evals\.x.*generate"),
        ("pretrained.tokenizer=x", r"config\.pretrained has no key 'tokenizer'|config has no key"),
        ("init_from=nothing", r"nothing does not exist"),
        ("init_from=in.png", r"in\.png is not a model"),
        ("init_from=empty", r"empty is not a model"),
        ("profile.steps=-1", r"steps"),
        ("profile.first_step=-1", r"config\.profile"),
      )
    ),
    *(
      (
        f"{TINY}:only=mage {CHECK} --config.pretrained.tokenizer={{tokenizer}} --config.{override}",
        message,
      )
      for override, message in (
        ("pretrained.tokenizer=nothing", r"nothing does not exist"),
        ("pretrained.tokenizer=in.png", r"in\.png is not a model"),
        ("pretrained.tokenizer=empty", r"empty is not a model"),
        ("pretrained.tokenizer=", r"config\.pretrained\.tokenizer|model  ?does not exist"),
        ("pretrained.tokenizr=x", r"no key 'tokenizr'"),
        ("objective.width=0", r"width"),
        ("objective.depth=0", r"depth"),
        ("objective.heads=0", r"heads"),
        ("objective.decoder_heads=3", r"16 does not divide into 3 heads"),
        ("objective.dropout=1.5", r"dropout"),
        ("objective.label_smoothing=2.0", r"label_smoothing"),
        ("objective.remat=some", r"remat 'some'|remat.*'some'"),
        ("objective.attention=flash", r"attention.*'flash'|'flash'"),
        ("objective.sampling.temperature=-1.0", r"temperature"),
        ("objective.sampling.order=nothing", r"'nothing'"),
        ("objective.num_classes=10", r"no key 'num_classes'"),
        ("evals.samples.num_generated=0", r"num_generated"),
        ("evals.samples.num_examples=-1", r"num_examples"),
        ("evals.samples.sampling.stps=1", r"stps"),
      )
    ),
  ],
  "tools.generate": [
    ("", r"required: --model"),
    (MAGE, r"give --out=FILE\.png for one picture, or --out_dir=DIR"),
    ("--out=a.png", r"required: --model"),
    (f"{MAGE} --out=a.jpg", r"--out=a\.jpg: give the name of a \.png file"),
    (f"{MAGE} --out=", r"--out=: give the name of a \.png file"),
    (f"{MAGE} --out=nowhere/a.png", r"--out=nowhere/a\.png: the folder nowhere does not exist"),
    (f"{MAGE} --out=folder.png", r"--out=folder\.png is a folder"),
    (f"{MAGE} --out=a.png --count=-1", r"--count=-1: give at least 1"),
    (f"{MAGE} --out=a.png --count=1.5", r"--count: invalid int value: '1\.5'"),
    (f"{MAGE} --out=a.png --label=3", r"--label=3: this model was trained without classes"),
    (f"{MAGE} --out=a.png --label=all", r"--label=all: this model was trained without classes"),
    (f"{MAGE} --out=a.png --label=1 --prompt=x", r"--label=1 and --prompt=x: give one of them"),
    (f"{MAGE} --out_dir=in.png", r"--out_dir=in\.png: it is not a writable folder"),
    (f"{MAGE} --out=a.png --prompt=x", r"prompt.*trained without captions"),
    (f"{MAGE} --out=a.png --steps=many", r"--steps: invalid int value: 'many'"),
    (f"{MAGE} --out=a.png --steps=0", r"at least 1"),
    (f"{MAGE} --out=a.png --temperature=-1", r"temperature"),
    (f"{MAGE} --out=a.png --temperature=nan", r"temperature"),
    (f"{MAGE} --out=a.png --temperature=hot", r"--temperature: invalid float value: 'hot'"),
    (f"{MAGE} --out=a.png --schedule=x", r"schedule 'x' does not exist"),
    (f"{MAGE} --out=a.png --guidance=3", r"guidance"),
    (f"{MAGE} --out=a.png --sampler=ddim", r"unrecognized arguments: --sampler=ddim"),
    (f"{MAGE} --out=a.png --trajectory=b.jpg", r"--trajectory=b\.jpg: give the name of a \.png file"),
    (f"{MAGE} --out=a.png --trajectory=nowhere/b.png", r"--trajectory=nowhere/b\.png: the folder nowhere"),
    (f"{CODES} --out=a.png", r"has no 'generate'"),
    ("--model=nothing --out=a.png", r"model nothing does not exist"),
    ("--model=digit --out=a.png", r"model digit does not exist.*did you mean 'digits'\?"),
    ("--model= --out=a.png", r"model"),
    ("--model=in.png --out=a.png", r"in\.png is not a model"),
    ("--model=empty --out=a.png", r"empty is not a model"),
    ("--model=listed --out=a.png", r"listed/config\.json is damaged"),
    ("--model={root} --out=a.png", r"holds several stages"),
  ],
  "tools.edit": [
    ("", r"required: --model, --image, --out"),
    (f"{MAGE} --image=in.png", r"required: --out"),
    (f"{MAGE} --image=nothing.png --out=a.png --box=0,0,4,4", r"--image=nothing\.png"),
    (f"{MAGE} --image=text.png --out=a.png --box=0,0,4,4", r"--image=text\.png .*: its format is unknown"),
    (f"{MAGE} --image=folder.png --out=a.png --box=0,0,4,4", r"--image=folder\.png"),
    (f"{MAGE} --image= --out=a.png --box=0,0,4,4", r"--image="),
    (f"{MAGE} --image=cut.png --out=a.png --box=0,0,4,4", r"--image=cut\.png"),
    (f"{MAGE} --image=in.png --out=a.gif --box=0,0,4,4", r"--out=a\.gif: give the name"),
    (f"{MAGE} --image=in.png --out=a.png", r"--image=in\.png has no transparent pixels"),
    (f"{MAGE} --image=in.png --out=a.png --box=0,0,4", r"--box=0,0,4: give four whole numbers"),
    (f"{MAGE} --image=in.png --out=a.png --box=a,b,c,d", r"--box=a,b,c,d: give four whole numbers"),
    (f"{MAGE} --image=in.png --out=a.png --box=0.5,0,4,4", r"--box=0\.5,0,4,4: give four whole numbers"),
    (f"{MAGE} --image=in.png --out=a.png --box=4,4,4,4", r"box"),
    (f"{MAGE} --image=in.png --out=a.png --box=8,8,4,4", r"box"),
    (f"{MAGE} --image=in.png --out=a.png --box=99,99,120,120", r"box"),
    (f"{MAGE} --image=in.png --out=a.png --box=0,0,16,16", r"--box leaves no pixel known"),
    (f"{MAGE} --image=in.png --out=a.png --box=0,0,4,4 --mask=white.png", r"--mask and --box contradict"),
    (f"{MAGE} --image=in.png --out=a.png --mask=nothing.png", r"--mask=nothing\.png"),
    (f"{MAGE} --image=in.png --out=a.png --mask=text.png", r"--mask=text\.png"),
    (f"{MAGE} --image=in.png --out=a.png --mask=black.png", r"--mask=black\.png is black everywhere"),
    (f"{MAGE} --image=in.png --out=a.png --mask=white.png", r"--mask=white\.png leaves no pixel known"),
    (f"{MAGE} --image=in.png --out=a.png --mask=small.png", r"--mask=small\.png has 8 x 8 pixels"),
    (f"{MAGE} --image=in.png --out=a.png --outpaint=x", r"--outpaint=x: give one number or four"),
    (f"{MAGE} --image=in.png --out=a.png --outpaint=1,2", r"--outpaint=1,2: give one number or four"),
    (f"{MAGE} --image=in.png --out=a.png --outpaint=0", r"--outpaint=0,0,0,0: nothing is added"),
    (f"{MAGE} --image=in.png --out=a.png --outpaint=-4", r"-4"),
    (f"{MAGE} --image=in.png --out=a.png --outpaint=999999", r"--outpaint=999999,.*exceeds the limit"),
    (f"{MAGE} --image=in.png --out=a.png --box=0,0,4,4 --grow=-1", r"--grow=-1: give at least 0"),
    (f"{MAGE} --image=in.png --out=a.png --box=0,0,4,4 --grow=99", r"leaves no pixel known"),
    (f"{MAGE} --image=in.png --out=a.png --box=0,0,4,4 --feather=-1", r"--feather=-1: give at least 0"),
    (f"{MAGE} --image=in.png --out=a.png --box=0,0,4,4 --candidates=0", r"--candidates=0: give at least 1"),
    (f"{MAGE} --image=in.png --out=a.png --box=0,0,4,4 --seed=-1", r"--seed: '-1' is not a whole number"),
    (f"{MAGE} --image=in.png --out=a.png --box=0,0,4,4 --label=1", r"label is given|trained without classes"),
    (f"{MAGE} --image=in.png --out=a.png --box=0,0,4,4 --label=x", r"x: .* trained without classes"),
    (f"{CODES} --image=in.png --out=a.png --box=0,0,4,4", r"has no 'inpaint'"),
    ("--model=nothing --image=in.png --out=a.png --box=0,0,4,4", r"model nothing does not exist"),
  ],
  "tools.export": [
    ("", r"required: --model, --out"),
    (f"{MAGE} --out=in.png", r"in\.png.*not a writable folder"),
    (f"{MAGE} --out=folder.png/../in.png/x", r"not a writable folder"),
    (f"{MAGE} --out=listed", r"listed is not an empty folder"),
    (f"{MAGE} --out=", r"--out=: it is not a writable folder"),
    (f"{MAGE} --out=new --format=nothing", r"--format: invalid choice: 'nothing'"),
    (f"{MAGE} --out=new --dtype=int4", r"--dtype: invalid choice: 'int4'"),
    (f"{MAGE} --out=new --format=mage", r"--out=new: give the name of a \.safetensors file"),
    (f"{MAGE} --out=a.safetensors --format=mage --dtype=float16", r"--dtype=float16: --format=mage"),
    (f"{CODES} --out=a.safetensors --format=mage", r"is a model of objective 'tokenizer'"),
    (f"{MAGE} --out=new --format=siglip", r"of objective 'mage' without a ViT on pixels: --format=siglip"),
    ("--model=nothing --out=new", r"model nothing does not exist"),
    ("--model=in.png --out=new", r"in\.png is not a model"),
  ],
  "tools.convert": [
    ("", r"required: --format, --weights, --out"),
    ("--format=nothing --weights=x --out=new", r"--format: invalid choice: 'nothing'"),
    ("--format=mage --weights=nothing.pth --out=new", r"nothing\.pth"),
    ("--format=mage --weights=empty --out=new", r"empty"),
    ("--format=mage --weights= --out=new", r"weights|cannot be read"),
    ("--format=mage --weights=in.png --out=new", r"in\.png"),
    ("--format=mage --weights=one.safetensors --out=new", r"one\.safetensors has no tensor"),
    (
      "--format=mage --weights=one.safetensors --out=new --encoder_heads=0",
      r"--encoder_heads=0: give at least 1",
    ),
    ("--format=mage --weights=one.safetensors --out=new --decoder_heads=x", r"--decoder_heads: invalid int"),
    ("--format=mage --weights=one.safetensors --out=in.png", r"--out=in\.png: it is not a writable folder"),
    ("--format=mage --weights=nothing --out=listed", r"--out=listed is not an empty folder: give a new one"),
    (
      "--format=mobilenet_v2 --weights=x --out=new --image_size=64",
      r"--format=mobilenet_v2 takes no --image_size",
    ),
    ("--format=siglip --weights=x --out=new --decoder_heads=2", r"--format=siglip takes no --decoder_heads"),
    ("--format=vqgan_pytorch --weights=one.safetensors --out=new", r"one\.safetensors"),
    ("--format=vqgan_pytorch --weights=text.png --out=new", r"text\.png"),
    ("--format=maskgit_flax --weights=text.png --out=new", r"text\.png is not an intact Flax msgpack file"),
    ("--format=maskgit_flax --weights=nothing --out=new", r"nothing"),
    ("--format=mobilenet_v2 --weights=text.png --out=new", r"text\.png is not an intact npz file"),
    ("--format=mobilenet_v2 --weights=nothing.npz --out=new", r"nothing\.npz cannot be read"),
    ("--format=siglip --weights=one.safetensors --out=new", r"one\.safetensors"),
    ("--format=siglip --weights=nothing --out=new", r"nothing"),
    ("--format=clip --weights=text.png --out=new", r"text\.png is not an intact safetensors or PyTorch file"),
    ("--format=clip --weights=one.safetensors --out=new", r"one\.safetensors has no tensor"),
    ("--format=dinov2 --weights=empty --out=new", r"empty does not contain model\.safetensors"),
    ("--format=dinov3 --weights=one.safetensors --out=new", r"one\.safetensors has no tensor 'embeddings\."),
    ("--format=dinov3 --weights=x --out=new --image_size=8x", r"'8x' is neither PIXELS nor HEIGHTxWIDTH"),
    ("--format=siglip2 --weights=one.safetensors --out=new", r"one\.safetensors has no tensor 'embeddings\."),
    ("--format=siglip2 --weights=x --out=new --image_size=0x8", r"--image_size=0x8: give at least 1"),
    (
      "--format=maskgit_flax --weights=x --out=new --image_size=8x8",
      r"takes square images: give --image_size=",
    ),
    ("--format=diffusers --weights=nothing --out=new", r"nothing"),
    ("--format=diffusers --weights=in.png --out=new", r"in\.png"),
    ("--format=diffusers --weights=empty --out=new", r"empty"),
  ],
  "tools.sweep": [
    ("", r"required: --model, --out"),
    (f"{MAGE} --out=in.png", r"--out=in\.png: it is not a writable folder"),
    (f"{MAGE} --out=new --num_images=1", r"--num_images=1: give at least 2"),
    (f"{MAGE} --out=new --num_images=x", r"--num_images: invalid int value"),
    (f"{MAGE} --out=new --temperature=1,hot", r"--temperature=1,hot: give numbers"),
    (f"{MAGE} --out=new --steps=", r"--steps=: give"),
    (f"{MAGE} --out=new --steps=0", r"at least 1"),
    (f"{MAGE} --out=new --schedule=x", r"schedule 'x' does not exist"),
    (f"{MAGE} --out=new --guidance=2", r"guidance"),
    (f"{CODES} --out=new", r"does not generate images"),
    ("--model=nothing --out=new", r"model nothing does not exist"),
    (f"{MAGE} --out=new --features=pixel", r"space 'pixel' does not exist; did you mean 'pixels'"),
    (f"{MAGE} --out=new --features=mobilenet_v2:no.npz", r"'mobilenet_v2': no\.npz does not exist"),
  ],
  "tools.compare": [
    ("", r"required: --objectives, --data, --budget, --out"),
    (f"{ARENA} --budget=soon", r"--budget=soon: give FLOPs such as 2e14, or a time such as 30s, 10min or 1h"),
    (f"{ARENA} --budget=0min", r"--budget=0min: give FLOPs"),
    (f"{ARENA} --budget=1.2.3", r"--budget=1\.2\.3: give FLOPs"),
    (f"{ARENA} --budget=1e9 --seeds=0", r"--seeds=0 --trials=0: give at least 1 seed and 0 to 5 trials"),
    (f"{ARENA} --budget=1e9 --trials=6", r"0 to 5 trials"),
    (f"{ARENA} --budget=1e9 --objectives=mae,mae", r"--objectives=mae,mae: give different names"),
    (f"{ARENA} --budget=1e9 --objectives=mea", r"'mea' does not exist; did you mean"),
    (f"{ARENA} --budget=1e9 --out=in.png", r"--out=in\.png: it is not a writable folder"),
    (f"{ARENA} --budget=1e9 --config=configs/aren.py", r"did you mean 'arena\.py'"),
    (f"{ARENA} --budget=1e9 --objectives=lease", r"config\.pretrained\.teacher=runs/teacher"),
  ],
  "tools.bench": [
    ("", r"required: benchmark"),
    ("stp", r"benchmark: invalid choice: 'stp'"),
    ("step", r"required: --config"),
    ("step --config=nothing.py", r"config file nothing\.py"),
    (f"step {TINY} --stage=nothing", r"--stage=nothing: .* has no such stage"),
    (f"step {TOKENIZER} --stage=mage", r"--stage=mage: .* has no stages"),
    (f"step {TINY} --steps=0", r"--steps=0: give at least 1"),
    (f"step {TINY} --warmup=-1", r"--warmup=-1: give at least 0"),
    (f"step {TINY} --batch_size=0", r"--batch_size=0: give numbers of at least 1"),
    (f"step {TINY} --batch_size=8,x", r"--batch_size=8,x: give numbers of at least 1"),
    (f"step {TINY} --batch_size=", r"--batch_size=: give numbers of at least 1"),
    (f"step {TINY} --batch_size=3", r"not divisible by 8"),
    (f"step {TINY} --source=nothing", r"--source: invalid choice: 'nothing'"),
    (f"step {TOKENIZER} --source=tokens", r"'tokenizer' is not trained on codes"),
    (f"step {TINY} --profile=in.png", r"--profile=in\.png: it is not a writable folder"),
    (f"step {TINY} --config.mage.sed=1", r"config\.mage has no key 'sed'"),
    (f"step {TINY} --nothing=1", r"argument '--nothing=1' is not understood"),
    ("sample", r"required: --config"),
    (f"sample {TINY} --reuse=0", r"--reuse=0: give numbers of at least 1"),
    (f"sample {TINY} --reuse=x", r"--reuse=x: give numbers of at least 1"),
    (f"sample {TINY} --repeats=0", r"--repeats=0: give at least 1"),
    (f"sample {TINY} --sampling_steps=0", r"--sampling_steps=0: give at least 1"),
    (f"sample {TINY} --batch_size=-1", r"--batch_size=-1: give numbers of at least 1"),
    (f"sample {TINY} --stage=tokenizer", r"generate"),
    ("input", r"required: --config"),
    (f"input {TINY} --rounds=0", r"--rounds=0: give at least 1"),
    (f"input {TINY} --seconds=-1", r"--seconds=-1\.0: give at least 0"),
    (f"input {TINY} --seconds=nan", r"--seconds=nan: give at least 0"),
    (f"input {TINY} --config.mage.data.source=nothing", r"'nothing'"),
    ("tokens", r"required"),
  ],
  "tools.preflight": [
    ("", r"required: --config"),
    (f"{TINY} --topology=", r"--topology="),
    (f"{TINY} --topology=v5e", r"--topology=v5e: give a TPU slice"),
    (f"{TINY} --topology=v5e:0x0", r"--topology=v5e:0x0: give a TPU slice"),
    (f"{TINY} --topology=v5e:4y4", r"--topology=v5e:4y4: give a TPU slice"),
    (f"{TINY} --topology=cpu:0", r"--topology=cpu:0: give the number of CPU devices"),
    (f"{TINY} --topology=cpu:x", r"--topology=cpu:x: give the number of CPU devices"),
    (f"{TINY} --topology=local --slices=2", r"--slices=2: only TPU slices can be combined"),
    (f"{TINY} --topology=local --slices=0", r"--slices=0"),
    (f"{TINY} --topology=local --slices=x", r"--slices: invalid int value"),
    (f"{TINY} --topology=local --source=nothing", r"--source: invalid choice"),
    (f"{TINY} --topology=local --stage=nothing", r"--stage=nothing: .* has no such stage"),
    (f"{TINY} --topology=local --json=nowhere/a.json", r"--json=nowhere/a\.json: the folder nowhere"),
    (f"{TINY} --topology=local --json=a.txt", r"--json=a\.txt"),
    (f"{TINY} --topology=local --config.mage.batch_size=3", r"not divisible by 8"),
    (f"{TINY} --topology=local --config.mage.mesh.fsdp=3", r"config(\.mage)?\.mesh asks for"),
    ("--config=nothing.py --topology=local", r"nothing\.py"),
  ],
  "tools.prepare_data": [
    ("", r"required: --name"),
    ("--name= --data_dir=new", r"''"),
    ("--name=nothing_of_the_kind --data_dir=new", r"nothing_of_the_kind"),
    ("--name=digits/nothing --data_dir=new", r"nothing"),
    ("--name=digits --data_dir=in.png", r"in\.png"),
    ("--name=digits --data_dir=in.png/x", r"in\.png"),
    ("--name=digits --format=csv --data_dir=new", r"--format: invalid choice: 'csv'"),
    ("--name=../../x --data_dir=new", r"\.\./\.\./x"),
    ("--name=digits --nothing=1", r"unrecognized arguments: --nothing=1"),
  ],
  "tools.show_data": [
    ("", r"required: --config, --out"),
    (f"{TINY}", r"required: --out"),
    (f"{TINY} --out=a.jpg", r"--out=a\.jpg: give the name of a \.png file"),
    (f"{TINY} --out=nowhere/a.png", r"the folder nowhere does not exist"),
    (f"{TINY} --out=a.png --count=0", r"--count=0: give at least 1"),
    (f"{TINY} --out=a.png --scan=-1", r"--scan=-1: give at least"),
    (f"{TINY} --out=a.png --stage=nothing", r"--stage=nothing does not exist"),
    (f"{TOKENIZER} --out=a.png --stage=mage", r"--stage=mage: this config has no stages"),
    (f"{TOKENIZER} --out=a.png --config.data.source=folder:nothing", r"'nothing' is not a folder"),
    (f"{TOKENIZER} --out=a.png --config.data.source=nothing", r"'nothing' does not exist"),
    (f"{TOKENIZER} --out=a.png --config.data.preprocess=decode(3)|resize(8)", r"make them equal"),
    (f"{TOKENIZER} --out=a.png --config.batch_size=0", r"batch_size"),
    ("--config=nothing_here.py --out=a.png", r"config file nothing_here\.py does not exist"),
  ],
  "tools.tokenize": [
    ("", r"required: --model, --source, --out"),
    (f"{CODES} --source=digits --out=new --crops=0", r"--crops=0: give at least 1"),
    (f"{CODES} --source=digits --out=new --batch_size=0", r"--batch_size=0: give at least 1"),
    (f"{CODES} --source=digits --out=new --shard_records=0", r"--shard_records=0: give at least 1"),
    (f"{CODES} --source=digits --out=new --crops=many", r"--crops: invalid int value: 'many'"),
    (f"{CODES} --source=digits --out=new --seed=-1", r"--seed: '-1' is not a whole number"),
    (f"{CODES} --source=digits --out=new --process_index=1", r"--process_index=1: give a number from 0 to 0"),
    (f"{CODES} --source=digits --out=new --process_count=0", r"--process_(index|count)=0: give"),
    (f"{CODES} --source=digits --out=in.png", r"--out=in\.png: it is not a writable folder"),
    (f"{CODES} --source=nothing --out=new", r"data source 'nothing' does not exist"),
    (f"{CODES} --source= --out=new", r"data source ''"),
    (f"{CODES} --source=folder:nothing --out=new", r"'nothing' is not a folder"),
    (f"{CODES} --source=digits --split=trian --out=new", r"split 'trian'"),
    (f"{CODES} --source=digits --preprocess=x --out=new", r"op 'x' in preprocessing 'x' is unknown"),
    (f"{CODES} --source=digits --preprocess=decode(3)|resize(8) --out=new", r"8"),
    (f"{CODES} --source=digits --out=listed", r"listed"),
    ("--model=nothing --source=digits --out=new", r"model nothing does not exist"),
    ("--model=in.png --source=digits --out=new", r"in\.png is not a model"),
  ],
  "tools.vilex": [
    ("", r"required: command"),
    ("nothing", r"command: invalid choice: 'nothing'"),
    ("prompt", r"required: --model, --out"),
    (f"prompt {MAGE} --out=a.png", r"neither --prompt nor --image"),
    (f"prompt {MAGE} --out=a.png --prompt=x --count=0", r"--count=0: give at least 1"),
    (f"prompt {MAGE} --out=a.png --prompt=x", r"is of objective 'mage': give one of objective 'vilex'"),
    (f"prompt {MAGE} --out=a.jpg --prompt=x", r"--out=a\.jpg: give the name"),
    (f"prompt {MAGE} --out=a.png --image=nothing.png", r"--image=nothing\.png"),
    (f"prompt {MAGE} --out=a.png --image=text.png", r"--image=text\.png"),
    (f"prompt {MAGE} --out=a.png --image=nothing.npz", r"--image=nothing\.npz"),
    (f"reconstruct {MAGE} --out=a.png --image=in.png --num_tokens=x", r"--num_tokens=x: give whole numbers"),
    (f"reconstruct {MAGE} --out=a.png", r"--image"),
    (f"interpolate {MAGE} --out=a.png --image=in.png --count=1", r"--count=1: give at least"),
    (f"encode {MAGE} --out=nowhere/a.npz --image=in.png", r"nowhere"),
    ("prompt --model=nothing --out=a.png --prompt=x", r"model nothing does not exist"),
  ],
}
CASES = [(command, *case) for command, cases in WRONG.items() for case in cases]


@pytest.fixture(scope="module")
def place(tmp_path_factory, trained):
  """A folder with files of all kinds; the commands run in it and leave it as it is."""
  folder = tmp_path_factory.mktemp("place")
  for name in ("empty", "folder.png", "listed", "scrambled"):
    (folder / name).mkdir()
  (folder / "listed" / "config.json").write_text("[]")
  (folder / "scrambled" / "config.json").write_bytes(b"\xff\xfe{")
  for name, size, value in (("in", 16, 99), ("small", 8, 255), ("white", 16, 255), ("black", 16, 0)):
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(folder / f"{name}.png")
  (folder / "cut.png").write_bytes((folder / "in.png").read_bytes()[:50])
  (folder / "text.png").write_text("<html>")
  (folder / "one.safetensors").write_bytes(
    (header := b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}').__len__().to_bytes(8, "little")
    + header
    + bytes(4)
  )
  for name, text in {
    "broken": "def get_config(arg:\n",
    "raises": "def get_config(arg=None):\n  return 1 / 0\n",
    "exits": "import sys\nsys.exit(3)\n",
    "plain": "x = 1\n",
    "none": "def get_config(arg=None):\n  return None\n",
    "dict": "def get_config(arg=None):\n  return {}\n",
    "noarg": "def get_config():\n  return None\n",
    "number": "get_config = 3\n",
    "empty_config": "from ml_collections import ConfigDict\nget_config = lambda arg=None: ConfigDict()\n",
  }.items():
    (folder / f"{name}.py").write_text(text)
  return folder


def run(command: str, arguments: list[str]) -> None:
  result = importlib.import_module(f"maskgen.{command}").main(arguments)
  if result is not None:
    list(result)


@pytest.mark.parametrize(("command", "arguments", "message"), CASES)
def test_wrong_input_is_one_sentence(command, arguments, message, place, trained, monkeypatch):
  def compile_step(*_, **__):
    raise AssertionError("compiled before the input was checked")

  monkeypatch.chdir(place)
  monkeypatch.setattr(jax.stages.Lowered, "compile", compile_step)
  before = sorted(place.rglob("*"))
  filled = arguments.replace("{mage}", str(trained / "mage")).replace("{root}", str(trained))
  filled = filled.replace("{tokenizer}", str(trained / "tokenizer"))
  with pytest.raises(UserError, match=message) as error:
    run(command, filled.split())
  assert error.value.status in (UserError.status, TransientError.status)
  sentence, *table = str(error.value).split("\n")
  assert 10 < len(sentence) < 700 and not re.search(r"\.( [A-Z]|$)", sentence), sentence
  assert all(line.startswith("  ") for line in table)
  for inside in ("Traceback", "object at 0x", "<class", "ShapeDtypeStruct", 'File "'):
    assert inside not in str(error.value)
  assert sorted(place.rglob("*")) == before
