"""What an eviction policy is: an order, and nothing else.

A policy never owns data, budgets or I/O. It orders the blocks that stand in one place and level of one tier
(core.orders, Block.stands). Call sequence:

    refer(ns, keys)    these blocks of one prefix were found by a reader, or are about to be stored; each use once,
                       whichever tier has them
    insert(block)      the block gained a copy in this tier; `block.touched` has its stamp
    touch(block)       it is the deepest block of a prefix that was used, and its ancestors with it; `block.touched` and
                       `block.reused`, which all tiers share, tell of it already
    offer(block)       something that kept it from leaving may have ended (a pin, a missing copy below, a child); it
                       stands here, and the order's own bit is not in `block.queued`
    victim(allowed)    the block to leave next among those that `allowed` accepts; it stays in the order
    admits(ns, key, victim)  whether a new block should have the place of the victim just named
    refuse(ns, keys)   these new blocks got no place: `admits` said no to the first of them, or nothing may leave
    remove(block)      its copy in this tier has gone

A victim is always a leaf of this tier: none of its children has a copy here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from kvstore.core.block import Block, Namespace


class EvictionPolicy(Protocol):
    """The order in which blocks leave one tier."""

    def refer(self, namespace: Namespace, keys: bytes) -> None:
        """Note a use of packed keys, which may or may not be here."""

    def insert(self, block: Block) -> None:
        """Add a block that gained a copy."""

    def touch(self, block: Block) -> None:
        """Note a use of the prefix that ends with `block`."""

    def offer(self, block: Block) -> None:
        """Consider `block` again, without noting a use."""

    def victim(self, allowed: Callable[[Block], bool]) -> Block | None:
        """The next block to leave, or None where nothing may."""

    def admits(self, namespace: Namespace, key: bytes, victim: Block) -> bool:
        """Whether a new block would leave later than `victim`."""

    def refuse(self, namespace: Namespace, keys: Sequence[bytes]) -> None:
        """Note new blocks that were not stored, from the root on."""

    def remove(self, block: Block) -> None:
        """Forget a block whose copy has gone; `block.copies` is already without this tier."""


PolicyFactory: TypeAlias = Callable[[int, int], EvictionPolicy]
"""Makes an order for a tier (HOT, WARM or COLD of core.block), with its bit in `Block.queued` (core.block.MARKS)."""
