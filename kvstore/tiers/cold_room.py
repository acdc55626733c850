"""Whether the cold tier may take more: the space that must stay free on its file system, and disks that were full."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

_RESERVE_BYTES = 1 << 30
_RESERVE_SHARE = 20  # of the file system
_PROBE_S = 0.25  # between two attempts on a disk that was full
_FRAGMENTED_SHARE = 8  # of a file in use, free pages are in pieces too small for a block: 8 to 10 % after long churn


def reserve_bytes(path: Path, capacity_bytes: int, asked_bytes: int) -> int:
    """What must stay free on the file system of `path`.

    Without an order (0) it is the larger of 1 GiB and 5 %. A small file system leaves less: there it is half of what
    the capacity leaves, and no less than 5 %.
    """
    if asked_bytes:
        return asked_bytes
    system = os.statvfs(path)
    total_bytes = system.f_blocks * system.f_frsize
    share_bytes = total_bytes // _RESERVE_SHARE
    return min(max(_RESERVE_BYTES, share_bytes), max(share_bytes, (total_bytes - capacity_bytes) // 2))


class Room:
    """Answers before a block is written, and remembers for a moment that there was none."""

    def __init__(
        self,
        path: Path,
        reserve_bytes: int,
        file_free_bytes: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`file_free_bytes` says how much room the file has inside; `clock` is in seconds."""
        self.reserve_bytes = reserve_bytes
        self._path = path
        self._file_free_bytes = file_free_bytes
        self._clock = clock
        self._closed_until_s = 0.0

    def is_closed(self) -> bool:
        """Whether there was no room just now, so that it is not worth to try."""
        return self._clock() < self._closed_until_s

    def allows(self, nbytes: int) -> bool:
        """Whether so many bytes may be written: within the file's free pages, or without touching the reserve."""
        if self.is_closed():
            return False
        system = os.statvfs(self._path)
        if system.f_bavail * system.f_frsize - nbytes >= self.reserve_bytes:
            return True
        return self._file_free_bytes() >= nbytes

    def close(self) -> None:
        """There was no room; ask again a little later."""
        self._closed_until_s = max(self._closed_until_s, self._clock() + _PROBE_S)

    def disk_failed(self) -> None:
        """The disk did not take a block: it is full, or broken."""
        self._closed_until_s = self._clock() + _PROBE_S


def usable_bytes(used_bytes: int, stored_bytes: int) -> int:
    """Free pages inside of a file that are likely to hold whole blocks."""
    return used_bytes - stored_bytes - used_bytes // _FRAGMENTED_SHARE
