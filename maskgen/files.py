"""Files that are complete or absent, whenever a process is killed."""

import uuid

from etils import epath


def replace(path: epath.Path, content: str | bytes) -> None:
  """Writes a file under another name and then gives it its own, over an older one if there is one."""
  temporary = path.parent / f"{path.name}.{uuid.uuid4().hex}.tmp"
  if isinstance(content, str):
    temporary.write_text(content)
  else:
    temporary.write_bytes(content)
  temporary.replace(path)
