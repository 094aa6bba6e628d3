"""Shows the data of a config: python -m maskgen.tools.show_data --config=FILE --out=FILE.png"""

import collections
import logging
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from tqdm import tqdm

from maskgen import cli
from maskgen import config as config_lib
from maskgen.errors import UserError, nearest
from maskgen.main import parse_overrides, split_stages
from maskgen.training.pretrained import complete
from maskgen.training.sections import find_type

if TYPE_CHECKING:
  from maskgen.data.inspect import Finding
  from maskgen.data.pipeline import Data
  from maskgen.data.sources import Source
  from maskgen.objectives import Objective
  from maskgen.sheet import Card

_EVALUATION_RECORDS = 8
# Pictures are enlarged by an integer factor to at least this number of pixels.
_SMALLEST = 128
_MASKED = (128, 128, 128)
_ALL_CLASSES, _EXTREME_CLASSES = 20, 5
_SECONDS_BETWEEN_LOGS = 10.0

log = logging.getLogger("maskgen")


def main(argv: Sequence[str]) -> None:
  """Parses the command line, prints statistics of the data and draws the contact sheet.

  Raises:
    UserError: if an argument, the config or the data is wrong.
  """
  parser = cli.Parser(
    "Draws the data of a config: the first training images exactly as the model sees them, their masks, "
    "evaluation images and captions; and prints sizes, classes and damage of the records. Nothing is trained "
    "and no model is loaded. Any key of the config can be set with --config.KEY=VALUE.",
    "python -m maskgen.tools.show_data --config=configs/quickstart.py --out=data.png",
  )
  parser.add_argument("--config", required=True, help="config file, FILE[:key=value,...]")
  parser.add_argument("--out", required=True, help="PNG file to write")
  parser.add_argument("--stage", help="stage of the config, default the last")
  parser.add_argument("--count", type=int, default=16, help="number of training records to show")
  parser.add_argument(
    "--scan", type=int, default=2000, help="number of records of each split to open for statistics"
  )
  args, rest = parser.parse_known_args(argv)
  cli.check_out(args.out)
  for name, least in (("count", 1), ("scan", 0)):
    if getattr(args, name) < least:
      raise UserError(f"--{name}={getattr(args, name)}: give at least {least}")
  config = complete(config_lib.to_dict(config_lib.load(args.config, parse_overrides(rest), find_type)))
  run = config_lib.build_dataclass(config_lib.RunConfig, _choose_stage(config, args.stage), "config")

  from maskgen import images, objectives, sheet
  from maskgen.data import pipeline
  from maskgen.data.sources import open_source

  objective = objectives.build(run.objective)
  count = min(args.count, run.batch_size)
  # The first rows of a batch are those of a smaller one.
  data = config_lib.build_dataclass(
    pipeline.Data, run.data, "config.data", batch_size=count, seed=run.seed, process_index=0, process_count=1
  )
  if data.image_shape != objective.image_shape:
    raise UserError(
      f"config.data provides images of shape {data.image_shape}, but config.objective takes "
      f"{objective.image_shape}: change config.data.preprocess or config.objective.image_size"
    )
  train = open_source(data.source, data.split)
  evaluation = open_source(data.eval_source or data.source, data.eval_split)
  splits = {"training": (train, data.split), "evaluation": (evaluation, data.eval_split)}
  for use, (source, split) in splits.items():
    print(f"{use}: {source.name}, split '{split}', {source.size:,} records")
    for line in _describe(source, _scan(source, args.scan)):
      print(f"  {line}")

  batch = next(data.train_batches())
  if "image" not in batch:
    print(f"{train.name} has no pictures: codes are shown instead")
  pictures = _training_pictures(batch, data, _draw_masks(objective, run.seed, run.batch_size, count))
  cards = _cards(train, data.preprocess, batch, list(pictures.values()))
  parts = f": {' | '.join(pictures)}" if len(pictures) > 1 else ""
  sections = {f"training, step 0{parts}": cards}

  batch = next(data.eval_batches("eval", min(count, _EVALUATION_RECORDS)))
  batch = {key: value[batch["valid"]] for key, value in batch.items()}
  enlarged = [images.enlarge(picture, _SMALLEST) for picture in images.to_uint8(batch["image"])]
  if enlarged:
    sections["evaluation"] = _cards(evaluation, data.eval_preprocess, batch, [enlarged])
  picture = sheet.draw(sections)
  images.write_png(args.out, picture)
  print(
    f"wrote {args.out}: {picture.shape[1]} x {picture.shape[0]} pixels, {len(cards)} of the {run.batch_size} "
    f"training images of step 0, {len(enlarged)} evaluation images"
  )


def _choose_stage(config: Mapping[str, Any], name: str | None) -> dict[str, Any]:
  """The config of the stage `name`, by default the last."""
  stages = list(split_stages(config, epath.Path("run")).items())
  if name is None:
    return stages[-1][1]
  if "stages" not in config:
    raise UserError(f"--stage={name}: this config has no stages, leave it out")
  for folder, stage in stages:
    if folder.name == name:
      return stage
  raise UserError(f"--stage={name} does not exist{nearest(name, config['stages'])}")


# Numbers


def _scan(source: "Source", count: int) -> list["Finding"]:
  """Opens `count` records and shows progress: a bar on a terminal, log lines elsewhere."""
  from maskgen.data import inspect

  indices = inspect.spread(source.size, count)
  findings = []
  with tqdm(
    desc=source.name, total=len(indices), unit="record", leave=False, dynamic_ncols=True, disable=None
  ) as bar:
    logged = time.monotonic()
    for finding in inspect.scan(source, indices):
      findings.append(finding)
      bar.update()
      if bar.disable and time.monotonic() - logged > _SECONDS_BETWEEN_LOGS:
        logged = time.monotonic()
        log.info("scanned %d of %d records of %s", len(findings), len(indices), source.name)
  return findings


def _describe(source: "Source", findings: Sequence["Finding"]) -> Iterator[str]:
  """Describes the findings of some or all records, line by line."""
  if not findings:
    yield "scanned no records"
    return
  yield f"scanned {len(findings):,} of {source.size:,}"
  if source.class_names is not None:
    counts = collections.Counter(dict.fromkeys(range(len(source.class_names)), 0))
    counts.update(finding.label for finding in findings if finding.label is not None)
    yield from _describe_classes([(source.class_names[label], number) for label, number in counts.items()])
  sides = [finding.sides for finding in findings if finding.sides is not None]
  if sides:
    heights, widths = (
      f"{min(side)} / {round(statistics.median(side))} / {max(side)}" for side in zip(*sides, strict=True)
    )
    yield f"pictures: height {heights}, width {widths} (min / median / max)"
  damaged = [finding for finding in findings if finding.damage is not None]
  yield f"damaged: {len(damaged) or 'none'}"
  for finding in damaged:
    yield f"  {source.describe(finding.index)}: {finding.damage}"


def _describe_classes(counts: Sequence[tuple[str, int]]) -> Iterator[str]:
  if len(counts) <= _ALL_CLASSES:
    yield f"scanned records of each of the {len(counts)} classes:"
    width = max(len(f"{number:,}") for _, number in counts)
    for name, number in counts:
      yield f"  {number:>{width},}  {name}"
    return
  ordered = sorted(counts, key=lambda count: count[1])
  empty = sum(not number for _, number in counts)
  yield f"{len(counts):,} classes, {empty:,} of them without a scanned record"
  for which, some in (("smallest", ordered[:_EXTREME_CLASSES]), ("largest", ordered[-_EXTREME_CLASSES:])):
    yield f"  {which}: {', '.join(f'{name} {number:,}' for name, number in some)}"


# Pictures


def _draw_masks(objective: "Objective", seed: int, batch_size: int, count: int) -> np.ndarray | None:
  """The masks of the first `count` examples of step 0, bool [count, h', w'], if the objective has masks."""
  from maskgen.training.step import step_keys

  mask = objective.predict_fns().get("mask")
  if mask is None:
    return None
  keys = step_keys(seed, 0, batch_size)[0][:count]
  return np.asarray(mask({}, {"key": keys}, None))


def _training_pictures(
  batch: Mapping[str, np.ndarray], data: "Data", masks: np.ndarray | None
) -> dict[str, list[np.ndarray]]:
  """For each part of a card, its title and a picture for each record."""
  from maskgen import images, sheet

  key, title = ("image", "view") if "image" in batch else ("tokens", "codes")
  views = [batch[name] for name in (key, f"{key}2") if name in batch]
  blank = np.full((len(batch["record"]), *data.image_shape), 255, np.uint8)
  base = images.to_uint8(views[0]) if key == "image" else blank
  height, width = images.enlarge(base[0], _SMALLEST).shape[:2]
  parts: dict[str, list[np.ndarray]] = {}
  for number, view in enumerate(views, 1):
    name = f"{title} {number}" if len(views) > 1 else {"view": "image"}.get(title, title)
    if key == "image":
      parts[name] = [images.enlarge(picture, _SMALLEST) for picture in images.to_uint8(view)]
    else:
      parts[name] = [sheet.page(" ".join(map(str, codes)), height, width) for codes in view]
  if masks is not None:
    parts["mask"] = [images.enlarge(_cover(*pair), _SMALLEST) for pair in zip(base, masks, strict=True)]
  return parts


def _cover(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Greys out masked tokens: uint8 [h, w, 3] from an image and bool [h', w']."""
  rows, columns = image.shape[0] // mask.shape[0], image.shape[1] // mask.shape[1]
  pixels = np.repeat(np.repeat(mask, rows, axis=0), columns, axis=1)
  return np.where(pixels[..., None], np.array(_MASKED, np.uint8), image)


def _cards(
  source: "Source", preprocess: str, batch: Mapping[str, np.ndarray], parts: Sequence[Sequence[np.ndarray]]
) -> list["Card"]:
  """A card for each record of a batch, with its class, captions and name."""
  from maskgen.data import inspect
  from maskgen.data.preprocess import parse_preprocess
  from maskgen.numerics import text
  from maskgen.sheet import Card

  records = [int(record) for record in batch["record"]]
  texts: list[list[str]] = [[] for _ in records]
  if source.class_names is not None:
    for lines, label in zip(texts, batch["label"], strict=True):
      lines.append(source.class_names[label])
  views = parse_preprocess(preprocess).views
  for row, captions in enumerate(inspect.captions(source, records)):
    # Each draw of a record takes its next caption.
    texts[row] += [captions[row // source.size * views % len(captions)]] if captions else []
  for op in parse_preprocess(preprocess).ops:
    if op.name == "tokenize":
      tokenizer = text.open_text_tokenizer(op.arguments["tokenizer"])
      for lines, ids in zip(texts, batch["caption"], strict=True):
        lines.append(f"tokens: {tokenizer.decode(ids)}")
  return [
    Card(pictures, lines, source.describe(record))
    for *pictures, lines, record in zip(*parts, texts, records, strict=True)
  ]


if __name__ == "__main__":
  cli.run(main)
