"""The folder of a run: reserved for one run, visible to all of its processes, and with the run's config."""

import contextlib
import json
import shlex
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from maskgen import __version__, files
from maskgen import config as config_lib
from maskgen.errors import TransientError, UserError
from maskgen.processes import any_of, wait
from maskgen.training import lock


@contextlib.contextmanager
def only_run_in(workdir: epath.Path) -> Iterator[None]:
  """Reserves a folder that all processes share for this run while the context lasts.

  Raises:
    UserError: in every process, if one of them does not see the folder.
    TransientError: in every process, if another run is active in it.
  """
  refusal = None
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      workdir.mkdir(parents=True, exist_ok=True)
      try:
        stack.enter_context(lock.hold(workdir))
      except TransientError as error:
        refusal = error
    if any_of(refusal is not None):
      raise refusal or TransientError(f"process 0 refuses to run in {workdir}: see its log")
    _check_shared(workdir)
    yield


def write_config(
  workdir: epath.Path,
  config: Mapping[str, Any],
  argv: Sequence[str],
  overridden: Mapping[str, tuple[Any, Any]],
  classes: Sequence[str] = (),
) -> None:
  """Writes `config.json` atomically, with the version of maskgen, the command, and the names of classes.

  A file that says the same config is left alone, with the version and the command that began the run.

  Args:
    workdir: the folder.
    config: the config.
    argv: the flags of the command.
    overridden: by key, the value in the config file and the one that flags gave in its place.
    classes: the names of classes that the model knows.
  """
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    file = workdir / "config.json"
    names = {"classes": list(classes)} if classes else {}
    if file.exists():
      with contextlib.suppress(UserError):  # a damaged one is replaced
        stored = files.read_json(file, "")
        if stored.items() >= names.items() and config_lib.without_origin(stored) == config:
          return
    command = shlex.join(["python", "-m", "maskgen.main", *argv])
    origin = {"version": __version__, "command": command, "overridden": overridden}
    files.replace(file, json.dumps({**config, **names, **origin}, indent=2))


def _check_shared(workdir: epath.Path) -> None:
  if jax.process_count() == 1:
    return
  mark = multihost_utils.broadcast_one_to_all(np.frombuffer(uuid.uuid4().bytes, np.uint8))
  file = workdir / f".shared-{np.asarray(mark).tobytes().hex()}"
  if jax.process_index() == 0:
    file.write_text("")
  wait("the workdir is marked")
  seen = multihost_utils.process_allgather(np.asarray(file.exists()))
  if jax.process_index() == 0:
    file.unlink()
  if not seen.all():
    raise UserError(
      f"workdir {workdir} is not shared by all processes ({int(seen.sum())} of {seen.size} see it): give one "
      "that is, such as a bucket"
    )
