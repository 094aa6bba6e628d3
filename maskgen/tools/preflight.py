"""Reports what a training step needs from devices that are not on this machine.

python -m maskgen.tools.preflight --config=configs/mage_large.py --topology=v5e:16x16
"""

import json
import logging
from collections.abc import Sequence

from etils import epath

from maskgen import cli, files
from maskgen.benchmarks import common

log = logging.getLogger("maskgen")


def main(argv: Sequence[str]) -> None:
  """Parses the command line, compiles, and prints a report.

  Raises:
    UserError: if an argument or the config is wrong, or the batch does not divide over the mesh.
  """
  parser = cli.Parser(
    "Compiles the training step of a config for devices that need not be on this machine. Reports memory, "
    "arithmetic and communication per device, bounds on the time, whether the step fits, and if not, what "
    "makes it fit. Needs neither data nor weights; for TPUs, install the extra maskgen[tpu].",
    "python -m maskgen.tools.preflight --config=configs/mage_large.py --topology=v5e:16x16",
  )
  common.add_config(parser)
  parser.add_argument(
    "--topology",
    default="local",
    help="a TPU slice such as v5e:16x16, v5p:4x4x4 or v6e:16x16; gpu:24GiB for a GPU with that memory, whose "
    "activations are estimated by compiling for a CPU; cpu:8 for 8 virtual CPU devices; local (default) for "
    "the devices of this machine",
  )
  parser.add_argument(
    "--slices", type=int, default=1, help="number of TPU slices, connected by a data-centre network"
  )
  parser.add_argument(
    "--source",
    default="synthetic",
    choices=("synthetic", "tokens"),
    help="synthetic: images are tokenized in the step; tokens: the step reads cached codes",
  )
  parser.add_argument("--json", metavar="FILE", help="file to write the report to as JSON")
  args, config = common.parse(parser, argv)
  common.check_at_least(args, 1, "slices")
  if args.json:
    cli.check_out(args.json, flag="json", kind=".json")

  from maskgen.preflight import remedies, table, topology
  from maskgen.preflight.estimate import estimate

  devices, limit = topology.devices(args.topology, args.slices), topology.memory(args.topology)
  log.info("compiling for %d devices; large models take minutes", len(devices))
  names = {"config": args.config, "topology": args.topology, "slices": args.slices}
  report = names | estimate(config, devices, args.source, limit)
  remedy = None
  if not report["fits"]:
    remedy = remedies.find(config, devices, args.source, report, limit)
    report["remedy"] = None if remedy is None else remedies.show(remedy[0])
  print(table.show(report))
  if remedy is not None:
    report["with_remedy"] = remedy[1]
    print(f"\nwith {report['remedy']}:\n\n{table.show(names | remedy[1])}")
  if args.json:
    files.replace(epath.Path(args.json), json.dumps(report, indent=2))


if __name__ == "__main__":
  cli.run(main)
