"""One page about one or several runs, which opens from disk and needs nothing beside it."""

from collections.abc import Sequence

from etils import epath

from maskgen import files
from maskgen.report import page, runs

REPORT = "report.html"


def write(out: epath.PathLike, workdirs: Sequence[epath.PathLike]) -> None:
  """Writes the page about the runs in these workdirs, finished or not.

  Args:
    out: the HTML file.
    workdirs: each the root of a run; several are compared side by side.

  Raises:
    UserError: if one of them holds no run, or a damaged file.
  """
  files.replace(epath.Path(out), page.render([runs.read(epath.Path(workdir)) for workdir in workdirs]))
