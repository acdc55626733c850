"""Lanes: a queue and the few threads that work it off, so that one kind of call never waits behind another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue


class Lane:
    """Runs jobs in the order in which they came, on `threads` threads that sleep while there is nothing to do.

    A job that raises ends its thread, which `threading.excepthook` hears of: jobs answer for their own errors.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._dropping = False
        self._threads = [
            threading.Thread(target=self._work, name=f"agent-{name}-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job; never blocks. The caller bounds how many there are."""
        self._jobs.put(job)

    def stop(self, *, finish: bool) -> None:
        """End once the running jobs have; do the queued ones first (`finish`) or drop them. Does not wait."""
        self._dropping = not finish
        for _ in self._threads:
            self._jobs.put(None)

    def join(self) -> None:
        """Wait for the end, after stop()."""
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not self._dropping:
                job()
