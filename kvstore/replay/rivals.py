"""Orders to compare with, inside replay only: LRU-2, S3-FIFO, ARC.

Each keeps to core.policy, so that the same core runs it: only leaves leave, and a use of a prefix is told of its last
block, from which these walk to the root. That walk, and the rotations below, are not O(1): nothing for a daemon.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import count

from kvstore.core.block import Block, Namespace

_GHOSTS = 4  # of LRU-2, in capacities
_NEVER = -1


def path(block: Block) -> Iterator[Block]:
    """A block and what it hangs on, up to the root."""
    above: Block | None = block
    while above is not None:
        yield above
        above = above.parent


class Rival:
    """What the three share: they refuse nothing, and learn of uses from touches alone."""

    def __init__(self, tier: int, mark: int) -> None:
        self._tier = tier
        self._mark = mark
        self._victim: Block | None = None  # what leaves otherwise was deleted and is no ghost
        self._peak = 0  # most blocks held: the capacity
        self._orphans: dict[Block, None] = {}

    def refer(self, namespace: Namespace, keys: bytes) -> None:
        """Blocks that are not here tell these orders nothing."""

    def admits(self, namespace: Namespace, key: bytes, victim: Block) -> bool:
        """Nothing is refused."""
        return True

    def refuse(self, namespace: Namespace, keys: Sequence[bytes]) -> None:
        """Nothing is remembered of them."""

    def _note_orphan(self, block: Block) -> None:
        if not block.touched:
            self._orphans[block] = None

    def _orphan(self, allowed: Callable[[Block], bool]) -> Block | None:
        """An orphan that may leave goes before all others."""
        for block in [block for block in self._orphans if block.touched or not block.copies & self._tier]:
            del self._orphans[block]
        return next((block for block in self._orphans if self._free(block, allowed)), None)

    @staticmethod
    def _inherit(block: Block) -> None:
        """An ancestor is as young as what hung on it; above all it is no orphan of old if that was stored later."""
        if block.parent is not None:
            block.parent.touched = max(block.parent.touched, block.touched)

    def _free(self, block: Block, allowed: Callable[[Block], bool]) -> bool:
        return block.is_leaf(self._tier) and allowed(block)


class Lru2(Rival):
    """LRU-2 (O'Neil et al. 1993): the oldest last use but one leaves, what has only one use before all others."""

    def __init__(self, tier: int, mark: int) -> None:
        super().__init__(tier, mark)
        self._entry = count()
        self._uses: dict[Block, tuple[int, int]] = {}  # last but one, last
        self._heap: list[tuple[int, int, int, int, Block]] = []
        self._ghosts: OrderedDict[bytes, int] = OrderedDict()

    def insert(self, block: Block) -> None:
        """Add a block; one that is back has its last use from before."""
        self._uses[block] = (self._ghosts.pop(block.key, _NEVER), block.touched)
        self._peak = max(self._peak, len(self._uses))
        self.offer(block)

    def touch(self, block: Block) -> None:
        """A use of the whole path. Two in a row are one: an acquire, and the put that goes on from there."""
        for above in path(block):
            uses = self._uses.get(above)
            if uses is not None and block.touched - uses[1] > 1:
                self._uses[above] = (uses[1], block.touched)
        self.offer(block)

    def offer(self, block: Block) -> None:
        """Give a block an entry."""
        if block in self._uses and not block.queued & self._mark:
            block.queued |= self._mark
            heapq.heappush(self._heap, self._made(block))

    def victim(self, allowed: Callable[[Block], bool]) -> Block | None:
        """The leaf with the oldest last use but one."""
        heap = self._heap
        while heap:
            block = heap[0][4]
            if block not in self._uses:
                heapq.heappop(heap)
                block.queued &= ~self._mark
            elif (made := self._made(block))[:3] != heap[0][:3]:
                heapq.heapreplace(heap, made)
            elif self._free(block, allowed):
                self._victim = block
                return block
            else:
                heapq.heappop(heap)
                block.queued &= ~self._mark
        return None

    def remove(self, block: Block) -> None:
        """The last use of what left for room is remembered."""
        _, last = self._uses.pop(block)
        if block is self._victim:
            self._ghosts[block.key] = last
            if len(self._ghosts) > _GHOSTS * self._peak:
                self._ghosts.popitem(last=False)
        self._inherit(block)
        if block.parent is not None:
            self.offer(block.parent)

    def _made(self, block: Block) -> tuple[int, int, int, int, Block]:
        before, last = self._uses[block] if block.touched else (_NEVER, _NEVER)
        return (before, last, -block.depth, next(self._entry), block)


class S3Fifo(Rival):
    """S3-FIFO (Yang et al. 2023): a small queue of a tenth, a main queue with up to three rounds, a ghost queue."""

    def __init__(self, tier: int, mark: int) -> None:
        super().__init__(tier, mark)
        self._queues: tuple[OrderedDict[Block, None], ...] = (OrderedDict(), OrderedDict())  # small, main
        self._home: dict[Block, int] = {}  # which queue, also of blocks that cannot leave and stand in none
        self._uses: dict[Block, int] = {}
        self._small = 0
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()

    def insert(self, block: Block) -> None:
        """Into the small queue, or into the main one if it left a short while ago."""
        known = block.key in self._ghosts
        self._ghosts.pop(block.key, None)
        self._home[block] = int(known)
        self._small += not known
        self._queues[known][block] = None
        self._uses[block] = 0
        self._peak = max(self._peak, len(self._uses))
        self.offer(block)

    def touch(self, block: Block) -> None:
        """A use of the whole path."""
        for above in path(block):
            if above in self._uses:
                self._uses[above] = min(3, self._uses[above] + 1)
        self.offer(block)

    def offer(self, block: Block) -> None:
        """What was passed over at the head of its queue goes back there."""
        if block in self._home:
            self._note_orphan(block)
            queue = self._queues[self._home[block]]
            if block not in queue:
                queue[block] = None
                queue.move_to_end(block, last=False)

    def victim(self, allowed: Callable[[Block], bool]) -> Block | None:
        """The first of the small queue while that is over its tenth, else of the main one."""
        chosen = self._orphan(allowed)
        small, main = self._queues
        while chosen is None and (small or main):
            first = bool(small) and (self._small > len(self._uses) // 10 or not main)
            queue = small if first else main
            block = next(iter(queue))
            if not self._free(block, allowed):
                del queue[block]
            elif self._uses[block] > first:
                self._keep(block, first)
            else:
                chosen = block
        self._victim = chosen
        return chosen

    def _keep(self, block: Block, first: bool) -> None:
        """It was used: from the small queue to the main one, there once more around."""
        if first:
            del self._queues[0][block]
            self._small -= 1
            self._home[block] = 1
            self._queues[1][block] = None
            self._uses[block] = 0
        else:
            self._queues[1].move_to_end(block)
            self._uses[block] -= 1

    def remove(self, block: Block) -> None:
        """What left the small queue for room is remembered."""
        del self._uses[block]
        home = self._home.pop(block)
        self._small -= home == 0
        self._queues[home].pop(block, None)
        if home == 0 and block is self._victim:
            self._ghosts[block.key] = None
            if len(self._ghosts) > self._peak:
                self._ghosts.popitem(last=False)
        self._inherit(block)
        if block.parent is not None:
            self.offer(block.parent)


class Arc(Rival):
    """ARC (Megiddo and Modha 2003): used once and used again, balanced by what returns to either."""

    def __init__(self, tier: int, mark: int) -> None:
        super().__init__(tier, mark)
        self._lists: tuple[OrderedDict[Block, None], ...] = (OrderedDict(), OrderedDict())
        self._ghosts: tuple[OrderedDict[bytes, None], ...] = (OrderedDict(), OrderedDict())
        self._home: dict[Block, int] = {}  # which list, also of blocks that cannot leave and stand in none
        self._sizes = [0, 0]
        self._target = 0.0  # of the first list

    def insert(self, block: Block) -> None:
        """Into the first list; what is back moves the target and goes into the second."""
        first, second = (block.key in ghosts for ghosts in self._ghosts)
        counts = [max(1, len(ghosts)) for ghosts in self._ghosts]
        if first:
            self._target = min(float(self._peak), self._target + max(1.0, counts[1] / counts[0]))
        elif second:
            self._target = max(0.0, self._target - max(1.0, counts[0] / counts[1]))
        for ghosts in self._ghosts:
            ghosts.pop(block.key, None)
        self._enter(block, int(first or second))
        self._peak = max(self._peak, len(self._home))
        self.offer(block)

    def touch(self, block: Block) -> None:
        """The whole path goes to the end of the second list, the root last."""
        for above in path(block):
            if above in self._home:
                self._leave(above)
                self._enter(above, 1)

    def offer(self, block: Block) -> None:
        """What was passed over at the head of its list goes back there."""
        if block in self._home:
            self._note_orphan(block)
            blocks = self._lists[self._home[block]]
            if block not in blocks:
                blocks[block] = None
                blocks.move_to_end(block, last=False)

    def victim(self, allowed: Callable[[Block], bool]) -> Block | None:
        """The first leaf of the first list while that is over its target, else of the second."""
        heads = [self._head(which, allowed) for which in (0, 1)]
        prefer = 0 if self._sizes[0] > self._target else 1
        chosen = self._orphan(allowed) or heads[prefer] or heads[1 - prefer]
        self._victim = chosen
        return chosen

    def remove(self, block: Block) -> None:
        """What left for room is remembered; its parent may be a leaf now, as old as it."""
        which = self._home[block]
        self._leave(block)
        if block is self._victim:
            ghosts = self._ghosts[which]
            ghosts[block.key] = None
            if len(ghosts) > self._peak:
                ghosts.popitem(last=False)
        self._inherit(block)
        if block.parent is not None:
            self.offer(block.parent)

    def _enter(self, block: Block, which: int) -> None:
        self._home[block] = which
        self._sizes[which] += 1
        self._lists[which][block] = None

    def _leave(self, block: Block) -> None:
        which = self._home.pop(block)
        self._sizes[which] -= 1
        self._lists[which].pop(block, None)

    def _head(self, which: int, allowed: Callable[[Block], bool]) -> Block | None:
        blocks = self._lists[which]
        while blocks:
            block = next(iter(blocks))
            if self._free(block, allowed):
                return block
            del blocks[block]
        return None
