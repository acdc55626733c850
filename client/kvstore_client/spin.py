"""How long a caller looks at its socket before it sleeps.

On a virtual machine with idle cores a sleep costs the interrupt that ends it: 45 of the 67 us of a round trip, and
more when the other core has gone idle meanwhile. Where both sides share a core, looking only keeps the daemon from
answering; so after looks in vain they are left out, for longer and longer.
"""

from __future__ import annotations

import time

SPIN_S = 100e-6
_MIN_PAUSE_CALLS = 8
_MAX_PAUSE_CALLS = 1024


class Spin:
    """Decides for one reader at a time."""

    __slots__ = ("_pause", "_skip")

    def __init__(self) -> None:
        self._skip = 0
        self._pause = _MIN_PAUSE_CALLS

    def begin(self) -> float:
        """Until when to look, on time.monotonic(); 0: not at all."""
        if self._skip:
            self._skip -= 1
            return 0.0
        return time.monotonic() + SPIN_S

    def end(self, *, was_answered: bool) -> None:
        """Whether the answer came while looking."""
        if was_answered:
            self._pause = _MIN_PAUSE_CALLS
        else:
            self._skip = self._pause
            self._pause = min(2 * self._pause, _MAX_PAUSE_CALLS)
