"""The folder of a run: reserved for one run, and visible to all of its processes."""

import contextlib
import uuid
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

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
