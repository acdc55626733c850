"""Who waits for which slot to be filled."""

from __future__ import annotations

import threading

from kvstore.core.slots import Slot


class InFlight:
    """Waiters of slots that are FILLING. Used under the engine's lock, except for the waiting itself."""

    def __init__(self) -> None:
        self._waiters: dict[Slot, list[threading.Event]] = {}

    def join(self, slot: Slot) -> threading.Event:
        """An event that is set once the slot's filler has answered."""
        event = threading.Event()
        self._waiters.setdefault(slot, []).append(event)
        return event

    def leave(self, slot: Slot, event: threading.Event) -> None:
        """Stop waiting (time-out)."""
        waiters = self._waiters.get(slot)
        if waiters is not None and event in waiters:
            waiters.remove(event)
            if not waiters:
                del self._waiters[slot]

    def settle(self, slot: Slot) -> None:
        """The filler has answered, well or ill."""
        for event in self._waiters.pop(slot, ()):
            event.set()
