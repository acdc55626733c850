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
        self._alone = False

    @contextmanager
    def inside(self) -> Iterator[bool]:
        """For the time of a `with` block: whether one is inside (False: the gate is closed)."""
        with self._changed:
            while self._alone:  # bounded: by who is alone, for as long as renaming and opening files takes
                self._changed.wait()
            entered = not self._closed
            self._inside += entered
        try:
            yield entered
        finally:
            if entered:
                with self._changed:
                    self._inside -= 1
                    self._changed.notify_all()

    @contextmanager
    def alone(self, timeout_s: float) -> Iterator[bool]:
        """For the time of a `with` block: whether nobody is inside (False: they did not leave in time).

        Who comes meanwhile waits at the gate. Not for somebody who is inside.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._alone = True
            while self._inside and (left_s := deadline_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
            empty = not self._inside
            if not empty:
                self._open()
        try:
            yield empty
        finally:
            with self._changed:
                self._open()

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

    def _open(self) -> None:
        self._alone = False
        self._changed.notify_all()
