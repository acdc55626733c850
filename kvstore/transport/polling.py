"""When a reader polls its socket for a moment before it sleeps.

A sleeping thread on another core costs 30 us and more to wake where idle cores halt, which is most of a one-key
call. Polling saves that if the next frame comes soon, and costs what it takes if not; where both peers share a
core it even keeps the other from running (two that polled 50 us each: 106 us a round trip instead of 5). So a
reader polls only while that pays.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field

from kvstore.transport.framing import FrameReader

_PAUSE_MIN_CALLS = 16
_PAUSE_MAX_CALLS = 1024


@dataclass(frozen=True, slots=True)
class Activity:
    """What all readers know of each other.

    Attributes:
        spinner: held by the one reader that polls: two would only take the interpreter from each other.
        putting: whose puts are running; they need the interpreter more.
    """

    spinner: threading.Lock = field(default_factory=threading.Lock)
    putting: set[Hashable] = field(default_factory=set)


class Poller:
    """Polls for one reader, and pauses for longer and longer while nothing comes of it."""

    def __init__(self, reader: FrameReader, activity: Activity) -> None:
        self._reader = reader
        self._activity = activity
        self._skip_calls = 0
        self._pause_calls = _PAUSE_MIN_CALLS

    def poll(self) -> None:
        """Poll, or leave it. Raises Unavailable when the peer is gone."""
        if self._skip_calls:
            self._skip_calls -= 1
            return
        activity = self._activity
        if activity.putting or not activity.spinner.acquire(blocking=False):
            return
        try:
            found = self._reader.poll()
        finally:
            activity.spinner.release()
        if found:
            self._pause_calls = _PAUSE_MIN_CALLS
        else:
            self._skip_calls = self._pause_calls
            self._pause_calls = min(2 * self._pause_calls, _PAUSE_MAX_CALLS)
