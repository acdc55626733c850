"""Memory for payloads that a thread uses again: fresh pages cost a fifth of the time of encoding into them."""

from __future__ import annotations

import numpy as np

from kvstore.codec.loops import U8


class Arena:
    """Hands out pieces of one buffer; what has no room there comes from the heap. Belongs to one thread."""

    def __init__(self) -> None:
        self._buffer: U8 = np.empty(0, dtype=np.uint8)
        self._used = 0

    def begin(self, nbytes: int) -> None:
        """Take back all pieces, and have room for `nbytes`; a buffer much larger than that is given up."""
        self._used = 0
        if not nbytes <= self._buffer.nbytes <= 4 * nbytes:
            self._buffer = np.empty(nbytes, dtype=np.uint8)

    def take(self, nbytes: int) -> U8:
        """A piece, valid until begin()."""
        end = self._used + nbytes
        if end > self._buffer.nbytes:
            return np.empty(nbytes, dtype=np.uint8)
        piece = self._buffer[self._used : end]
        self._used = end
        return piece
