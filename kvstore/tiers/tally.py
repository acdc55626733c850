"""Counters that several threads may add to."""

from __future__ import annotations

import threading
from collections.abc import Iterable


class Tally:
    """A fixed set of named counters."""

    def __init__(self, names: Iterable[str]) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(names, 0)

    def add(self, name: str, count: int = 1) -> None:
        """Add to a counter that was named at the start (KeyError otherwise)."""
        with self._lock:
            self._counts[name] += count

    def high(self, name: str, value: int) -> None:
        """Raise a counter to `value` if it is lower."""
        with self._lock:
            self._counts[name] = max(self._counts[name], value)

    def snapshot(self) -> dict[str, int]:
        """All counters as of one moment."""
        with self._lock:
            return dict(self._counts)
