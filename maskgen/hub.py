"""Models on the Hugging Face Hub: `hf://owner/name@revision`; needs the extra `hub`.

huggingface_hub keeps what it downloads in its cache, and reads its usual environment variables, such as
`HF_TOKEN`, `HF_HUB_OFFLINE`, `HF_HUB_CACHE` and `HF_ENDPOINT`.
"""

import contextlib
import logging
import os
import re
from collections.abc import Generator
from typing import Any

from etils import epath

from maskgen import files
from maskgen.errors import TransientError, UserError, is_permanent

PREFIX = "hf://"
# What a model consists of.
PARTS = ["config.json", "weights.safetensors", files.MANIFEST, "results.json", "assets/**", "code/**"]
_PART = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TEMPORARY = (408, 429)  # of the statuses below 500: a time-out, and too many requests

log = logging.getLogger("maskgen")


def is_address(model: epath.PathLike) -> bool:
  """Whether a model is given by its address on the Hub."""
  return os.fspath(model).startswith(PREFIX)


def local(model: epath.PathLike) -> epath.PathLike:
  """The folder of a model that is given by its address, see `fetch`; any other as it is given."""
  return fetch(model) if is_address(model) else model


def check_name(name: str, where: str) -> None:
  """Checks the name of a repository, `owner/name`.

  Raises:
    UserError: if it is not one.
  """
  if not _PART.fullmatch(name):
    raise UserError(f"{where}: give owner/name, as in the address of the model's page")


def fetch(address: epath.PathLike) -> epath.Path:
  """Downloads a model that is not in the cache, and returns its folder.

  Args:
    address: `hf://owner/name@revision`, a commit, tag or branch; without one the newest, which the log names.

  Raises:
    UserError: if there is no such model or revision, it is private, the Hub cannot be reached, a file of its
      manifest is missing or differs from its checksum, or huggingface_hub is not installed.
  """
  text = os.fspath(address)
  name, _, revision = text.removeprefix(PREFIX).partition("@")
  check_name(name, text)
  hub = module(text)
  with errors(text):
    found = hub.snapshot_download(
      name,
      revision=revision or None,
      allow_patterns=PARTS,
      cache_dir=os.environ.get("HF_HUB_CACHE"),
      endpoint=os.environ.get("HF_ENDPOINT"),
    )
  folder = epath.Path(found)
  if not _COMMIT.fullmatch(revision):
    log.info(
      "%s is %s%s@%s: give this revision to have the same model always", text, PREFIX, name, folder.name
    )
  _check(folder, text)
  return folder


def _check(folder: epath.Path, text: str) -> None:
  """Compares files with the manifest; the weights are compared when they are read."""
  remedy = f"remove {folder} from the cache and load it again"
  manifest = folder / files.MANIFEST
  if not manifest.exists():
    raise UserError(
      f"{text} has no {files.MANIFEST}, so is not an export of maskgen: publish it by maskgen publish"
    )
  for name in files.read_json(manifest, remedy):
    if not files.is_inside(name) or not (file := folder / name).is_file():
      raise files.damaged(manifest, f"'{name}' is not a file of its folder", remedy)
    if name != "weights.safetensors":
      files.check_manifest(manifest, name, file.read_bytes(), remedy)


def module(what: str) -> Any:
  """The module huggingface_hub.

  Raises:
    UserError: if it is not installed.
  """
  try:
    import huggingface_hub
  except ImportError as error:
    raise UserError(f"{what} needs huggingface_hub ({error}): pip install 'maskgen[hub]'") from None
  return huggingface_hub


@contextlib.contextmanager
def errors(text: str) -> Generator[None]:
  """Converts errors of the Hub about a model to those that a user can act on."""
  from huggingface_hub import errors as kinds

  try:
    yield
  except kinds.GatedRepoError:
    raise UserError(
      f"{text} is gated: accept its terms on its page, and log in with 'hf auth login'"
    ) from None
  except kinds.RepositoryNotFoundError:
    raise UserError(
      f"{text} does not exist, or is private: check the name, and log in with 'hf auth login' or set HF_TOKEN"
    ) from None
  except kinds.RevisionNotFoundError:
    raise UserError(f"{text} has no such revision: give a commit, tag or branch of its page") from None
  except kinds.LocalEntryNotFoundError:
    raise TransientError(
      f"{text} is not in the cache, and the Hub cannot be reached: connect once, or give a folder"
    ) from None
  except kinds.HfHubHTTPError as error:
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
      raise UserError(f"{text} is refused by the Hub: log in with 'hf auth login' or set HF_TOKEN") from None
    if status is not None and status < 500 and status not in _TEMPORARY:
      reason = " ".join(str(error.server_message or f"status {status}").split()).rstrip(".")
      raise UserError(f"the Hub refuses {text} ({reason}): change what it names") from None
    raise TransientError(f"the Hub fails for {text} (status {status}): start again later") from error
  except ValueError as error:  # names and model cards that it checks
    reason = " ".join(str(error).split()).rstrip(".")
    raise UserError(f"the Hub refuses {text} ({reason}): change what it names") from None
  except Exception as error:  # the errors of its HTTP client have no base in common with OSError
    if is_permanent(error):  # of a file in the cache
      raise
    reason = " ".join(str(error).split())
    raise TransientError(f"the Hub cannot be reached for {text} ({reason}): start again later") from error
