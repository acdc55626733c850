"""Reads first: what encodes blocks for the medium waits while blocks are wanted from it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.tiers.base import TierItem

if TYPE_CHECKING:  # a hot agent has no use for codecs
    from kvstore.codec.frame import Encoded

# What saving may count on beside loads without end: 2 MiB every 20 ms. It bounds a pause, so that nothing starves.
_FLOOR_BYTES_S = 100 << 20
# Small blocks are paused for together: a wake-up costs as much as encoding 16 KiB.
_STEP_BYTES = 1 << 20


class Loads:
    """Counts loads that are queued or under way. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0

    def begin(self, count: int) -> None:
        """So many more are queued."""
        with self._changed:
            self._count += count

    def end(self) -> None:
        """One has been answered."""
        with self._changed:
            self._count -= 1
            if not self._count:
                self._changed.notify_all()

    def await_none(self, timeout_s: float) -> bool:
        """Wait until there are none, at most `timeout_s`; whether it had to wait."""
        if not self._count:
            return False
        with self._changed:
            self._changed.wait_for(lambda: not self._count, timeout_s)
        return True


class Format(Protocol):
    """The part of a tier's BlockFormat that is called here."""

    def encode(self, item: TierItem, raw: NDArray[np.uint8]) -> Encoded:
        """The block as it is to be stored."""

    def decode(self, frame: memoryview, item: TierItem, out: NDArray[np.uint8]) -> None:
        """The block as it was."""


class PausingFormat:
    """A BlockFormat whose encode() lets loads go first, within bounds; otherwise the one that it wraps."""

    def __init__(self, inner: Format, loads: Loads) -> None:
        """Wrap `inner`; `loads` says when to pause."""
        self._inner = inner
        self._loads = loads
        self._lock = threading.Lock()
        self._owed_bytes = 0
        self._pauses = 0
        self._paused_s = 0.0

    def encode(self, item: TierItem, raw: NDArray[np.uint8]) -> Encoded:
        """As the wrapped one, after a pause while loads are queued."""
        self._give_way(raw.nbytes)
        return self._inner.encode(item, raw)

    def decode(self, frame: memoryview, item: TierItem, out: NDArray[np.uint8]) -> None:
        """As the wrapped one."""
        self._inner.decode(frame, item, out)

    def stats(self) -> Mapping[str, int]:
        """How often encoding gave way to loads, and for how long."""
        return {"encode_pauses": self._pauses, "encode_pause_us": int(1e6 * self._paused_s)}

    def _give_way(self, nbytes: int) -> None:
        with self._lock:
            self._owed_bytes += nbytes
            owed_bytes = self._owed_bytes
            if owed_bytes < _STEP_BYTES:
                return
            self._owed_bytes = 0
        began_s = time.monotonic()
        if self._loads.await_none(owed_bytes / _FLOOR_BYTES_S):
            with self._lock:
                self._pauses += 1
                self._paused_s += time.monotonic() - began_s
