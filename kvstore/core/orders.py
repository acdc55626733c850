"""All orders of eviction, and who goes before whom across them.

Blocks stand in places: a tier and a tenant, in warm a slot size as well, because slabs are not shared. A namespace that
has a limit of its own is a group of its own there, so that it can make room for itself; all others are one. In a group
there is an order for each standing:

    in warm            by priority (LOW, NORMAL, HIGH, PINNED), and of one priority what is spare before what is settled
    in hot and cold    what is spare before everything, then by priority

A warm copy is spare that was loaded for one use, or that is on its way out; a cold one below a promoted one. What is
pinned goes last. An order never sees a block of another standing: what moves is removed from one
order and inserted into the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import NamedTuple, TypeAlias

from kvstore.core.block import COLD, HOT, MARKS, OWN, PINNED, SETTLED, WARM, Block, Namespace, standing_in
from kvstore.core.leaf_lru import LeafLru
from kvstore.core.policy import EvictionPolicy, PolicyFactory

TIERS = (HOT, WARM, COLD)

Allowed: TypeAlias = Callable[[Block], bool]
Group: TypeAlias = dict[int, EvictionPolicy]
"""Orders by standing, from whose turn is first on."""


class Place(NamedTuple):
    """Where blocks compete for room. `slot_bytes` is 0 outside of warm."""

    tier: int
    tenant: str
    slot_bytes: int


_made_place = partial(tuple.__new__, Place)  # a third of what Place(a, b, c) costs


class Orders:
    """One order for each place, group and standing, made when its first block comes."""

    def __init__(self, policy: PolicyFactory) -> None:
        """`policy` makes the order of settled copies of a priority; the others are leaf-first LRU."""
        self._policy = policy
        # By tier and place, then by digest where a group is a namespace's own, else by b"".
        self._places: dict[int, dict[Place, dict[bytes, Group]]] = {tier: {} for tier in TIERS}

    # -- what happens to blocks -------------------------------------------------------------------------------

    def of(self, namespace: Namespace, tier: int, standing: int | None = None) -> EvictionPolicy:
        """The order of a namespace's blocks in a tier that have a standing; None: that of new ones."""
        standing = namespace.standing if standing is None else standing
        mark = MARKS[tier][standing]
        order = namespace.orders.get(mark)
        if order is None:
            groups = self._places[tier].setdefault(_place(namespace, tier), {})
            name = namespace.digest if standing & OWN else b""
            group = groups.get(name, {})
            if standing not in group:
                made = [*group.items(), (standing, self._made(tier, standing))]
                groups[name] = group = dict(sorted(made, key=lambda entry: _TURNS[tier][entry[0]]))
            order = namespace.orders[mark] = group[standing]
        return order

    def _made(self, tier: int, standing: int) -> EvictionPolicy:
        mark, spare = MARKS[tier][standing], not standing & SETTLED
        if spare or _level(standing) == PINNED:
            # A cold copy below a warm one may go before its children: the prefix stays whole without it.
            return LeafLru(tier, mark, _anywhere if spare and tier == COLD else Block.is_bare)
        return self._policy(tier, mark)

    def refer(self, namespace: Namespace, keys: bytes) -> None:
        """Packed keys of one prefix were found, or are about to be stored."""
        standing = namespace.standing
        self.of(namespace, WARM, standing).refer(namespace, keys)
        for tier in (COLD, HOT):
            order = namespace.orders.get(MARKS[tier][standing])
            if order is not None:
                order.refer(namespace, keys)

    def insert(self, block: Block, tier: int) -> None:
        """The block gained a copy in the tier."""
        self._at(block, tier).insert(block)

    def remove(self, block: Block, tier: int) -> None:
        """Its copy in the tier has gone: what it hung on may be a leaf now, wherever that stands."""
        self._at(block, tier).remove(block)
        parent = block.parent
        if (
            parent is not None
            and parent.copies & tier
            and ((parent.spare ^ block.spare) & tier or parent.standing != block.standing)
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
                standing = block.standing ^ 1 if spare & tier else block.standing
                if not queued & MARKS[tier][standing]:
                    (namespace.orders.get(MARKS[tier][standing]) or self.of(namespace, tier, standing)).offer(block)

    def set_spare(self, block: Block, tier: int, spare: bool) -> None:
        """Say whether its copy in a tier is spare."""
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

    def set_standing(self, block: Block, standing: int) -> None:
        """Give it another priority, or move it into its namespace's own group or out of it, in every tier."""
        if block.standing == standing:
            return
        held = [tier for tier in TIERS if block.copies & tier]
        for tier in held:
            self._at(block, tier).remove(block)
        block.standing = standing
        for tier in held:
            self._at(block, tier).insert(block)
        if block.parent is not None:
            self.offer(block.parent)

    def _at(self, block: Block, tier: int) -> EvictionPolicy:
        standing, namespace = block.standing ^ 1 if block.spare & tier else block.standing, block.namespace
        return namespace.orders.get(MARKS[tier][standing]) or self.of(namespace, tier, standing)

    # -- who leaves -------------------------------------------------------------------------------------------

    def victim(self, namespace: Namespace, tier: int, allowed: Allowed) -> Block | None:
        """The block to leave next in the place where the namespace's blocks are."""
        return _next(tier, self._places[tier].get(_place(namespace, tier), {}), allowed)

    def own_victim(self, namespace: Namespace, tier: int, allowed: Allowed, settled: bool = False) -> Block | None:
        """The block to leave next where the namespace itself has to make room; `settled`: of those that are."""
        groups = self._places[tier].get(_place(namespace, tier), {})
        return _first(groups.get(namespace.digest, {}), allowed, settled)

    def oldest(
        self, tier: int, allowed: Allowed, tenants: Collection[str] | None = None, settled: bool = False
    ) -> Block | None:
        """The block to leave next in all places of a tier, or of some tenants there; `settled`: of those that are.

        Between places only age counts, but for what is spare or pinned: priorities are no burden on another tenant.
        """
        ranks = _RANKS[tier]
        chosen: Block | None = None
        for place, groups in self._places[tier].items():
            victim = _next(tier, groups, allowed, settled) if tenants is None or place.tenant in tenants else None
            if chosen is None or (
                victim is not None
                and (ranks[standing_in(victim, tier)], victim.touched)
                < (ranks[standing_in(chosen, tier)], chosen.touched)
            ):
                chosen = victim
        return chosen

    def idle_since(self, allowed: Allowed) -> dict[Place, int]:
        """For each place in warm, the stamp of its next victim."""
        stamps = {}
        for place, groups in self._places[WARM].items():
            victim = _next(WARM, groups, allowed)
            if victim is not None:
                stamps[place] = victim.touched
        return stamps

    def admits(self, namespace: Namespace, key: bytes, victim: Block, tier: int) -> bool:
        """Whether a new block of the namespace is worth the place of a victim."""
        if victim.level != namespace.level:
            return victim.level < namespace.level
        if victim.spare & tier:
            return True
        return self.of(namespace, tier).admits(namespace, key, victim)


def _level(standing: int) -> int:
    return standing >> 1 & 3


def _turn(tier: int, standing: int) -> int:
    """Whose turn is first in a place: the lowest."""
    return standing & 7 if tier == WARM else 8 * (standing & SETTLED) + _level(standing)


def _rank(tier: int, standing: int) -> int:
    """Whose turn is first between places, before age counts."""
    if not standing & SETTLED and (tier != WARM or _level(standing) != PINNED):
        return 0
    return 2 if _level(standing) == PINNED else 1


_TURNS = {tier: [_turn(tier, standing) for standing in range(16)] for tier in TIERS}
_RANKS = {tier: [_rank(tier, standing) for standing in range(16)] for tier in TIERS}


def _anywhere(block: Block, tier: int) -> bool:
    return True


def _place(namespace: Namespace, tier: int) -> Place:
    return _made_place((tier, namespace.tenant, namespace.slot_bytes if tier == WARM else 0))


def _next(tier: int, groups: dict[bytes, Group], allowed: Allowed, settled: bool = False) -> Block | None:
    """The block to leave next in a place."""
    if len(groups) == 1:
        return _first(next(iter(groups.values())), allowed, settled)
    victims: Iterable[Block | None] = (_first(group, allowed, settled) for group in groups.values())
    return min(
        (block for block in victims if block is not None),
        key=lambda block: (_TURNS[tier][standing_in(block, tier)], block.touched),
        default=None,
    )


def _first(group: Group, allowed: Allowed, settled: bool) -> Block | None:
    for standing, order in group.items():
        if not settled or standing & SETTLED:
            victim = order.victim(allowed)
            if victim is not None:
                return victim
    return None
