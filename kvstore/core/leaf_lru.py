"""Leaf-first least recently used.

A use of a prefix is a use of its deepest block: only that one gets a new stamp, which makes a match of any
length O(1) here. An ancestor inherits the stamp of a child that leaves, so it is never older than the latest use
of anything below it. The order is a heap of leaves with lazy entries, at most one a block:

- an entry older than its block's stamp is pushed back with the new stamp when it comes up;
- a block that is no leaf, is not allowed to leave, or has left is dropped when it comes up, and offered again by
  whatever ends that state.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import count

from kvstore.core.block import Block, Namespace

_SLACK_ENTRIES = 256


class LeafLru:
    """Leaf-first LRU over blocks that have a copy in `tier` (HOT, WARM or COLD)."""

    def __init__(self, tier: int, mark: int, is_free: Callable[[Block, int], bool] | None = None) -> None:
        """`mark`: the order's own bit in `Block.queued`. `is_free`: whose turn it can be; None: leaves."""
        self._tier = tier
        self._is_free = is_free or is_leaf
        self._mark = mark
        self._entry = count()
        self._heap: list[tuple[int, int, Block]] = []
        self._live = 0  # blocks that stand here

    def insert(self, block: Block) -> None:
        """Add a block with the stamp it has: moving a copy is no use of it."""
        self._live += 1
        self.offer(block)

    def touch(self, block: Block) -> None:
        """Note the block's new stamp: its entry moves when it comes up."""
        self.offer(block)

    def offer(self, block: Block) -> None:
        """Give `block` an entry again."""
        if not block.queued & self._mark and block.stands(self._tier, self._mark):
            block.queued |= self._mark
            heapq.heappush(self._heap, (block.touched, next(self._entry), block))
            self._compact()

    def victim(self, allowed: Callable[[Block], bool]) -> Block | None:
        """The least recently used leaf that may leave."""
        heap, tier, mark = self._heap, self._tier, self._mark
        while heap:
            stamp, _, block = heap[0]
            stands = block.stands(tier, mark)
            if stands and block.touched > stamp:
                heapq.heapreplace(heap, (block.touched, next(self._entry), block))
            elif stands and self._is_free(block, tier) and allowed(block):
                return block
            else:
                heapq.heappop(heap)
                block.queued &= ~mark
        return None

    def remove(self, block: Block) -> None:
        """Pass the block's stamp on to its parent, which may be a leaf now."""
        self._live -= 1
        parent = block.parent
        if parent is not None:
            parent.touched = max(parent.touched, block.touched)
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
        """Drop entries of blocks that were deleted or cleared: without pressure they would pile up."""
        if len(self._heap) <= 2 * self._live + _SLACK_ENTRIES:
            return
        kept = {
            id(block): (block.touched, next(self._entry), block)
            for _, _, block in self._heap
            if block.stands(self._tier, self._mark)
        }
        for _, _, block in self._heap:
            if id(block) not in kept:
                block.queued &= ~self._mark
        self._heap = list(kept.values())
        heapq.heapify(self._heap)


def is_leaf(block: Block, tier: int) -> bool:
    """Whether no child of the block has a copy in `tier` that stays there (one that is not spare)."""
    child = block.first_child
    while child is not None:
        if child.copies & ~child.spare & tier:
            return False
        child = child.next_sibling
    return True


def is_bare(block: Block, tier: int) -> bool:
    """Whether no child of the block has a copy in `tier`."""
    return not any(child.copies & tier for child in block.children())
