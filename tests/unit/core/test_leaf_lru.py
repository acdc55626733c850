"""Leaf-first LRU: the order after each step, and the size of its heap."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest

from core_world import PAGE, TENANT, key
from kvstore.core.block import COLD, WARM, Block, Namespace
from kvstore.core.leaf_lru import LeafLru


def anything(block: Block) -> bool:
    return True


class Order:
    """Blocks by name, and the order that they leave in."""

    def __init__(self, tier: int = WARM) -> None:
        self.tier = tier
        self.lru = LeafLru(tier, tier)
        self.clock = count(1)
        self.space = Namespace(key("ns"), TENANT, PAGE, PAGE, 16, chain=True)
        self.blocks: dict[str, Block] = {}

    def add(self, names: str, parent: str = "") -> None:
        """Each letter is a block, the child of the one before."""
        for name in names:
            self.blocks[name] = block = Block(self.space, key(name), self.blocks.get(parent))
            block.copies |= self.tier
            self.lru.insert(block)
            parent = name
            self.touch(name)

    def touch(self, names: str) -> None:
        for name in names:
            self.blocks[name].touched = next(self.clock)
            self.lru.touch(self.blocks[name])

    def drop(self, name: str) -> None:
        block = self.blocks[name]
        block.copies &= ~self.tier
        self.lru.remove(block)

    def victim(self, allowed: Callable[[Block], bool] = anything) -> str:
        block = self.lru.victim(allowed)
        return next((name for name, other in self.blocks.items() if other is block), "")

    def dump(self) -> str:
        """The order in which all would leave."""
        stamps = {name: block.touched for name, block in self.blocks.items()}
        left = ""
        while name := self.victim():
            left += name
            self.drop(name)
        for name in left:  # put everything back as it was
            block = self.blocks[name]
            block.copies |= self.tier
            block.touched = stamps[name]
            self.lru.insert(block)
        return left


def test_the_order_after_each_step() -> None:
    order = Order()
    assert order.dump() == ""
    order.add("abc")
    assert order.dump() == "cba"  # the deepest first, though it is the newest
    order.add("xy")
    assert order.dump() == "cbayx"
    order.touch("c")
    assert order.dump() == "yxcba"
    order.add("d", "b")
    assert order.dump() == "yxcdba"  # b has two children now, and leaves after both
    order.touch("x")
    assert order.dump() == "ycdbax"  # x was used without y, which is now the oldest leaf
    order.drop("c")
    assert order.dump() == "ydbax"
    order.touch("y")
    assert order.dump() == "dbayx"
    order.drop("d")
    order.drop("y")
    assert order.dump() == "bax"


def test_a_touch_of_the_leaf_counts_for_its_ancestors() -> None:
    order = Order()
    order.add("abc")
    order.add("x")
    order.touch("c")
    order.drop("c")
    assert order.dump() == "xba"


def test_an_ancestor_with_a_newer_use_of_its_own_keeps_it() -> None:
    order = Order()
    order.add("ab")
    order.add("x")
    order.touch("a")
    assert order.dump() == "bxa"


def test_a_victim_stays_in_the_order() -> None:
    order = Order()
    order.add("ab")
    assert [order.victim() for _ in range(3)] == ["b", "b", "b"]


def test_what_may_not_leave_is_passed_over_until_it_is_offered() -> None:
    order = Order()
    order.add("a")
    order.add("b")
    assert order.victim(lambda block: block is not order.blocks["a"]) == "b"
    assert order.victim() == "b"  # nobody said that a may leave now
    order.lru.offer(order.blocks["a"])
    assert order.victim() == "a"


def test_nothing_may_leave() -> None:
    order = Order()
    assert order.victim() == ""
    order.add("ab")
    assert order.victim(lambda block: False) == ""
    assert order.victim() == ""
    order.lru.offer(order.blocks["b"])
    assert order.dump() == "ba"


def test_offering_notes_no_use() -> None:
    order = Order()
    order.add("a")
    order.add("b")
    order.lru.offer(order.blocks["a"])
    assert order.dump() == "ab"


def test_only_children_in_the_same_tier_keep_a_block() -> None:
    order = Order(COLD)
    order.add("a")
    child = Block(order.space, key("child"), order.blocks["a"])
    child.copies = WARM
    assert order.victim() == "a"
    child.copies = WARM | COLD
    order.lru.insert(child)
    assert order.lru.victim(anything) is child


def test_moving_a_copy_is_no_use_of_it() -> None:
    order = Order()
    order.add("ab")
    order.add("x")
    order.drop("b")
    order.blocks["b"].copies |= WARM
    order.lru.insert(order.blocks["b"])
    assert order.dump() == "bax"


def test_an_offer_of_what_has_left_is_ignored() -> None:
    order = Order()
    order.add("a")
    order.drop("a")
    order.lru.offer(order.blocks["a"])
    assert order.victim() == ""


@pytest.mark.parametrize("chained", [True, False])
def test_the_heap_stays_in_bound_when_blocks_come_and_go_without_pressure(chained: bool) -> None:
    """Put and clear, again and again: nobody asks for a victim, which is what drops entries."""
    order = Order()
    largest = 0
    for turn in range(50):
        parent = None
        alive = []
        for i in range(200):
            block = Block(order.space, key((turn, i)), parent if chained else None)
            block.copies = WARM
            order.lru.insert(block)
            alive.append(block)
            parent = block
            largest = max(largest, len(order.lru._heap))
        for block in reversed(alive):
            block.copies = 0
            order.lru.remove(block)
            block.unlink()
        assert len(order.lru._heap) <= 256, "entries keep the blocks of a cleared namespace alive"
    assert largest <= 2 * 200 + 257


def test_the_heap_stays_in_bound_under_touches() -> None:
    order = Order()
    order.add("abcdefgh")
    for _ in range(500):
        order.touch("hgfh")
    assert len(order.lru._heap) <= 8


def test_compaction_keeps_the_order() -> None:
    order = Order()
    for name in "abcdefgh":
        order.add(name)
    for turn in range(600):
        block = Block(order.space, key(turn), None)
        block.copies = WARM
        order.lru.insert(block)
        block.copies = 0
        order.lru.remove(block)
    order.touch("a")
    assert order.dump() == "bcdefgha"


def test_a_block_dropped_by_a_compaction_may_come_back() -> None:
    order = Order()
    gone = []
    for turn in range(600):
        block = Block(order.space, key(turn), None)
        block.copies = WARM
        order.lru.insert(block)
        block.copies = 0
        order.lru.remove(block)
        gone.append(block)
    back = gone[0]
    back.copies = WARM
    order.lru.insert(back)
    assert order.lru.victim(anything) is back
