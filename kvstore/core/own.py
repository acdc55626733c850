"""The order of one namespace's blocks in a tier, for a namespace that has a limit of its own there.

Its blocks stand here beside the orders that all blocks of their tenant share: those say who makes room for others, this
one who makes room for the namespace itself.
"""

from __future__ import annotations

from kvstore.core.block import Block, Namespace, own_mark_of
from kvstore.core.leaf_lru import LeafLru


class OwnOrder(LeafLru):
    """Leaf-first LRU over one namespace. Made beside blocks that are stored already, which `enter` brings in."""

    def __init__(self, namespace: Namespace, tier: int) -> None:
        super().__init__(tier, own_mark_of(tier))
        self._namespace = namespace
        self._epoch = namespace.epoch  # older blocks were cleared, and wait to be emptied
        self._entered = 0  # blocks whose key begins with a byte below it stand here

    def enter(self, shards: int) -> None:
        """Bring in the blocks of the namespace's first `shards` shards, as far as they are not here."""
        while self._entered < shards:
            blocks = self._namespace.blocks.shards[self._entered]
            self._entered += 1
            for block in blocks.values():
                if block.copies & self._tier:
                    super().insert(block)

    def insert(self, block: Block) -> None:
        """Add a block, unless its part is still to come."""
        if self.has(block):
            super().insert(block)

    def offer(self, block: Block) -> None:
        """Consider `block` again."""
        if self.has(block):
            super().offer(block)

    def remove(self, block: Block) -> None:
        """Forget a block whose copy has gone."""
        if self.has(block):
            super().remove(block)

    def has(self, block: Block) -> bool:
        """Whether the block stands here if it has a copy in the tier."""
        return block.key[0] < self._entered and block.epoch >= self._epoch
