"""When the cold tier's commits reach the medium.

none      when the kernel likes; flush() and close() sync
interval  some time after each commit, from a thread of its own, so that no write waits for the disk
commit    before write() says OK. LMDB does it then, on the writer's thread: data pages first, and only once the medium
          has them the page that names them. A sync of our own behind the commit would leave the order to the
          kernel, and a power loss could then damage the tree and with it blocks that were acknowledged before.
"""

from __future__ import annotations

import ctypes
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Literal

from kvstore.tiers.cold_env import ColdStore
from kvstore.tiers.cold_records import PAGE_BYTES
from kvstore.tiers.gate import Gate
from kvstore.tiers.tally import Tally

_log = logging.getLogger(__name__)

_SYNC_FILE_RANGE_WRITE = 2
_LARGE_BYTES = 64 << 10
_FRESH_MAX = 1024

_sync_file_range = ctypes.CDLL(
    None, use_errno=True
).sync_file_range  # drops the GIL; a hint, so its errors are nobody's
_sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]

Durability = Literal["none", "interval", "commit"]
SYNC_COUNTERS = ("syncs", "sync_us_total", "sync_us_max", "sync_failures")


class Syncer:
    """Syncs a store as its durability says. Any thread."""

    def __init__(self, store: ColdStore, gate: Gate, durability: Durability, interval_s: float, tally: Tally) -> None:
        """`tally` has SYNC_COUNTERS."""
        self._store = store
        self._gate = gate
        self._durability = durability
        self._interval_s = interval_s
        self._tally = tally
        self._fresh: deque[tuple[int, int]] = deque(maxlen=_FRESH_MAX)
        self._wake, self._dirty, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="cold-syncer", daemon=True)

    def start(self) -> None:
        """Begin to sync at intervals, where that is what is asked for."""
        if self._durability == "interval":
            self._thread.start()

    def committed(self, seconds: float, payloads: Sequence[tuple[int, int]] = ()) -> None:
        """The writer has committed, which took so long: payloads at these pages of the file, with so many bytes."""
        if self._durability == "commit":
            self._count(seconds)
        elif self._durability == "interval":
            self._fresh.extend(place for place in payloads if place[0] and place[1] >= _LARGE_BYTES)
            self._dirty.set()
            self._wake.set()

    def flush(self) -> None:
        """Return once everything that was committed before is on the medium.

        Raises:
            OSError: the medium did not take it.
        """
        with self._gate.inside() as entered:
            if not entered:
                return
            self._dirty.clear()
            start_s = time.perf_counter()
            try:
                self._store.sync()
            except OSError:
                self._tally.add("sync_failures")
                self._store.history.doubt()
                raise
            self._count(time.perf_counter() - start_s)

    def close(self, timeout_s: float) -> bool:
        """End the thread; whether it ended in time."""
        self._ended.set()
        self._wake.set()
        if self._thread.ident is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        due_s = math.inf
        while not self._ended.is_set():
            self._wake.wait(None if due_s == math.inf else max(0.0, due_s - time.monotonic()))
            self._wake.clear()
            self._begin_to_write()
            if self._dirty.is_set():
                due_s = min(due_s, time.monotonic() + self._interval_s)
            if time.monotonic() >= due_s:
                due_s = math.inf
                self._flush_and_go_on()

    def _flush_and_go_on(self) -> None:
        try:
            self.flush()
        except OSError as error:
            _log.error("cold tier: %s", error)

    def _begin_to_write(self) -> None:
        """Have the kernel begin with payloads, so that the sync has less to wait for.

        Their pages are not written again before the block goes; pages of the trees change with every commit.
        """
        with self._gate.inside() as entered:
            while entered and self._fresh:
                page, nbytes = self._fresh.popleft()
                _sync_file_range(self._store.payload.fd, page * PAGE_BYTES, nbytes, _SYNC_FILE_RANGE_WRITE)

    def _count(self, seconds: float) -> None:
        micros = int(seconds * 1e6)
        self._tally.add("syncs")
        self._tally.add("sync_us_total", micros)
        self._tally.high("sync_us_max", micros)
