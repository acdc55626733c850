"""How namespaces are treated: priority, time to live, limits of their own. And the walk that carries it out.

What changes for many blocks at once, or ends with time, is done by walking through a namespace shard by shard, a part
at a time: the engine's lock is held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvstore.core.block import COLD, NORMAL, OWN, PINNED, SHARDS, WARM, Block, Namespace, standing_of
from kvstore.core.residency import Residency
from kvstore.core.slots import SlotState

_CHANGES = 128  # blocks that change at a time: a millisecond or two
_LOOKS = 4096  # blocks that are looked at
_PRECISION = 64  # of a time to live: when blocks were used is noted to this part of it
_ROUNDS = 16  # walks through a namespace in a time to live


@dataclass(frozen=True, slots=True)
class Terms:
    """How a namespace is treated.

    Attributes:
        level: of its blocks: LOW, NORMAL or HIGH.
        ttl_s: blocks go that were not used for so long; 0: never.
        limits: bytes that it may hold, {WARM or COLD: bytes}; one that is not named is its tenant's.
    """

    level: int = NORMAL
    ttl_s: float = 0.0
    limits: Mapping[int, int] = field(default_factory=dict)


class _Age:
    """Which stamps are older than a time to live."""

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self._noted: deque[tuple[float, int]] = deque()  # when, and the clock of references then

    def note(self, now_s: float, clock: int) -> None:
        """The clock stands there now."""
        if not self._noted or now_s - self._noted[-1][0] >= self.ttl_s / _PRECISION:
            self._noted.append((now_s, clock))
        while len(self._noted) > 1 and self._noted[1][0] <= now_s - self.ttl_s:
            self._noted.popleft()

    def last_over(self, now_s: float) -> int:
        """Stamps up to this one have outlived it; -1: none."""
        if not self._noted or self._noted[0][0] > now_s - self.ttl_s:
            return -1
        return self._noted[0][1]


class _Walk:
    """Through the shards of one namespace, over and over."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.shard = 0
        self.due = 0.0  # shards
        self.moving = False  # not all blocks stand where they should yet
        self.age: _Age | None = None
        self.path: Block | None = None  # where the last part stopped on its way up a prefix whose time is over


class TermsKeeper:
    """Keeps the terms of all namespaces. Call `tick` about once a second, and `step` until nothing is due."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._walks: dict[Namespace, _Walk] = {}
        self._over: dict[Namespace, None] = {}  # that hold more than a limit of their own
        self._ticked_s: float | None = None
        self.expired = 0  # blocks that outlived their time

    def set(self, namespace: Namespace, terms: Terms) -> None:
        """Treat the namespace like this from now on. What it holds already follows, in parts."""
        limits = {tier: limit for tier, limit in terms.limits.items() if limit}
        for tier in (WARM, COLD):
            self._residency.budgets[tier].namespace_limits.pop(namespace, None)
            if tier in limits:
                self._residency.budgets[tier].namespace_limits[namespace] = limits[tier]
        walk = self._walks.setdefault(namespace, _Walk(namespace))
        standing = standing_of(terms.level, bool(limits))
        if namespace.standing != standing:
            namespace.standing = standing
            walk.moving, walk.shard, walk.due = True, 0, SHARDS
        if not terms.ttl_s:
            walk.age = None
        elif walk.age is None:
            walk.age = _Age(terms.ttl_s)
        else:  # what was noted stays true
            walk.age.ttl_s = terms.ttl_s
        self._dismiss(walk)

    def tick(self, now_s: float) -> None:
        """Time has passed."""
        passed_s = now_s - (now_s if self._ticked_s is None else self._ticked_s)
        self._ticked_s = now_s
        for walk in self._walks.values():
            if walk.age is not None:
                walk.age.note(now_s, self._residency.clock)
                walk.due = min(SHARDS, walk.due + passed_s * _ROUNDS * SHARDS / walk.age.ttl_s)
        for tier in (WARM, COLD):
            budget = self._residency.budgets[tier]
            self._over.update((one, None) for one in budget.namespace_limits if budget.over_namespace_limit(one, 0))

    def step(self, now_s: float) -> bool:
        """Go on with what is due, for a millisecond or two; whether there may be more."""
        namespace = next((one for one in self._over if not self._is_moving(one)), None)
        if namespace is not None:
            del self._over[namespace]
            if self._shrink(namespace):
                self._over[namespace] = None  # behind the others
            return True
        walk = next((walk for walk in self._walks.values() if walk.due >= 1), None)
        if walk is None:
            return False
        self._walks[walk.namespace] = self._walks.pop(walk.namespace)  # behind the others
        over = walk.age.last_over(now_s) if walk.age is not None else -1
        looks, changes = _LOOKS, self._expire(walk, walk.path, over, _CHANGES)
        while looks > 0 and changes > 0 and walk.due >= 1:
            shard = list(walk.namespace.blocks.shards[walk.shard].values())
            looks -= 1 + len(shard)
            changes = self._look(walk, shard, over, changes)
            if changes > 0:
                self._advance(walk)
        self._dismiss(walk)
        return True

    def _is_moving(self, namespace: Namespace) -> bool:
        walk = self._walks.get(namespace)
        return walk is not None and walk.moving

    def _advance(self, walk: _Walk) -> None:
        """A shard is done with."""
        walk.due -= 1
        walk.shard = (walk.shard + 1) % SHARDS
        if walk.shard == 0:
            walk.moving = False

    def _look(self, walk: _Walk, shard: list[Block], over: int, changes: int) -> int:
        """Look at some blocks; returns how many changes are left, 0 where there was no end."""
        standing = walk.namespace.standing
        pinned = standing_of(PINNED, bool(standing & OWN))
        for block in shard:
            if changes <= 0:
                return 0
            wanted = pinned if block.level == PINNED else standing
            if block.standing != wanted:
                self._residency.orders.set_standing(block, wanted)
                changes -= 1
            elif block.touched <= over:
                changes = self._expire(walk, block, over, changes)
        return changes

    def _expire(self, walk: _Walk, block: Block | None, over: int, changes: int) -> int:
        """Drop a block whose time is over, and what it hung on, as far as nothing else hangs on that.

        Returns how many changes are left.
        """
        while changes > 0 and block is not None and self._is_over(block, over):
            above = block.parent
            self._residency.forget(block)
            self.expired += 1
            changes -= 1
            block = above
        walk.path = block if changes <= 0 else None
        return changes

    def _is_over(self, block: Block, over: int) -> bool:
        if block.touched > over or block.below is not None or not block.copies:
            return False
        if not block.touched and not block.orphan:  # found again since: nobody knows when it was used
            self._residency.stamp(block)
            return False
        if block.level == PINNED or block.saving:
            return False
        slot = block.slot
        return slot is None or (slot.state is SlotState.READY and not slot.pins)

    def _shrink(self, namespace: Namespace) -> bool:
        """Evict what is over a limit, after it was saved where it can be; whether there is more to do at once."""
        for tier in (WARM, COLD):
            budget = self._residency.budgets[tier]
            for _ in range(_CHANGES):
                if not budget.over_namespace_limit(namespace, 0) or not self._evict_own(namespace, tier):
                    break
            else:
                return True
        return False

    def _evict_own(self, namespace: Namespace, tier: int) -> bool:
        residency = self._residency
        if tier == COLD:
            block = residency.oldest_below(COLD, namespace)
            if block is not None:
                residency.evict_below(block, COLD)
            return block is not None
        block = residency.orders.own_victim(namespace, WARM, residency.may_leave_warm)
        if block is None or (residency.up[COLD] and block in residency.dirty):
            return False  # the saver comes first
        residency.evict_warm(block)
        return True

    def _dismiss(self, walk: _Walk) -> None:
        if walk.age is None and not walk.moving:
            self._walks.pop(walk.namespace, None)


def pin(residency: Residency, block: Block, pinned: bool) -> None:
    """Have a block leave last, and with it the prefix that it ends; or as any other again."""
    standing = block.namespace.standing
    residency.orders.set_standing(block, standing_of(PINNED, bool(standing & OWN)) if pinned else standing)
    if pinned and block.spare & WARM:
        if block.copies & WARM:
            residency.settle_warm(block)
        else:
            residency.set_leaving(block, leaving=False)
