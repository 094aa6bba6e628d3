"""Errors that a user can act on."""

import contextlib
import difflib
import errno
from collections.abc import Generator, Iterable


class UserError(ValueError):
  """Something from outside (a config, flag, path, image or checkpoint) is wrong.

  The message is one sentence that names the thing and the remedy. Entry points print it without a
  traceback and exit with `status`, which tells launchers whether to start again.
  """

  status = 2


class TransientError(UserError):
  """Something from outside that time may mend, such as a store that cannot be reached."""

  status = 75  # EX_TEMPFAIL


# What file systems and stores say when waiting does not help; the latter by TensorFlow's classes.
_PERMANENT = {
  *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS),
  *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
  *("NotFoundError", "PermissionDeniedError", "UnauthenticatedError", "InvalidArgumentError"),
  *("UnimplementedError", "AlreadyExistsError"),
}


@contextlib.contextmanager
def of_storage(place: object = "a file or store") -> Generator[None]:
  """Turns what file systems and stores raise within the context into errors that a user can act on.

  Args:
    place: named where the error itself names none.

  Raises:
    TransientError: if time may mend it, such as a full disk or a store that cannot be reached.
    UserError: if not, such as a permission that is missing.
  """
  try:
    yield
  except Exception as error:
    reason: object = None
    if isinstance(error, OSError) and error.errno != errno.EPIPE:
      place, reason = error.filename or place, error.strerror
    elif any(cls.__name__ == "OpError" for cls in type(error).__mro__):  # TensorFlow's are not OSErrors
      reason = " ".join(str(getattr(error, "message", error)).split())
    if not reason:
      raise
    if _PERMANENT & {getattr(error, "errno", None), type(error).__name__}:
      raise UserError(
        f"{place} cannot be read or written ({reason}): check the path, its permissions, and that this "
        "machine knows such paths"
      ) from error
    raise TransientError(
      f"{place} cannot be read or written ({reason}): make room or reach it again, and start the same command"
    ) from error


def shortage(error: Exception) -> str | None:
  """Returns what a runtime says of devices whose memory does not suffice; None for any other error."""
  return str(error).splitlines()[0] if "RESOURCE_EXHAUSTED" in str(error) else None


def nearest(name: str, choices: Iterable[str]) -> str:
  """Returns the end of an error message that points from a wrong name to the right one."""
  choices = sorted(choices)
  close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
  if close:
    return f"; did you mean '{close[0]}'?"
  return f"; known: {', '.join(choices)}" if choices else ""
