"""Errors that a user can act on."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """Something from outside (a config, flag, path, image or checkpoint) is wrong.

  The message is one sentence that names the thing and the remedy. Entry points print it without a
  traceback and exit with `status`, which tells launchers whether to start again.
  """

  status = 2


class TransientError(UserError):
  """Something from outside that time may mend, such as a store that cannot be reached."""

  status = 75  # EX_TEMPFAIL


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
