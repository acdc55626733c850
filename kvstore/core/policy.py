"""What an eviction policy is: an order, and nothing else.

A policy never owns data, budgets or I/O. Call sequence, for the one tier it orders:

    insert(block)      the block gained a copy in this tier
    touch(block)       it is the deepest block of a prefix that was used, and its ancestors with it; `block.touched`,
                       which all tiers share, has its new stamp already
    offer(block)       something that kept it from leaving may have ended (a pin, a missing copy below, a child)
    victim(allowed)    the block to leave next among those that `allowed` accepts; it stays in the order
    remove(block)      its copy in this tier has gone

A victim is always a leaf of this tier: none of its children has a copy here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from kvstore.core.block import Block


class EvictionPolicy(Protocol):
    """The order in which blocks leave one tier."""

    def insert(self, block: Block) -> None:
        """Add a block that gained a copy."""

    def touch(self, block: Block) -> None:
        """Note a use of the prefix that ends with `block`."""

    def offer(self, block: Block) -> None:
        """Consider `block` again, without noting a use."""

    def victim(self, allowed: Callable[[Block], bool]) -> Block | None:
        """The next block to leave, or None where nothing may."""

    def remove(self, block: Block) -> None:
        """Forget a block whose copy has gone; `block.copies` is already without this tier."""


PolicyFactory: TypeAlias = Callable[[int], EvictionPolicy]
"""Makes the order of one tier (HOT, WARM or COLD of core.block)."""
