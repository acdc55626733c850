"""What every eviction policy must do, whatever its order. A new policy is one more entry in POLICIES."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from core_world import PAGE, TENANT, key
from kvstore.core import adaptive
from kvstore.core.adaptive import Adaptive
from kvstore.core.block import COLD, HOT, WARM, Block, Namespace
from kvstore.core.leaf_lru import LeafLru
from kvstore.core.policy import EvictionPolicy, PolicyFactory
from kvstore.core.shadows import Candidate
from kvstore.replay.rivals import Arc, Lru2, S3Fifo


class Side:
    """A policy and its caller, who keeps to the call sequence of kvstore.core.policy and to nothing more."""

    def __init__(self, make: PolicyFactory, tier: int) -> None:
        self.tier = tier
        self.policy = make(tier, tier)
        self.space = Namespace(key("ns"), TENANT, PAGE, PAGE, 16, chain=True)
        self.blocks: list[Block] = []
        self.pinned: set[Block] = set()
        self.clock = count(1)

    def allowed(self, block: Block) -> bool:
        return block not in self.pinned

    def number(self, block: Block | None) -> int | None:
        return None if block is None else self.blocks.index(block)

    def held(self) -> list[int]:
        return [i for i, block in enumerate(self.blocks) if block.copies & self.tier]

    def leaves(self) -> list[int]:
        """Blocks with a copy here, and no child with one."""
        held = {self.blocks[i] for i in self.held()}
        return [i for i in self.held() if not any(child in held for child in self.blocks[i].children())]

    def free(self) -> list[int]:
        """Those of them that may leave."""
        return [i for i in self.leaves() if self.allowed(self.blocks[i])]

    def insert(self, parent: int | None) -> None:
        block = Block(self.space, key(len(self.blocks)), None if parent is None else self.blocks[parent])
        self.blocks.append(block)
        self.policy.refer(self.space, block.key)
        block.touched = next(self.clock)
        self.gain(len(self.blocks) - 1)

    def gain(self, i: int) -> None:
        self.blocks[i].copies |= self.tier
        self.policy.insert(self.blocks[i])

    def touch(self, i: int) -> None:
        self.policy.refer(self.space, self.blocks[i].key)
        self.blocks[i].touched = next(self.clock)
        self.blocks[i].reused = True
        self.policy.touch(self.blocks[i])

    def pin(self, i: int) -> None:
        self.pinned.add(self.blocks[i])

    def unpin(self, i: int) -> None:
        self.pinned.discard(self.blocks[i])
        self.policy.offer(self.blocks[i])

    def orphan(self, i: int) -> None:
        """As Residency.first_out does it."""
        self.blocks[i].touched = self.blocks[i].queued = 0
        self.policy.offer(self.blocks[i])

    def drop(self, i: int) -> None:
        """A copy goes, for whatever reason."""
        self.blocks[i].copies &= ~self.tier
        self.pinned.discard(self.blocks[i])
        self.policy.remove(self.blocks[i])

    def victim(self) -> int | None:
        return self.number(self.policy.victim(self.allowed))


@dataclass(frozen=True)
class Case:
    """A policy, and where it has one, the rule that says which of the leaves that may leave is next."""

    name: str
    make: PolicyFactory
    next_stamp: Callable[[Iterable[int]], int] | None = None


@dataclass(frozen=True)
class Fixed:
    """Makes an adaptive order that has one candidate to follow."""

    candidate: Candidate

    def __call__(self, tier: int, mark: int) -> EvictionPolicy:
        return Adaptive(tier, mark, (self.candidate,))


# For leaf-first LRU: the oldest stamp, where an ancestor has the stamp of the latest use below it that has left.
DAEMON = [
    Case("leaf_lru", LeafLru, min),
    Case("adaptive", Adaptive),
    *(Case(f"adaptive, candidate {i}", Fixed(one)) for i, one in enumerate(adaptive.CANDIDATES)),
]
# Those that replay compares with rotate their queues when they are asked.
POLICIES = [*DAEMON, Case("lru_2", Lru2), Case("s3_fifo", S3Fifo), Case("arc", Arc)]

cases = pytest.mark.parametrize("case", POLICIES, ids=lambda case: case.name)
tiers = pytest.mark.parametrize("tier", [HOT, WARM, COLD])
choice = st.integers(0, 10**6)


class PolicyMachine(RuleBasedStateMachine):
    """Two of the same policy see the same calls; a naive caller says which answers are right."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.sides = [Side(case.make, WARM) for _ in range(2)]
        self.side = self.sides[0]
        self.stamps: dict[int, int] = {}  # the oracle's own, by block
        self.now = count(1)

    @initialize()
    def plant(self) -> None:
        self.insert(0, root=True)

    def pick(self, which: int, among: list[int]) -> int:
        return among[which % len(among)]

    @rule(which=choice, root=st.booleans())
    def insert(self, which: int, root: bool) -> None:
        parent = None if root or not self.side.blocks else which % len(self.side.blocks)
        for side in self.sides:
            side.insert(parent)
        self.stamps[len(self.side.blocks) - 1] = next(self.now)

    @precondition(lambda self: self.side.held())
    @rule(which=choice)
    def touch(self, which: int) -> None:
        chosen = self.pick(which, self.side.held())
        for side in self.sides:
            side.touch(chosen)
        self.stamps[chosen] = next(self.now)

    @precondition(lambda self: self.side.held())
    @rule(which=choice)
    def pin(self, which: int) -> None:
        for side in self.sides:
            side.pin(self.pick(which, side.held()))

    @precondition(lambda self: self.side.pinned)
    @rule(which=choice)
    def unpin(self, which: int) -> None:
        chosen = self.pick(which, sorted(self.side.blocks.index(block) for block in self.side.pinned))
        for side in self.sides:
            side.unpin(chosen)

    @precondition(lambda self: self.side.held())
    @rule(which=choice)
    def orphan(self, which: int) -> None:
        chosen = self.pick(which, self.side.held())
        for side in self.sides:
            side.orphan(chosen)
        self.stamps[chosen] = 0

    @precondition(lambda self: self.side.held())
    @rule(which=choice)
    def drop_any(self, which: int) -> None:
        self.drop(self.pick(which, self.side.held()))

    @precondition(lambda self: len(self.side.held()) < len(self.side.blocks))
    @rule(which=choice)
    def gain_again(self, which: int) -> None:
        chosen = self.pick(which, sorted(set(range(len(self.side.blocks))) - set(self.side.held())))
        for side in self.sides:
            side.gain(chosen)

    @rule()
    def evict(self) -> None:
        victim = self.check_victim()
        if victim is not None:
            self.drop(victim)

    def drop(self, chosen: int) -> None:
        for side in self.sides:
            side.drop(chosen)
        parent = self.side.number(self.side.blocks[chosen].parent)
        if parent is not None:
            self.stamps[parent] = max(self.stamps[parent], self.stamps[chosen])

    def check_victim(self) -> int | None:
        free, victim = self.side.free(), self.side.victim()
        assert self.sides[1].victim() == victim, "the same calls, another victim"
        assert (victim is None) == (not free), "something may leave if and only if there is a victim"
        if victim is not None:
            assert victim in free, "a victim is a leaf of its tier that may leave"
            assert self.side.victim() == self.sides[1].victim() == victim, "asking is no step"
            if self.case.next_stamp is not None:
                assert self.stamps[victim] == self.case.next_stamp(self.stamps[i] for i in free)
        return victim

    @invariant()
    def orphans_are_next(self) -> None:
        if any(self.stamps[i] == 0 for i in self.side.free()):
            victim = self.check_victim()
            assert victim is not None and self.stamps[victim] == 0

    def teardown(self) -> None:
        """Without pins everything is returned in the end, children before parents."""
        for i, block in enumerate(self.side.blocks):
            if block in self.side.pinned:
                for side in self.sides:
                    side.unpin(i)
        left = len(self.side.held())
        for _ in range(left):
            victim = self.check_victim()
            assert victim is not None
            self.drop(victim)
        assert self.check_victim() is None


@cases
def test_any_calls_against_a_naive_caller(case: Case) -> None:
    run_state_machine_as_test(lambda: PolicyMachine(case), settings=settings(stateful_step_count=50, max_examples=150))


@cases
@tiers
def test_it_orders_one_tier_only(case: Case, tier: int) -> None:
    side = Side(case.make, tier)
    side.insert(None)
    other = Block(side.space, key("elsewhere"), side.blocks[0])
    other.copies = (HOT | WARM | COLD) & ~tier
    side.policy.offer(other)
    assert side.victim() == 0  # a child with a copy elsewhere does not keep it
    side.drop(0)
    assert side.victim() is None


@cases
@tiers
def test_orders_of_different_tiers_share_blocks(case: Case, tier: int) -> None:
    space = Namespace(key("ns"), TENANT, PAGE, PAGE, 16, chain=True)
    orders = {each: case.make(each, each) for each in (HOT, WARM, COLD)}
    blocks: list[Block] = []
    for i in range(4):
        block = Block(space, key(i), blocks[-1] if blocks else None)
        block.copies = HOT | WARM | COLD
        block.touched = i + 1
        for order in orders.values():
            order.insert(block)
            order.touch(block)
        blocks.append(block)
    blocks[3].copies &= ~tier
    orders[tier].remove(blocks[3])
    for each, order in orders.items():
        assert order.victim(lambda block: True) is blocks[2 if each == tier else 3]


@cases
def test_a_long_chain_leaves_from_its_end(case: Case) -> None:
    side = Side(case.make, WARM)
    for i in range(2000):
        side.insert(i - 1 if i else None)
    for i in reversed(range(2000)):
        assert side.victim() == i
        side.drop(i)


@cases
def test_a_wide_tree_is_returned_whole(case: Case) -> None:
    side = Side(case.make, WARM)
    side.insert(None)
    for _ in range(500):
        side.insert(0)
    seen = []
    while (victim := side.victim()) is not None:
        seen.append(victim)
        side.drop(victim)
    assert sorted(seen) == list(range(501)) and seen[-1] == 0


@pytest.mark.parametrize("case", DAEMON, ids=lambda case: case.name)
def test_asking_while_nothing_may_leave_costs_nobody_their_place(case: Case) -> None:
    side = Side(case.make, WARM)
    for _ in range(20):
        side.insert(None)
    for i in range(20):
        side.pin(i)
    for _ in range(3):
        assert side.victim() is None
    for i in range(20):
        side.unpin(i)
    twin = Side(case.make, WARM)
    for _ in range(20):
        twin.insert(None)
    for _ in range(20):
        victim = side.victim()
        assert victim is not None and twin.victim() == victim
        side.drop(victim)
        twin.drop(victim)
