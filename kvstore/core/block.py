"""The record of one block, and the namespace it lives in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntFlag
from itertools import chain
from typing import TYPE_CHECKING

from kvstore.core.numbers import numbers
from kvstore.core.slots import Slot

if TYPE_CHECKING:
    from kvstore.core.policy import EvictionPolicy


class Copies(IntFlag):
    """Which tiers hold a complete copy of a block."""

    NONE = 0
    HOT = 1
    WARM = 2
    COLD = 4


# Plain ints: IntFlag arithmetic costs 20 times an int's, and these are tested for every block of every lease.
HOT, WARM, COLD = int(Copies.HOT), int(Copies.WARM), int(Copies.COLD)

REFUSED = 16  # in `spare` beside the tiers: it is not to be saved to cold
PREFETCHED = 8  # in `spare` beside the tiers: its warm copy was loaded on a hint, and nobody has come for it yet

# Priorities: blocks of a lower one leave first.
LOW, NORMAL, HIGH, PINNED = range(4)

# A standing says in which order of a place a block stands (core.orders): its priority, whether its copy is settled (in
# a tier where it is spare it stands one lower), and whether it stands in a group of its namespace's own.
SETTLED, OWN = 1, 8


def standing_of(level: int, own: bool = False) -> int:
    """The standing of settled copies of blocks of a priority."""
    return 2 * level + SETTLED + OWN * own


# The usual standings have the lowest bits: numbers up to 256 are no objects of their own in memory.
_USUAL = (standing_of(NORMAL), standing_of(NORMAL) - SETTLED)
_ORDERED = (*_USUAL, *(standing for standing in range(16) if standing not in _USUAL))
MARKS = tuple(tuple(tier << 3 * _ORDERED.index(standing) for standing in range(16)) for tier in range(COLD + 1))
"""The bit of each order in Block.queued, by tier and standing."""


# Block._sums: the checksum, whether there is one, stored_bytes.
_SUM_BYTES = 16
_SUM_MASK = (1 << 8 * _SUM_BYTES) - 1
_SUM_KNOWN = 1 << 8 * _SUM_BYTES
_STORED_SHIFT = 8 * _SUM_BYTES + 1

# Bits of Block.marks.
ORPHAN, REUSED, SAVING = 1, 2, 4


class Block:
    """One immutable, content-addressed block.

    A record without copies is a *hole*: a block that was lost, or never seen after a restart, while children of
    it are still stored. Those children are *orphans* and count as absent until the hole is filled again.

    There may be a million of them, so each attribute counts (8 bytes), and so does each integer above 256 that is not
    shared (32). Most blocks have one child: only a fork has a table of its children.
    """

    __slots__ = (
        "_sums",
        "below",
        "copies",
        "depth",
        "epoch",
        "hits",
        "key",
        "lossy",
        "marks",
        "namespace",
        "parent",
        "queued",
        "slot",
        "spare",
        "standing",
        "touched",
    )

    def __init__(self, namespace: Namespace, key: bytes, parent: Block | None) -> None:
        self.namespace = namespace
        self.key = key
        self.epoch = namespace.epoch  # a clear does not change it: saved bytes must never be taken for newer ones
        self._sums = 0  # checksum and stored_bytes in one integer, of 48 bytes: apart they take 104
        self.lossy = b""  # of the cold copy's bytes, where that is a lossy one
        self.copies = 0  # HOT | WARM | COLD
        self.slot: Slot | None = None  # FILLING while it loads, READY while WARM
        self.touched = 0  # stamp of the last use
        self.queued = 0  # marks of the orders that have an entry for this block
        self.marks = 0  # ORPHAN | REUSED | SAVING
        self.standing = namespace.standing  # where it is not spare
        self.spare = 0  # tiers whose copy leaves before all others; REFUSED, PREFETCHED
        self.hits = 0
        self.parent: Block | None = None
        self.depth = 0
        self.below: Block | dict[Block, None] | None = None  # its child, or its children, oldest first
        if parent is not None:
            self.link(parent)

    def link(self, parent: Block) -> None:
        """Become a child of `parent`."""
        self.parent = parent
        self.depth = numbers(parent.depth + 2)[parent.depth + 1]
        below = parent.below
        if below is None:
            parent.below = self
        elif isinstance(below, dict):
            below[self] = None
        else:
            parent.below = {below: None, self: None}

    def unlink(self) -> None:
        """Leave the parent's children."""
        parent = self.parent
        if parent is None:
            return
        below = parent.below
        if isinstance(below, dict):
            del below[self]
            if len(below) == 1:
                parent.below = next(iter(below))
        else:
            parent.below = None
        self.parent = None

    @property
    def checksum(self) -> bytes:
        """Of the bytes that a reader gets now, 16 bytes; empty where there were none yet."""
        sums = self._sums
        return (sums & _SUM_MASK).to_bytes(_SUM_BYTES, "little") if sums & _SUM_KNOWN else b""

    @checksum.setter
    def checksum(self, value: bytes) -> None:
        assert len(value) in (0, _SUM_BYTES), f"a checksum of {len(value)} bytes"
        own = int.from_bytes(value, "little") | _SUM_KNOWN if value else 0
        self._sums = self._sums >> _STORED_SHIFT << _STORED_SHIFT | own

    @property
    def stored_bytes(self) -> int:
        """On the cold medium."""
        return self._sums >> _STORED_SHIFT

    @stored_bytes.setter
    def stored_bytes(self, value: int) -> None:
        self._sums = self._sums & (_SUM_MASK | _SUM_KNOWN) | value << _STORED_SHIFT

    @property
    def level(self) -> int:
        """Its priority: LOW, NORMAL, HIGH or PINNED."""
        return self.standing >> 1 & 3

    @property
    def orphan(self) -> bool:
        """Whether a hole is above it."""
        return bool(self.marks & ORPHAN)

    @orphan.setter
    def orphan(self, value: bool) -> None:
        self._mark(ORPHAN, value)

    @property
    def reused(self) -> bool:
        """Used after it was stored, or back soon after it left; of a leaf: what hangs on it counts."""
        return bool(self.marks & REUSED)

    @reused.setter
    def reused(self, value: bool) -> None:
        self._mark(REUSED, value)

    @property
    def saving(self) -> bool:
        """Whether an agent is copying it to the cold tier."""
        return bool(self.marks & SAVING)

    @saving.setter
    def saving(self, value: bool) -> None:
        self._mark(SAVING, value)

    def _mark(self, bit: int, value: bool) -> None:
        self.marks = self.marks | bit if value else self.marks & ~bit

    @property
    def top(self) -> Block:
        """The farthest ancestor that has a record, itself if it has no parent."""
        block = self
        while block.parent is not None:
            block = block.parent
        return block

    def stands(self, tier: int, mark: int) -> bool:
        """Whether it belongs into the order of a tier that has this mark."""
        return (
            self.copies & tier != 0 and MARKS[tier][self.standing ^ 1 if self.spare & tier else self.standing] == mark
        )

    @property
    def first_child(self) -> Block | None:
        """The newest child."""
        below = self.below
        return next(reversed(below)) if isinstance(below, dict) else below

    def children(self) -> Sequence[Block]:
        """The direct children, newest first; they may leave meanwhile."""
        below = self.below
        if below is None:
            return ()
        return list(reversed(below)) if isinstance(below, dict) else (below,)

    def copies_above(self, count: int) -> dict[int, int]:
        """Of this block and those above it, `count` in all, how many have which copies.

        Only where they change is anything counted: 8,192 blocks take 0.3 ms, where a lookup of each took 4.
        """
        found: dict[int, int] = {}
        block: Block | None = self
        last, first = self.copies, 0
        for i in range(count):
            if block is None:  # it has left meanwhile
                count = i
                break
            if block.copies != last:
                found[last] = found.get(last, 0) + i - first
                last, first = block.copies, i
            block = block.parent
        found[last] = found.get(last, 0) + count - first
        return found

    def is_leaf(self, tier: int) -> bool:
        """Whether no child has a copy in `tier` that stays there (one that is not spare)."""
        below = self.below
        if below is None:
            return True
        if isinstance(below, dict):
            for child in reversed(below):  # noqa: SIM110 - a generator takes thrice as long
                if child.copies & ~child.spare & tier:
                    return False
            return True
        return not below.copies & ~below.spare & tier

    def is_bare(self, tier: int) -> bool:
        """Whether no child has a copy in `tier`."""
        below = self.below
        if below is None:
            return True
        if isinstance(below, dict):
            for child in reversed(below):  # noqa: SIM110 - as above
                if child.copies & tier:
                    return False
            return True
        return not below.copies & tier

    def subtree(self) -> list[Block]:
        """This block and everything that hangs on it, parents before children."""
        found = [self]
        for block in found:  # grows while it is walked
            found.extend(block.children())
        return found

    @property
    def degraded(self) -> bool:
        """Whether the bytes that a reader gets now went through a lossy copy."""
        return bool(self.lossy) and self.lossy == self.checksum

    @property
    def present(self) -> bool:
        """Whether a lookup may find it."""
        return bool(self.copies) and not self.marks & ORPHAN


SHARDS = 256


class Blocks:
    """Blocks by key, as in a dict, but in many by the first byte of the key.

    A dict that grows holds the interpreter all the while: 0.2 s at a million entries, and again for every 400,000 that
    come and go. One of 4,000 takes 0.1 ms. `shards[key[0]]` is for hot loops.
    """

    __slots__ = ("shards",)

    def __init__(self) -> None:
        self.shards: list[dict[bytes, Block]] = [{} for _ in range(SHARDS)]

    def __getitem__(self, key: bytes) -> Block:
        return self.shards[key[0]][key]

    def __setitem__(self, key: bytes, block: Block) -> None:
        self.shards[key[0]][key] = block

    def __delitem__(self, key: bytes) -> None:
        del self.shards[key[0]][key]

    def __contains__(self, key: bytes) -> bool:
        return key in self.shards[key[0]]

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def __iter__(self) -> Iterator[bytes]:
        return chain.from_iterable(self.shards)

    def get(self, key: bytes) -> Block | None:
        """The block, if there is one."""
        return self.shards[key[0]].get(key)

    def values(self) -> Iterator[Block]:
        """All blocks; none may come or go meanwhile."""
        return chain.from_iterable(shard.values() for shard in self.shards)

    def items(self) -> Iterator[tuple[bytes, Block]]:
        """All keys with their blocks; none may come or go meanwhile."""
        return chain.from_iterable(shard.items() for shard in self.shards)


@dataclass(slots=True, eq=False)
class Namespace:
    """All blocks that can meet. `blocks` also has holes and orphans."""

    digest: bytes
    tenant: str
    block_nbytes: int
    slot_bytes: int
    block_tokens: int
    chain: bool
    layout: str = ""
    cold_codec: str = ""  # a lossy one that its owner asked for; empty: none
    epoch: int = 0
    standing: int = standing_of(NORMAL)  # of its new blocks
    leaving_bytes: int = 0  # of its blocks in warm that are on their way out
    blocks: Blocks = field(default_factory=Blocks)
    orders: dict[int, EvictionPolicy] = field(default_factory=dict)  # those that its blocks stand in, by mark
    salt: int = field(init=False)  # tells equal keys of two namespaces apart; its lowest eight bits are 0

    @property
    def level(self) -> int:
        """The priority of its new blocks."""
        return self.standing >> 1 & 3

    def __post_init__(self) -> None:
        self.salt = int.from_bytes(self.digest[:8], "little") & ~0xFF


def standing_in(block: Block, tier: int) -> int:
    """Where it stands in a tier."""
    return block.standing ^ 1 if block.spare & tier else block.standing
