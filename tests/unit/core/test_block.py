"""The record of a block: its place among parents, children and siblings."""

from __future__ import annotations

import random
from collections import Counter

from core_world import PAGE, chain, key
from kvstore.core.block import COLD, HOT, WARM, Block, Copies, Namespace


def namespace() -> Namespace:
    return Namespace(key("ns"), "tenant", PAGE, PAGE, 16, chain=True)


def block(name: object, parent: Block | None = None) -> Block:
    return Block(parent.namespace if parent is not None else namespace(), key(name), parent)


def test_a_new_block_has_nothing() -> None:
    fresh = block("a")
    assert (fresh.copies, fresh.slot, fresh.depth, fresh.parent) == (0, None, 0, None)
    assert not fresh.present and not fresh.saving and not fresh.orphan
    assert list(fresh.children()) == []
    assert fresh.subtree() == [fresh]


def test_tier_numbers_are_those_of_the_flags() -> None:
    assert [Copies(HOT), Copies(WARM), Copies(COLD)] == [Copies.HOT, Copies.WARM, Copies.COLD]
    assert sum(Copies) == HOT | WARM | COLD


def test_depth_counts_from_the_root() -> None:
    last = block(0)
    for i in range(1, 5):
        last = block(i, last)
        assert last.depth == i
    assert last.top.depth == 0


def test_children_come_newest_first() -> None:
    parent = block("parent")
    children = [block(i, parent) for i in range(4)]
    assert list(parent.children()) == children[::-1]


def test_a_child_may_be_unlinked_while_its_parent_is_walked() -> None:
    parent = block("parent")
    children = [block(i, parent) for i in range(5)]
    seen = []
    for child in parent.children():
        seen.append(child)
        child.unlink()
    assert seen == children[::-1]
    assert parent.first_child is None


def test_unlinking_any_child_leaves_the_others_in_order() -> None:
    order = random.Random(7)
    for _ in range(20):
        parent = block("parent")
        left = [block(i, parent) for i in range(6)]
        while left:
            gone = left.pop(order.randrange(len(left)))
            gone.unlink()
            assert list(parent.children()) == left[::-1]
            assert gone.parent is None


def test_unlinking_what_has_no_parent_changes_nothing() -> None:
    alone = block("alone")
    alone.unlink()
    assert alone.parent is None


def test_a_subtree_lists_parents_before_children() -> None:
    root = block("root")
    for _ in range(2):
        middle = block("middle", root)
        for _ in range(2):
            block("leaf", middle)
    found = root.subtree()
    assert len(found) == 7
    for i, each in enumerate(found[1:], 1):
        assert each.parent in found[:i]


def test_a_deep_subtree_does_not_recurse() -> None:
    root = last = block("root")
    for name in chain(5000):
        last = block(name, last)
    assert len(root.subtree()) == 5001


def test_copies_are_counted_from_a_block_up() -> None:
    last = block("root")
    held = [WARM, WARM, COLD, WARM, WARM | COLD, WARM | COLD, 0]
    last.copies = held[0]
    for i, copies in enumerate(held[1:]):
        last = block(i, last)
        last.copies = copies
    for count in range(1, len(held) + 1):
        assert last.copies_above(count) == Counter(held[-count:])
    assert last.copies_above(99) == Counter(held), "as many as there are"


def test_an_orphan_and_a_hole_are_not_present() -> None:
    held = block("a")
    held.copies = WARM
    assert held.present
    held.orphan = True
    assert not held.present
    held.orphan, held.copies = False, 0
    assert not held.present


def test_a_block_keeps_the_epoch_it_was_made_in() -> None:
    home = namespace()
    old = Block(home, key("a"), None)
    home.epoch += 1
    assert (old.epoch, Block(home, key("a"), None).epoch) == (0, 1)
