"""A run that is killed at random and continued by another number of processes resumes at the next record."""

import itertools
import random
import signal
import time

import numpy as np
import pytest
import tiny
from PIL import Image

from maskgen.data.pipeline import Data

BATCH = 8
CUT = "decode|random_resized_crop(8)|flip_lr"
PLAIN = "decode|resize(8)"


def read(folder, index, count, step, file):
  """Reads its rows of the batches from a step on, and notes the records of each, until it is killed."""
  data = Data(f"folder:{folder}", CUT, PLAIN, BATCH, seed=5, process_index=index, process_count=count)
  with open(file, "a") as out:
    for number, batch in enumerate(data.train_batches(step), step):
      print(number, *batch["record"], int(batch["image"].astype(int).sum()), file=out, flush=True)


@pytest.mark.slow
def test_the_sequence_of_records_is_the_uninterrupted_one(tmp_path):
  (tmp_path / "pictures").mkdir()
  rng = np.random.default_rng(0)
  for i in range(50):
    file = tmp_path / "pictures" / f"{i:02d}.png"
    Image.fromarray(rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)).save(file)
    if i % 10 == 3:
      file.write_bytes(file.read_bytes()[:60])  # what is damaged must not disturb the order
  chance = random.Random(0)
  step, seen = 0, []
  for kill in range(9):
    count = (1, 2, 4)[kill % 3]
    files = [tmp_path / f"{kill}_{index}" for index in range(count)]
    arguments = [(tmp_path / "pictures", index, count, step, file) for index, file in enumerate(files)]
    processes = [tiny.fork(read, *given) for given in arguments]
    while not all(file.exists() and file.read_text().count("\n") for file in files):
      assert all(process.is_alive() for process in processes), [process.exitcode for process in processes]
      time.sleep(0.02)
    time.sleep(chance.random())
    for process in processes:
      process.kill()
      process.join()
      assert process.exitcode == -signal.SIGKILL
    rows = [[line.split() for line in file.read_text().split("\n")[:-1]] for file in files]
    # As a run does, go on from any step that all processes have reached.
    done = chance.randint(1, min(map(len, rows)))
    for i in range(done):
      assert all(int(part[i][0]) == step + i for part in rows)
      records = [int(record) for part in rows for record in part[i][1:-1]]
      seen.append((records, sum(int(part[i][-1]) for part in rows)))
    step += done
  data = Data(f"folder:{tmp_path / 'pictures'}", CUT, PLAIN, BATCH, seed=5)
  for (records, pixels), batch in zip(seen, itertools.islice(data.train_batches(), len(seen)), strict=True):
    assert records == batch["record"].tolist() and pixels == batch["image"].astype(int).sum()
  assert len(seen) >= 9
