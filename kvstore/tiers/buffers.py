"""Buffers that are used again: what is encoded for a medium takes no fresh memory block by block."""

from __future__ import annotations

import threading
import time

import numpy as np
from numpy.typing import NDArray

_GRAIN_BYTES = 64 << 10  # frames of blocks of one size differ by some per cent: all of them shall fit one buffer


class BufferRing:
    """Hands out buffers of at most so many bytes together. Any thread.

    One that is larger than all of that is handed out alone, or nobody could ever have it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._changed = threading.Condition()
        self._out_bytes = 0
        self._free: list[NDArray[np.uint8]] = []  # the one used last is the last, and warm

    def take(self, nbytes: int, timeout_s: float) -> NDArray[np.uint8] | None:
        """A buffer of at least `nbytes`, or None if none came back in time. Give it back once."""
        size = -(-nbytes // _GRAIN_BYTES) * _GRAIN_BYTES
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while self._out_bytes and self._out_bytes + size > self._limit_bytes:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    return None
                self._changed.wait(left_s)
            buffer = self._pick(size)
            self._out_bytes += buffer.nbytes
        return buffer

    def give_back(self, buffer: NDArray[np.uint8]) -> None:
        """Let somebody else have it."""
        with self._changed:
            self._out_bytes -= buffer.nbytes
            self._free.append(buffer)
            kept_bytes = sum(free.nbytes for free in self._free)
            while kept_bytes + self._out_bytes > self._limit_bytes and len(self._free) > 1:
                kept_bytes -= self._free.pop(0).nbytes
            self._changed.notify_all()

    def _pick(self, size: int) -> NDArray[np.uint8]:
        """The one of this very size that was used last, or a fresh one."""
        for position in range(len(self._free) - 1, -1, -1):
            if self._free[position].nbytes == size:
                return self._free.pop(position)
        kept_bytes = sum(free.nbytes for free in self._free)
        while self._free and kept_bytes + self._out_bytes + size > self._limit_bytes:
            kept_bytes -= self._free.pop(0).nbytes
        return np.empty(size, dtype=np.uint8)
