"""All orders of eviction, and who goes before whom across them.

Blocks stand in places: a tier and a tenant, in warm a slot size as well, because slabs are not shared. In a place every
level has an order of its own, and the lowest level leaves first, whatever its age:

    SPARE     a warm copy that was loaded for one use (a passing one), or a cold copy below a promoted one
    LOW, NORMAL, HIGH    the priority of the namespace
    PINNED    softly pinned by an operator or a put: leaves when nothing else may

An order never sees a block of another level: what moves is removed from one order and inserted into the other.
Only a namespace that has a limit of its own has an order beside these (core.own), whatever the level.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from kvstore.core.block import COLD, HOT, NORMAL, PINNED, SPARE, WARM, Block, Namespace, level_of, mark_of
from kvstore.core.leaf_lru import LeafLru
from kvstore.core.policy import EvictionPolicy, PolicyFactory

TIERS = (HOT, WARM, COLD)

Allowed = Callable[[Block], bool]


class Place(NamedTuple):
    """Where blocks compete for room. `slot_bytes` is 0 outside of warm."""

    tier: int
    tenant: str
    slot_bytes: int


class Orders:
    """One order for each place and level, made when its first block comes."""

    def __init__(self, policy: PolicyFactory) -> None:
        """`policy` makes the order of a priority; the levels below and above are leaf-first LRU."""
        self._policy = policy
        self._places: dict[Place, dict[int, EvictionPolicy]] = {}

    # -- what happens to blocks -------------------------------------------------------------------------------

    def of(self, namespace: Namespace, tier: int, level: int = NORMAL) -> EvictionPolicy:
        """The order of a namespace's blocks in a tier at a level."""
        mark = mark_of(tier, level)
        order = namespace.orders.get(mark)
        if order is None:
            levels = self._places.setdefault(_place(namespace, tier), {})
            if level not in levels:
                levels[level] = self._made(tier, level)
                if list(levels) != sorted(levels):
                    self._places[_place(namespace, tier)] = dict(sorted(levels.items()))
            order = namespace.orders[mark] = levels[level]
        return order

    def _made(self, tier: int, level: int) -> EvictionPolicy:
        mark = mark_of(tier, level)
        if level in (SPARE, PINNED):
            # A cold copy below a warm one may go before its children: the prefix stays whole without it.
            return LeafLru(tier, mark, _anywhere if (tier, level) == (COLD, SPARE) else Block.is_bare)
        return self._policy(tier, mark)

    def refer(self, namespace: Namespace, keys: bytes) -> None:
        """Packed keys of one prefix were found, or are about to be stored."""
        self.of(namespace, WARM, namespace.level).refer(namespace, keys)
        for tier in (COLD, HOT):
            order = namespace.orders.get(mark_of(tier, namespace.level))
            if order is not None:
                order.refer(namespace, keys)

    def insert(self, block: Block, tier: int) -> None:
        """The block gained a copy in the tier."""
        self._at(block, tier).insert(block)
        if block.namespace.own and tier in block.namespace.own:
            block.namespace.own[tier].insert(block)

    def remove(self, block: Block, tier: int) -> None:
        """Its copy in the tier has gone: what it hung on may be a leaf now, of whatever level."""
        self._at(block, tier).remove(block)
        if block.namespace.own and tier in block.namespace.own:
            block.namespace.own[tier].remove(block)
        parent = block.parent
        if parent is not None and parent.copies & tier:
            self._at(parent, tier).offer(parent)

    def touch(self, block: Block) -> None:
        """Note a use of the prefix that ends with `block`."""
        for tier in TIERS:
            if block.copies & tier:
                self._at(block, tier).touch(block)

    def offer(self, block: Block) -> None:
        """`block` may have become free to leave."""
        for tier in TIERS:
            if block.copies & tier:
                self._at(block, tier).offer(block)
        for order in block.namespace.own.values():
            order.offer(block)

    def set_spare(self, block: Block, tier: int, spare: bool) -> None:
        """Say whether its copy in a tier is the first to go."""
        if bool(block.spare & tier) != spare:
            self._move(block, (tier,), spare=block.spare ^ tier)

    def set_level(self, block: Block, level: int) -> None:
        """Give it another priority, in every tier."""
        if block.level != level:
            self._move(block, TIERS, level=level)

    def _move(self, block: Block, tiers: Iterable[int], spare: int | None = None, level: int | None = None) -> None:
        held = [tier for tier in tiers if block.copies & tier]
        for tier in held:
            self._at(block, tier).remove(block)
        block.spare = block.spare if spare is None else spare
        block.level = block.level if level is None else level
        for tier in held:
            self._at(block, tier).insert(block)
        if block.parent is not None:  # it may be a leaf now, or none any more
            self.offer(block.parent)

    def _at(self, block: Block, tier: int) -> EvictionPolicy:
        level = level_of(block, tier)
        return block.namespace.orders.get(mark_of(tier, level)) or self.of(block.namespace, tier, level)

    # -- who leaves -------------------------------------------------------------------------------------------

    def victim(self, namespace: Namespace, tier: int, allowed: Allowed) -> Block | None:
        """The block to leave next in the place where the namespace's blocks are."""
        return _first(self._places.get(_place(namespace, tier), {}), allowed)

    def own_victim(self, namespace: Namespace, tier: int, allowed: Allowed) -> Block | None:
        """The block to leave next where the namespace itself has to make room, for it has a limit of its own."""
        own = namespace.own.get(tier)
        return own.victim(allowed) if own is not None else None

    def oldest(
        self, tier: int, allowed: Allowed, tenants: Collection[str] | None = None, level_min: int = SPARE
    ) -> Block | None:
        """The block to leave next in all places of a tier, or of some tenants there.

        In a place the lowest level goes first; between places only age counts, but for what is spare or pinned: one
        tenant's priorities are no burden on another.
        """
        victims = [
            _first(levels, allowed, level_min)
            for place, levels in self._places.items()
            if place.tier == tier and (tenants is None or place.tenant in tenants)
        ]
        return min(
            (block for block in victims if block is not None),
            key=lambda block: (_RANKS[level_of(block, tier)], block.touched),
            default=None,
        )

    def idle_since(self, allowed: Allowed) -> dict[Place, int]:
        """For each place in warm, the stamp of its next victim."""
        stamps = {}
        for place, levels in self._places.items():
            victim = _first(levels, allowed) if place.tier == WARM else None
            if victim is not None:
                stamps[place] = victim.touched
        return stamps

    def admits(self, namespace: Namespace, key: bytes, victim: Block, tier: int) -> bool:
        """Whether a new block of the namespace is worth the place of a victim."""
        level = level_of(victim, tier)
        if level != namespace.level:
            return level < namespace.level
        return self.of(namespace, tier, level).admits(namespace, key, victim)


_RANKS = (0, 1, 1, 1, 2)  # of levels, between places


def _anywhere(block: Block, tier: int) -> bool:
    return True


def _place(namespace: Namespace, tier: int) -> Place:
    return Place(tier, namespace.tenant, namespace.slot_bytes if tier == WARM else 0)


def _first(levels: dict[int, EvictionPolicy], allowed: Allowed, level_min: int = SPARE) -> Block | None:
    for level, order in levels.items():  # from the lowest on
        victim = order.victim(allowed) if level >= level_min else None
        if victim is not None:
            return victim
    return None
