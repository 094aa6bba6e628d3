"""What Windows and macOS lack is not needed there."""

import pytest
import tiny

from maskgen.config import loading

# Everything of POSIX that Windows lacks and that maskgen or its tests use.
WITHOUT_POSIX = """
import os, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
  sys.modules[name] = None  # importing it fails
for name in ("sched_getaffinity", "pread", "fork", "getuid", "mkfifo"):
  if hasattr(os, name):
    delattr(os, name)
import numpy as np
import maskgen
model = maskgen.load("digits")
assert model.encode(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 16)
loaded = {name.split(".")[1] for name in sys.modules if name.startswith("maskgen.")}
assert not loaded & {"training", "data", "evaluators", "benchmarks", "tools"}, loaded
import maskgen.tools.edit, maskgen.tools.export, maskgen.tools.generate
import maskgen.benchmarks.devices, maskgen.training.train
assert maskgen.benchmarks.devices.peak_memory() == {}
"""


def test_models_load_without_posix(tmp_path):
  process = tiny.python("-c", WITHOUT_POSIX)
  out, errors = process.communicate(timeout=300)
  assert process.returncode == 0, out + errors


@pytest.mark.parametrize(
  ("given", "path", "arg"),
  [
    (r"C:\x\quickstart.py", r"C:\x\quickstart.py", ""),
    (r"C:\x\quickstart.py:tiny,seed=1", r"C:\x\quickstart.py", "tiny,seed=1"),
    (r"c:/x/folder_256.py:path=D:\my pictures", "c:/x/folder_256.py", r"path=D:\my pictures"),
    (r"\\host\x.py:tiny", r"\\host\x.py", "tiny"),
    ("configs/quickstart.py:debug", "configs/quickstart.py", "debug"),
    ("folder_256.py:path=gs://bucket/x", "folder_256.py", "path=gs://bucket/x"),
    ("c:tiny", "c", "tiny"),
    ("", "", ""),
  ],
)
def test_a_drive_is_part_of_a_configs_path(given, path, arg):
  assert loading.split_path(given) == (path, arg)
