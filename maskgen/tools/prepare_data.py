"""Prepares a data set with TFDS: python -m maskgen.tools.prepare_data --name=cifar10"""

import time
from collections.abc import Sequence

from etils import epath

from maskgen import cli


def main(argv: Sequence[str]) -> None:
  """Parses the command line, and downloads and prepares the data set unless it is already prepared."""
  parser = cli.Parser(
    "Downloads a data set and prepares it for the source tfds:NAME.",
    "python -m maskgen.tools.prepare_data --name=cifar10",
  )
  parser.add_argument("--name", required=True, help="a TFDS data set, NAME or NAME/CONFIG, or digits")
  parser.add_argument(
    "--format", choices=["array_record", "tfrecord"], default="array_record", help="file format"
  )
  parser.add_argument("--data_dir", help="folder to write to, default TFDS_DATA_DIR")
  args = parser.parse_args(argv)

  from maskgen.data import prepare, tfds_folder

  root = epath.Path(args.data_dir).expanduser() if args.data_dir else tfds_folder.data_dir()
  found = prepare.locate(root, args.name)
  if found:
    print(f"{found.name} is already prepared")
  else:
    start = time.monotonic()
    found = prepare.prepare(root, args.name, args.format)
    print(f"prepared {found.name} in {time.monotonic() - start:.0f} s")
  print(f"folder: {found.folder} ({found.file_format})")
  for split, count in found.splits.items():
    print(f"{split}: {count:,} records")
  print(f"config: source='tfds:{found.name}'")
  if root != tfds_folder.data_dir():
    print(f"before a run: export TFDS_DATA_DIR={root}")


if __name__ == "__main__":
  cli.run(main)
