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

from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

from kvstore.core.block import COLD, HOT, MARKS, NORMAL, PINNED, SPARE, WARM, Block, Namespace, level_of, mark_of
from kvstore.core.leaf_lru import LeafLru
from kvstore.core.policy import EvictionPolicy, PolicyFactory

TIERS = (HOT, WARM, COLD)

Allowed = Callable[[Block], bool]


class Place(NamedTuple):
    """Where blocks compete for room. `slot_bytes` is 0 outside of warm."""

    tier: int
    tenant: str
    slot_bytes: int


_made_place = partial(tuple.__new__, Place)  # a third of what Place(a, b, c) costs


class Orders:
    """One order for each place and level, made when its first block comes."""

    def __init__(self, policy: PolicyFactory) -> None:
        """`policy` makes the order of a priority; the levels below and above are leaf-first LRU."""
        self._policy = policy
        self._places: dict[int, dict[Place, dict[int, EvictionPolicy]]] = {tier: {} for tier in TIERS}

    # -- what happens to blocks -------------------------------------------------------------------------------

    def of(self, namespace: Namespace, tier: int, level: int = NORMAL) -> EvictionPolicy:
        """The order of a namespace's blocks in a tier at a level."""
        mark = mark_of(tier, level)
        order = namespace.orders.get(mark)
        if order is None:
            place = _place(namespace, tier)
            levels = self._places[tier].get(place, {})
            if level not in levels:
                self._places[tier][place] = levels = dict(sorted([*levels.items(), (level, self._made(tier, level))]))
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
        if (
            parent is not None
            and parent.copies & tier
            and ((parent.spare ^ block.spare) & tier or parent.level != block.level)
        ):
            self._at(parent, tier).offer(parent)

    def touch(self, block: Block) -> None:
        """Note a use of the prefix that ends with `block`."""
        for tier in TIERS:
            if block.copies & tier:
                self._at(block, tier).touch(block)

    def offer(self, block: Block) -> None:
        """`block` may have become free to leave."""
        copies, spare, queued, namespace = block.copies, block.spare, block.queued, block.namespace
        for tier in TIERS:
            if copies & tier:
                level = SPARE if spare & tier else block.level
                if not queued & MARKS[tier][level]:
                    (namespace.orders.get(MARKS[tier][level]) or self.of(namespace, tier, level)).offer(block)
        if namespace.own:
            for tier, own in namespace.own.items():
                if copies & tier:
                    own.offer(block)

    def set_spare(self, block: Block, tier: int, spare: bool) -> None:
        """Say whether its copy in a tier is the first to go."""
        if (block.spare & tier != 0) == spare:
            return
        if block.copies & tier:
            self._at(block, tier).remove(block)
            block.spare ^= tier
            self._at(block, tier).insert(block)
        else:
            block.spare ^= tier
        if block.parent is not None:  # it may be a leaf now, or none any more
            self.offer(block.parent)

    def set_level(self, block: Block, level: int) -> None:
        """Give it another priority, in every tier."""
        if block.level == level:
            return
        held = [tier for tier in TIERS if block.copies & tier]
        for tier in held:
            self._at(block, tier).remove(block)
        block.level = level
        for tier in held:
            self._at(block, tier).insert(block)
        if block.parent is not None:
            self.offer(block.parent)

    def _at(self, block: Block, tier: int) -> EvictionPolicy:
        level, namespace = SPARE if block.spare & tier else block.level, block.namespace
        return namespace.orders.get(MARKS[tier][level]) or self.of(namespace, tier, level)

    # -- who leaves -------------------------------------------------------------------------------------------

    def victim(self, namespace: Namespace, tier: int, allowed: Allowed) -> Block | None:
        """The block to leave next in the place where the namespace's blocks are."""
        return _first(self._places[tier].get(_place(namespace, tier), {}), allowed)

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
        chosen: Block | None = None
        for place, levels in self._places[tier].items():
            victim = _first(levels, allowed, level_min) if tenants is None or place.tenant in tenants else None
            if chosen is None or (
                victim is not None
                and (_RANKS[level_of(victim, tier)], victim.touched) < (_RANKS[level_of(chosen, tier)], chosen.touched)
            ):
                chosen = victim
        return chosen

    def idle_since(self, allowed: Allowed) -> dict[Place, int]:
        """For each place in warm, the stamp of its next victim."""
        stamps = {}
        for place, levels in self._places[WARM].items():
            victim = _first(levels, allowed)
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
    return _made_place((tier, namespace.tenant, namespace.slot_bytes if tier == WARM else 0))


def _first(levels: dict[int, EvictionPolicy], allowed: Allowed, level_min: int = SPARE) -> Block | None:
    for level, order in levels.items():  # from the lowest on
        if level >= level_min:
            victim = order.victim(allowed)
            if victim is not None:
                return victim
    return None
