"""A gate in front of something that must not be closed while it is in use."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Counts who is inside; once closed, lets nobody in and says when the last one has left."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False

    @contextmanager
    def inside(self) -> Iterator[bool]:
        """For the time of a `with` block: whether one is inside (False: the gate is closed)."""
        with self._changed:
            entered = not self._closed
            self._inside += entered
        try:
            yield entered
        finally:
            if entered:
                with self._changed:
                    self._inside -= 1
                    self._changed.notify_all()

    def close(self, timeout_s: float) -> bool:
        """Let nobody in any more and wait for those inside; whether all have left in time. Idempotent."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._closed = True
            while self._inside:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    return False
                self._changed.wait(left_s)
        return True
