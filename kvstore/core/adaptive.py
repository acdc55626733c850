"""The order that chooses its order: leaf-first LRU, with blocks that were used again counted as younger.

Blocks used once and blocks used again stand in two lists, each by last use. The victim is the older of the two
oldest leaves, where one that was used again counts as B references younger:

    B = 0           leaf-first LRU
    B = 2 x capacity
    B = infinite    what was used again leaves only where nothing else may

Three small shadow caches (core.shadows) tell which B would have hit most of late. To switch changes one number:
nothing moves. A block that comes back soon after it left (core.ghosts) counts as used again. A new block that would
be the next to leave is refused: it only becomes a ghost. No fixed B is right: docs/adr/0011 has the figures.

The lists are heaps of leaves with lazy entries, as in core.leaf_lru, and for the same reason: a use of a prefix is a
use of its last block, whatever its length. Capacity is not told but seen: the most blocks that were held of late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush, heapreplace
from itertools import count

from kvstore.core.block import COLD, REUSED, Block, Namespace
from kvstore.core.ghosts import Ghosts
from kvstore.core.leaf_lru import SLACK_ENTRIES, Entry, compacted, drop_last, worth_compacting
from kvstore.core.shadows import FOREVER, GHOSTS, Candidate, Shadows, name_of

CANDIDATES = (Candidate(0), Candidate(2), Candidate(FOREVER), Candidate(FOREVER, closed=True))


class Adaptive:
    """Adaptive order over blocks that have a copy in `tier` (HOT, WARM or COLD)."""

    def __init__(self, tier: int, mark: int, candidates: Sequence[Candidate] = CANDIDATES) -> None:
        """`mark`: the order's own bit in `Block.queued`."""
        self._tier = tier
        self._mark = mark
        self._candidates = candidates
        self._entry = count()
        self._once: list[Entry] = []
        self._again: list[Entry] = []
        self._ghosts = Ghosts()
        # What a closed order does not let into cold need not be written: half of the writes for 0.2 points of hits.
        closed = next((i for i, one in enumerate(candidates) if one.closed), None)
        self._shadows = Shadows(candidates, closed if tier == COLD else None)
        self._live = 0
        self._stale = 0  # entries of parents that did not go at once, at most
        self._full = False  # whether room was ever asked for
        self._capacity = 0
        self._peak = 0  # most blocks held since the window began
        self._window = 0  # inserts that are left of it
        self._now = 0
        self._last: Block | None = None  # the last victim: what leaves otherwise was deleted and is no ghost

    @property
    def candidate(self) -> Candidate:
        """The order that is followed now."""
        return self._candidates[self._shadows.best]

    # -- what happens to blocks -------------------------------------------------------------------------------

    def insert(self, block: Block) -> None:
        """Add a block with the stamp it has; one that is back soon after it left counts as used again."""
        self._live = live = self._live + 1
        if live > self._peak:
            self._peak = live
        if block.touched > self._now:
            self._now = block.touched
        if self._full and self._ghosts.take(int.from_bytes(block.key[:8], "little") ^ block.namespace.salt):  # name_of
            block.marks |= REUSED
        self._window -= 1
        if self._window < 0 or (self._full and self._peak > self._capacity):
            self._measure()
        mark, parent = self._mark, block.parent
        if parent is not None and parent.queued & mark:
            heap = self._again if parent.marks & REUSED and parent.touched else self._once
            self._stale += not drop_last(heap, parent, mark)
        self.offer(block)

    def touch(self, block: Block) -> None:
        """Note the block's new stamp: its entry moves when it comes up."""
        if block.touched > self._now:
            self._now = block.touched
        self.offer(block)

    def offer(self, block: Block) -> None:
        """Give `block` an entry again, if it is a leaf."""
        mark = self._mark
        if not block.queued & mark and (block.below is None or block.is_leaf(self._tier)):
            block.queued |= mark
            self._push(block)
            self._compact()

    def remove(self, block: Block) -> None:
        """Pass on to the parent, which may be a leaf now, what the block's uses have told."""
        self._live -= 1
        if block is self._last:
            self._last = None
            self._fill()
            self._ghosts.add(name_of(block.key, block.namespace.salt))
        parent = block.parent
        if parent is not None:
            if block.touched > parent.touched:
                parent.touched = block.touched
            parent.marks |= block.marks & REUSED
            if parent.stands(self._tier, self._mark):
                self.offer(parent)
        self._compact()

    # -- who leaves, and who may come -------------------------------------------------------------------------

    def victim(self, allowed: Callable[[Block], bool]) -> Block | None:
        """The older of the two oldest leaves that may leave."""
        bias = self._bias()
        once = self._oldest(self._once, allowed)
        again = self._oldest(self._again, allowed) if once is None or bias < FOREVER else None
        if once is None or (again is not None and again.touched + bias < once.touched):
            once = again
        self._last = once
        return once

    def refer(self, namespace: Namespace, keys: bytes) -> None:
        """Packed keys were asked for or are about to be stored: the shadows see them."""
        self._shadows.refer(namespace.salt, keys)

    def admits(self, namespace: Namespace, key: bytes, victim: Block) -> bool:
        """Whether a new block would leave after `victim`."""
        self._fill()
        if not victim.touched:
            return True
        if not self.candidate.closed and (not victim.marks & REUSED or victim.touched + self._bias() <= self._now):
            return True
        return name_of(key, namespace.salt) in self._ghosts

    def refuse(self, namespace: Namespace, keys: Sequence[bytes]) -> None:
        """They are ghosts now; from the last to the first, so that a child is forgotten before its parent."""
        self._fill()
        salt = namespace.salt
        for key in reversed(keys):
            self._ghosts.add(name_of(key, salt))

    # -- internals --------------------------------------------------------------------------------------------

    def _bias(self) -> int:
        bias = self._candidates[self._shadows.best].factor * self._capacity
        return bias if bias < FOREVER else FOREVER

    def _push(self, block: Block) -> None:
        # An orphan (stamp 0) leaves first, whatever its past.
        heap = self._again if block.marks & REUSED and block.touched else self._once
        heappush(heap, (block.touched, next(self._entry), block))

    def _oldest(self, heap: list[Entry], allowed: Callable[[Block], bool]) -> Block | None:
        """The first leaf of a heap that may leave; entries that are out of date are put right on the way."""
        tier, mark, again = self._tier, self._mark, heap is self._again
        while heap:
            stamp, _, block = heap[0]
            touched = block.touched
            if not block.stands(tier, mark):
                heappop(heap)
                block.queued &= ~mark
            elif again is not (block.marks & REUSED != 0 and touched != 0):
                heappop(heap)
                self._push(block)
            elif touched > stamp:
                heapreplace(heap, (touched, next(self._entry), block))
            elif (block.below is None or block.is_leaf(tier)) and allowed(block):
                return block
            else:
                heappop(heap)
                block.queued &= ~mark
        return None

    def _fill(self) -> None:
        """Room is wanted, and there is none: from now on the most blocks held are the capacity."""
        if not self._full:
            self._full = True
            self._resize(self._peak)

    def _measure(self) -> None:
        """Follow the capacity: the most blocks held in the last so many inserts."""
        if self._full:
            self._resize(self._peak)
        else:
            self._window = self._live
            self._shadows.growing(self._live)

    def _resize(self, blocks: int) -> None:
        self._capacity = max(1, blocks)
        self._window = self._capacity
        self._peak = self._live
        self._ghosts.resize(GHOSTS * self._capacity)
        self._shadows.resize(self._capacity)

    def _compact(self) -> None:
        """Without pressure, entries that say nothing would pile up."""
        entries = len(self._once) + len(self._again)
        if entries > SLACK_ENTRIES and worth_compacting(entries, self._live, self._stale):
            self._stale = 0
            self._once = compacted(self._once, self._mark, self._stands)
            self._again = compacted(self._again, self._mark, self._stands)

    def _stands(self, block: Block) -> bool:
        return block.stands(self._tier, self._mark) and block.is_leaf(self._tier)
