"""How namespaces are treated: priority, time to live, limits of their own. And the walk that carries it out.

What changes for many blocks at once, or ends with time, is done by walking through a namespace shard by shard, a part
at a time: the engine's lock is held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvstore.core.block import COLD, NORMAL, PINNED, SHARDS, WARM, Block, Namespace
from kvstore.core.own import OwnOrder
from kvstore.core.residency import Residency
from kvstore.core.slots import SlotState

_CHANGES = 128  # blocks that change at a time: a millisecond or two
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
    """Through the shards of one namespace."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.shard = 0
        self.due = 0.0  # shards
        self.age: _Age | None = None
        self.path: Block | None = None  # where the last part stopped on its way up a prefix whose time is over


class TermsKeeper:
    """Keeps the terms of all namespaces. Call `tick` about once a second, and `step` until nothing is due."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._walks: dict[Namespace, _Walk] = {}
        self._ticked_s: float | None = None
        self.expired = 0  # blocks that outlived their time

    def set(self, namespace: Namespace, terms: Terms) -> None:
        """Treat the namespace like this from now on. What it holds already follows within seconds."""
        walk = self._walks.setdefault(namespace, _Walk(namespace))
        changed = namespace.level != terms.level
        namespace.level = terms.level
        if walk.age is None or walk.age.ttl_s != terms.ttl_s:
            walk.age = _Age(terms.ttl_s) if terms.ttl_s else None
        for tier in (WARM, COLD):
            changed |= self._limit(namespace, tier, terms.limits.get(tier, 0))
        if changed:
            walk.shard, walk.due = 0, SHARDS
        self._dismiss(walk)

    def _limit(self, namespace: Namespace, tier: int, limit: int) -> bool:
        """Returns whether blocks that are there already are concerned."""
        limits = self._residency.budgets[tier].namespace_limits
        if limits.get(namespace, 0) == limit:
            return False
        if not limit:
            del limits[namespace], namespace.own[tier]
            return False
        limits[namespace] = limit
        if tier not in namespace.own:
            namespace.own[tier] = OwnOrder(namespace, tier)
            if not namespace.blocks:
                namespace.own[tier].enter(SHARDS)
        return True

    def tick(self, now_s: float) -> None:
        """Time has passed."""
        passed_s = now_s - (now_s if self._ticked_s is None else self._ticked_s)
        self._ticked_s = now_s
        for walk in self._walks.values():
            if walk.age is not None:
                walk.age.note(now_s, self._residency.clock)
                walk.due = min(SHARDS, walk.due + passed_s * _ROUNDS * SHARDS / walk.age.ttl_s)

    def step(self, now_s: float) -> bool:
        """Go on with what is due; whether there is more."""
        walk = next((walk for walk in self._walks.values() if walk.due >= 1), None)
        if walk is None:
            return False
        over = walk.age.last_over(now_s) if walk.age is not None else -1
        left = self._expire(walk, walk.path, over, _CHANGES)
        if walk.shard < SHARDS:
            if self._look(walk, over, left):
                walk.shard += 1
                walk.due -= 1
        elif self._shrink(walk.namespace, left):
            walk.shard = 0
        if walk.shard == SHARDS:
            walk.due = max(walk.due, 1.0)  # what is over a limit is still to go
        self._dismiss(walk)
        return True

    def _look(self, walk: _Walk, over: int, left: int) -> bool:
        """Look at the blocks of a shard; whether it is done with."""
        namespace = walk.namespace
        for own in namespace.own.values():
            own.enter(walk.shard + 1)
        for block in list(namespace.blocks.shards[walk.shard].values()):
            if left <= 0:
                return False
            if block.level not in (namespace.level, PINNED):
                self._residency.orders.set_level(block, namespace.level)
                left -= 1
            elif block.touched <= over:
                left = self._expire(walk, block, over, left)
        return left > 0

    def _expire(self, walk: _Walk, block: Block | None, over: int, left: int) -> int:
        """Drop a block whose time is over, and what it hung on, as far as nothing else hangs on that.

        Returns how many changes are left.
        """
        while left > 0 and block is not None and self._is_over(block, over):
            above = block.parent
            self._residency.forget(block)
            self.expired += 1
            left -= 1
            block = above
        walk.path = block if left <= 0 else None
        return left

    def _is_over(self, block: Block, over: int) -> bool:
        if block.touched > over or block.below is not None or not block.copies:
            return False
        if block.level == PINNED or block.saving:
            return False
        slot = block.slot
        return slot is None or (slot.state is SlotState.READY and not slot.pins)

    def _shrink(self, namespace: Namespace, left: int) -> bool:
        """Evict what is over a limit; whether no more can go."""
        for tier in namespace.own:
            while self._residency.budgets[tier].over_namespace_limit(namespace, 0):
                if left <= 0:
                    return False
                if not self._residency.evict_own(namespace, tier):
                    break
                left -= 1
        return True

    def _dismiss(self, walk: _Walk) -> None:
        if walk.age is None and walk.due < 1:
            self._walks.pop(walk.namespace, None)


def pin(residency: Residency, block: Block, pinned: bool) -> None:
    """Have a block leave last, and with it the prefix that it ends; or as any other again."""
    residency.orders.set_level(block, PINNED if pinned else block.namespace.level)
    if pinned and block.spare & WARM:
        if block.copies & WARM:
            residency.settle_warm(block)
        else:
            residency.set_leaving(block, leaving=False)
