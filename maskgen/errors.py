"""Errors that a user can act on, and how messages put things."""

import contextlib
import difflib
import errno
import re
from collections.abc import Generator, Iterable


class UserError(ValueError):
  """An invalid input: a config, flag, path, image or checkpoint.

  The message is one sentence that names the input and the remedy. Entry points print it without a traceback
  and exit with `status`, which tells launchers whether to restart.
  """

  status = 2


class TransientError(UserError):
  """A temporary failure, such as a store that cannot be reached; retrying may succeed."""

  status = 75  # EX_TEMPFAIL


# Errors of file systems, and of stores by TensorFlow's classes, that retrying does not fix.
_PERMANENT = {
  *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS),
  *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
  *("NotFoundError", "PermissionDeniedError", "UnauthenticatedError", "InvalidArgumentError"),
  *("UnimplementedError", "AlreadyExistsError"),
}


def is_permanent(error: Exception) -> bool:
  """Whether an exception of a file system or store is one that retrying does not fix."""
  return bool(_PERMANENT & {getattr(error, "errno", None), type(error).__name__})


@contextlib.contextmanager
def storage_errors(place: object = "a file or store") -> Generator[None]:
  """Converts exceptions of file systems and stores within the context to errors that a user can act on.

  Args:
    place: the path to report if the exception has none.

  Raises:
    TransientError: if the failure may be temporary, such as a full disk or an unreachable store.
    UserError: if it is permanent, such as a missing permission.
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
    if is_permanent(error):
      raise UserError(
        f"{place} cannot be read or written ({reason}): check the path, its permissions, and that this "
        "machine supports such paths"
      ) from error
    raise TransientError(
      f"{place} cannot be read or written ({reason}): free space or restore access, and start it again"
    ) from error


def out_of_memory(error: Exception) -> str | None:
  """Returns the first line of an error if it says that device memory is exhausted, else None."""
  return str(error).splitlines()[0] if "RESOURCE_EXHAUSTED" in str(error) else None


def lost_process(error: BaseException | None) -> TransientError | None:
  """Returns the error to report if this one, or one that led to it, says that another process has ended."""
  signs = r"Gloo .*|NCCL .*remote process exited.*"
  of_jax = signs + r"|[^:\n]*[Cc]onnection (closed|reset) by peer.*"  # elsewhere, of a store
  while error is not None:
    if found := re.search(of_jax if type(error).__name__ == "JaxRuntimeError" else signs, str(error)):
      return TransientError(f"another process of this run has ended ({found[0]}): see its log")
    error = error.__cause__ or error.__context__
  return None


def nearest(name: str, choices: Iterable[str]) -> str:
  """Returns the end of an error message, which suggests the right name for a wrong one."""
  choices = sorted(choices)
  close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
  if close:
    return f"; did you mean '{close[0]}'?"
  return f"; known: {', '.join(choices)}" if choices else ""


def counted(number: int, noun: str) -> str:
  """Returns "1 image", or "50,000 images": a number with a noun, which takes an s in the plural."""
  return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
