"""Writes a page about runs: python -m maskgen.tools.report --workdir=runs/quickstart"""

from collections.abc import Sequence

from etils import epath

from maskgen import cli, report


def main(argv: Sequence[str]) -> None:
  """Parses the command line and writes the page.

  Raises:
    UserError: if a workdir holds no run or the page cannot be written.
  """
  parser = cli.Parser(
    "Writes one HTML page about one or several runs, finished or not: curves, pictures by step, results and "
    "settings. The page needs no other file and no network.",
    "python -m maskgen.tools.report --workdir=runs/one runs/two --out=comparison.html",
  )
  parser.add_argument("--workdir", nargs="+", required=True, help="folders of runs, compared side by side")
  parser.add_argument("--out", help=f"HTML file, by default {report.REPORT} in the first workdir")
  args = parser.parse_args(argv)
  out = args.out or str(epath.Path(args.workdir[0]) / report.REPORT)
  cli.check_out(out, kind=".html")
  report.write(out, args.workdir)
  print(f"wrote {out}")


if __name__ == "__main__":
  cli.run(main)
