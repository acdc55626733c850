"""One READ on its way: its blocks are read in order by whoever is free, and answered part by part."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from kvstore.agents import messages
from kvstore.tiers.base import Outcome, TierItem

# One part is one job and one answer. Large blocks go one by one, so that the first of a prefix is told as soon as it
# is there; of small ones it takes half a MiB to make the 60 us that a frame costs both sides not count.
_PART_BYTES = 512 << 10
_PART_ITEMS = 64


class Reading:
    """The items of a READ, cut into parts. Any thread may read any part; the last answer says that it is the last."""

    def __init__(
        self,
        items: Sequence[TierItem],
        read: Callable[[Sequence[TierItem]], list[Outcome]],
        reply: Callable[[bytes], None],
    ) -> None:
        """`read` fills the slots of some items; `reply` sends an answer."""
        self._items = items
        self._read = read
        self._reply = reply
        self._lock = threading.Lock()  # answers must leave in the order in which they are counted
        self._left = len(items)

    def parts(self) -> Iterator[tuple[int, int]]:
        """Positions [start, stop) of each part, in prefix order."""
        start = nbytes = 0
        for position, item in enumerate(self._items):
            nbytes += item.range.nbytes
            if nbytes >= _PART_BYTES or position + 1 - start == _PART_ITEMS:
                yield start, position + 1
                start, nbytes = position + 1, 0
        if start < len(self._items):
            yield start, len(self._items)

    def read_part(self, start: int, stop: int) -> bool:
        """Read and answer a part; whether it was the last one."""
        outcomes = self._read(self._items[start:stop])
        with self._lock:
            self._left -= stop - start
            self._reply(messages.encode_outcomes(outcomes, start, more=bool(self._left)))
            return not self._left
