"""Writes a token cache: python -m maskgen.tools.tokenize --model=DIR --source=... --out=DIR"""

import logging
import time
from collections.abc import Sequence

import numpy as np
from etils import epath

from maskgen import cli
from maskgen.errors import UserError

log = logging.getLogger("maskgen")


def main(argv: Sequence[str]) -> None:
  """Parses the command line and tokenizes."""
  parser = cli.Parser(
    "Writes the codes of several crops of every record, for training without the tokenizer's encoder "
    "(config.data.source='tokens:DIR'). The same command continues after an interruption; several processes "
    "can share the shards.",
    "python -m maskgen.tools.tokenize --model=runs/vqgan --source=folder:/data/imagenet --out=/data/tokens",
  )
  parser.add_model("workdir or export of a tokenizer, or of a model with one")
  parser.add_argument("--source", required=True, help="data source, as in config.data.source")
  parser.add_argument("--out", required=True, help="folder of the cache, local or remote")
  parser.add_argument("--split", default="train", help="split of the source")
  parser.add_argument(
    "--preprocess",
    help="preprocessing of crops, as in config.data.preprocess; default random_resized_crop and flip_lr",
  )
  parser.add_argument("--crops", type=int, default=10, help="crops per record")
  parser.add_seed("as config.seed: live training with this seed sees the same crops")
  parser.add_argument("--batch_size", type=int, default=64, help="images per batch")
  parser.add_argument("--shard_records", type=int, default=4096, help="records per shard")
  parser.add_argument("--process_index", type=int, default=0, help="index of this process, from 0")
  parser.add_argument("--process_count", type=int, default=1, help="number of processes")
  args = parser.parse_args(argv)
  for name in ("crops", "batch_size", "shard_records"):
    if getattr(args, name) < 1:
      raise UserError(f"--{name}={getattr(args, name)}: give at least 1")
  cli.check_out_folder(args.out)

  index, count = args.process_index, args.process_count
  if not 0 <= index < count:
    raise UserError(f"--process_index={index}: give a number from 0 to {count - 1}")

  import maskgen
  from maskgen import objectives, storage
  from maskgen.data import token_encoder
  from maskgen.data.cache import Cache, Manifest

  section = storage.load_config(args.model).get("objective")
  if section and not objectives.build(section).codebook_size:
    raise UserError(
      f"--model={args.model} is of objective '{section['name']}', which has no tokenizer: give a tokenizer, "
      "or a model trained on the codes of one"
    )
  model = maskgen.load(args.model)
  objective = model.objective
  height, width, channels = objective.image_shape
  preprocess = args.preprocess or (
    f"decode({channels})|random_resized_crop(({height}, {width}), (0.2, 1.0))|flip_lr"
  )
  reader = token_encoder.open_reader(args.source, args.split, preprocess, args.seed, objective.image_shape)
  manifest = Manifest(
    tokenizer=objectives.tokenizer_fingerprint(objective.tokenizer_params(model.variables)),
    image_shape=objective.image_shape,
    codebook_size=objective.codebook_size,
    tokens=model.num_tokens,
    crops=args.crops,
    source=args.source,
    split=args.split,
    fingerprint=reader.source.fingerprint,
    preprocess=preprocess,
    seed=args.seed,
    records=reader.source.size,
    class_names=reader.source.class_names,
    shard_records=args.shard_records,
    jpeg_decoding=reader.jpeg_decoding,
  )
  cache = Cache.create(epath.Path(args.out), manifest)
  mine = [number for number in cache.missing() if number % count == index]
  log.info(
    "%d records, %d crops each, in %d shards; %d of them left for this process",
    *(manifest.records, manifest.crops, manifest.num_shards, len(mine)),
  )
  spread = model.on_local_devices()

  def encode(images: np.ndarray) -> np.ndarray:
    return spread.call("encode", {"image": images})

  began = time.monotonic()
  images = 0
  for done, number in enumerate(mine, 1):
    codes, labels = token_encoder.encode(reader, manifest.shard(number), args.crops, args.batch_size, encode)
    cache.write(number, codes, labels)
    images += codes.shape[0] * codes.shape[1]
    rate = images / (time.monotonic() - began)
    left = (len(mine) - done) * args.shard_records * args.crops / rate
    log.info(
      "shard %d (%d/%d) | %.1f images/s | %d:%02d left",
      number,
      done,
      len(mine),
      rate,
      *divmod(round(left), 60),
    )
  missing = cache.missing()
  if missing:
    print(f"this process is done; {len(missing)} shards of {args.out} are left for other processes")
  else:
    print(f"wrote {args.out}: use it as config.data.source='tokens:{args.out}' with preprocess='take_crop'")


if __name__ == "__main__":
  cli.run(main)
