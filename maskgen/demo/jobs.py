"""A queue of computations: one at a time, each of which reports how it is getting on."""

import concurrent.futures
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from maskgen.errors import TransientError

Work = Callable[[], dict[str, Any]]


class Queue:
  """Computes in the order of requests, in one thread, as one computation already uses all cores.

  Attributes:
    most: the largest number of requests that wait or run.
  """

  def __init__(self, most: int = 16):
    self.most = most
    self._worker = concurrent.futures.ThreadPoolExecutor(1, "model")
    self._lock = threading.RLock()  # callbacks of jobs take it again
    self._jobs: list[concurrent.futures.Future[dict[str, Any]]] = []

  def submit(self, work: Work) -> concurrent.futures.Future[dict[str, Any]]:
    """Queues a computation.

    Raises:
      TransientError: if the queue is full.
    """
    with self._lock:
      if len(self._jobs) >= self.most:
        raise TransientError(f"{self.most} requests are waiting already: try again later")
      job = self._worker.submit(work)
      self._jobs.append(job)
      job.add_done_callback(self._forget)
    return job

  def close(self) -> None:
    """Cancels what waits; what runs already is not waited for."""
    with self._lock:
      self._worker.shutdown(wait=False, cancel_futures=True)

  def follow(
    self, job: concurrent.futures.Future[dict[str, Any]], seconds: float = 0.5
  ) -> Iterator[dict[str, Any]]:
    """Yields the state of a computation every `seconds`, and last `{"result": ...}`.

    A state is `{"ahead": n}`, the number of requests before it, or `{"seconds": s}` since it was first seen
    to run. A computation whose caller stops listening before it runs is cancelled.

    Raises:
      Exception: what the computation raises.
    """
    started: float | None = None
    try:
      while not job.done():
        if job.running():
          started = started or time.monotonic()
          yield {"seconds": round(time.monotonic() - started, 1)}
        else:
          yield {"ahead": self._ahead(job)}
        concurrent.futures.wait([job], seconds)
      yield {"result": job.result()}
    finally:
      job.cancel()

  def _forget(self, job: concurrent.futures.Future[dict[str, Any]]) -> None:
    with self._lock:
      self._jobs.remove(job)

  def _ahead(self, job: concurrent.futures.Future[dict[str, Any]]) -> int:
    with self._lock:
      before = itertools.takewhile(lambda other: other is not job, self._jobs)
      return sum(not other.done() for other in before)
