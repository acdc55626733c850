"""Leaf-first least recently used.

A use of a prefix is a use of its deepest block: only that one gets a new stamp, which makes a match of any
length O(1) here. An ancestor inherits the stamp of a child that leaves, so it is never older than the latest use
of anything below it. The order is a heap of leaves with lazy entries, at most one a block:

- an entry older than its block's stamp is pushed back with the new stamp when it comes up;
- a block that is no leaf, is not allowed to leave, or has left is dropped when it comes up, and offered again by
  whatever ends that state;
- a chain is stored from its root on, so the entry of a parent is mostly the last of the heap when its child comes: it
  goes at once. An entry and its number take 100 bytes, and only one block of a few hundred is a leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from typing import TypeAlias

from kvstore.core.block import Block, Namespace

Entry: TypeAlias = tuple[int, int, Block]  # stamp, number of the entry, block

SLACK_ENTRIES = 256


class LeafLru:
    """Leaf-first LRU over blocks that have a copy in `tier` (HOT, WARM or COLD)."""

    def __init__(self, tier: int, mark: int, is_free: Callable[[Block, int], bool] | None = None) -> None:
        """`mark`: the order's own bit in `Block.queued`. `is_free`: whose turn it can be; None: leaves."""
        self._tier = tier
        self._is_free = is_free or Block.is_leaf
        self._mark = mark
        self._entry = count()
        self._heap: list[Entry] = []
        self._live = 0  # blocks that stand here
        self._stale = 0  # entries of parents that did not go at once, at most

    def insert(self, block: Block) -> None:
        """Add a block with the stamp it has: moving a copy is no use of it."""
        self._live += 1
        mark, parent = self._mark, block.parent
        if parent is not None and parent.queued & mark and not self._is_free(parent, self._tier):
            self._stale += not drop_last(self._heap, parent, mark)
        self.offer(block)

    def touch(self, block: Block) -> None:
        """Note the block's new stamp: its entry moves when it comes up."""
        self.offer(block)

    def offer(self, block: Block) -> None:
        """Give `block` an entry again, if it may be its turn."""
        mark = self._mark
        if not block.queued & mark and self._is_free(block, self._tier):
            block.queued |= mark
            heappush(self._heap, (block.touched, next(self._entry), block))
            self._compact()

    def victim(self, allowed: Callable[[Block], bool]) -> Block | None:
        """The least recently used leaf that may leave."""
        heap, tier, mark = self._heap, self._tier, self._mark
        while heap:
            stamp, _, block = heap[0]
            stands = block.stands(tier, mark)
            if stands and block.touched > stamp:
                heapreplace(heap, (block.touched, next(self._entry), block))
            elif stands and self._is_free(block, tier) and allowed(block):
                return block
            else:
                heappop(heap)
                block.queued &= ~mark
        return None

    def remove(self, block: Block) -> None:
        """Pass the block's stamp on to its parent, which may be a leaf now."""
        self._live -= 1
        parent = block.parent
        if parent is not None:
            if block.touched > parent.touched:
                parent.touched = block.touched
            if parent.stands(self._tier, self._mark):
                self.offer(parent)
        self._compact()

    def refer(self, namespace: Namespace, keys: bytes) -> None:
        """Blocks that are not here tell this order nothing."""

    def admits(self, namespace: Namespace, key: bytes, victim: Block) -> bool:
        """A new block is the youngest of all."""
        return True

    def refuse(self, namespace: Namespace, keys: Sequence[bytes]) -> None:
        """Nothing is remembered of them."""

    def _compact(self) -> None:
        """Without pressure, entries that say nothing would pile up."""
        entries = len(self._heap)
        if entries > SLACK_ENTRIES and worth_compacting(entries, self._live, self._stale):
            self._stale = 0
            self._heap = compacted(self._heap, self._mark, self._stands)

    def _stands(self, block: Block) -> bool:
        return block.stands(self._tier, self._mark) and self._is_free(block, self._tier)


def drop_last(heap: list[Entry], block: Block, mark: int) -> bool:
    """Take the block's entry off a heap if it is the last one there."""
    if not heap or heap[-1][2] is not block:
        return False
    heap.pop()
    block.queued &= ~mark
    return True


def worth_compacting(entries: int, live: int, stale: int) -> bool:
    """Whether half of the entries may go: so it costs a few steps for each block that came or went."""
    return entries > 2 * live + SLACK_ENTRIES or 2 * stale > entries + SLACK_ENTRIES


def compacted(heap: list[Entry], mark: int, stands: Callable[[Block], bool]) -> list[Entry]:
    """A heap of those whose turn it can be: others are offered again once it can, or have gone for good."""
    kept: list[Entry] = []
    for entry in heap:
        block = entry[2]
        if stands(block):
            kept.append(entry)
        else:
            block.queued &= ~mark
    heapify(kept)
    return kept
