"""The index: binary search against a walk, holes and orphans, restarts in any order, clearing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_world import PAGE, TENANT, chain, key, packed
from kvstore.core.block import COLD, WARM, Block, Namespace
from kvstore.core.index import Index, split_keys


class Shelf:
    """An index with one namespace whose blocks gain and lose a copy at once."""

    def __init__(self, chained: bool = True) -> None:
        self.orphaned: list[bytes] = []
        self.childless: list[bytes] = []
        self.index = Index(
            lambda block: self.orphaned.append(block.key), lambda block: self.childless.append(block.key)
        )
        self.space = Namespace(key("ns"), TENANT, PAGE, PAGE, 16, chained)
        self.index.namespaces[self.space.digest] = self.space

    def store(self, name: bytes, parent: bytes = b"") -> Block | None:
        block = self.index.insert(self.space, name, parent)
        if block is not None:
            block.copies |= WARM
        return block

    def store_chain(self, keys: list[bytes], parent: bytes = b"") -> None:
        for name in keys:
            assert self.store(name, parent) is not None
            parent = name

    def lose(self, name: bytes) -> None:
        block = self.space.blocks[name]
        block.copies = 0
        self.index.lost(block)

    def prefix(self, keys: list[bytes]) -> int:
        found = self.index.prefix(self.space, packed(keys))
        blocks = self.index.prefix_blocks(self.space, packed(keys))
        assert [block.key for block in blocks] == keys[:found]
        return found

    def present(self, keys: list[bytes]) -> list[bool]:
        return [self.index.find(self.space, name) is not None for name in keys]


def walk(shelf: Shelf, keys: list[bytes]) -> int:
    """The longest stored prefix, looked up key by key."""
    above: Block | None = None
    for i, name in enumerate(keys):
        block = shelf.space.blocks.get(name)
        if block is None or not block.present or (shelf.space.chain and above and block.parent is not above):
            return i
        above = block
    return len(keys)


# -- the longest prefix ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [0, 1, 2, 3, 7, 64, 100])
@pytest.mark.parametrize("stored", [0, 1, 2, 3, 6, 7, 8, 63, 64, 65])
def test_binary_search_finds_the_longest_stored_prefix(stored: int, asked: int) -> None:
    shelf = Shelf()
    shelf.store_chain(chain(stored))
    assert shelf.prefix(chain(asked)) == min(stored, asked)


def test_it_looks_at_few_keys() -> None:
    shelf = Shelf()
    shelf.store_chain(chain(4096))
    looked: list[bytes] = []
    find = shelf.index.find
    shelf.index.find = lambda space, name: (looked.append(name), find(space, name))[1]  # type: ignore[method-assign]
    assert shelf.index.prefix(shelf.space, packed(chain(8192))) == 4096
    assert len(looked) <= 15


def test_keys_may_start_in_the_middle_of_a_prefix() -> None:
    shelf = Shelf()
    shelf.store_chain(chain(20))
    assert shelf.prefix(chain(30)[7:]) == 13


def test_branches_share_their_root() -> None:
    shelf = Shelf()
    trunk = chain(5)
    shelf.store_chain(trunk)
    shelf.store_chain(chain(4, "left"), trunk[-1])
    shelf.store_chain(chain(2, "right"), trunk[-1])
    assert shelf.prefix(trunk + chain(9, "left")) == 9
    assert shelf.prefix(trunk + chain(9, "right")) == 7
    assert shelf.prefix(trunk + chain(9, "other")) == 5


def test_keys_that_are_not_one_chain_count_as_far_as_they_are_one() -> None:
    shelf = Shelf()
    shelf.store_chain(chain(8))
    shelf.store_chain(chain(8, "b"))
    a, b, absent = chain(8), chain(8, "b"), key("absent")
    cases = [
        ([a[0], absent, a[2], a[3]], 1),  # both probes of the search hit, and the depths fit
        ([a[0], b[1], a[2], a[3]], 1),
        ([a[0], a[1], b[2], b[3]], 2),
        ([a[0], a[0], a[0]], 1),
        ([a[1], a[0]], 1),
        ([a[0], b[0]], 1),
        ([a[0], a[2]], 1),
        ([absent, a[1]], 0),
    ]
    for keys, expected in cases:
        blocks = shelf.index.prefix_blocks(shelf.space, packed(keys))
        assert [block.key for block in blocks] == keys[:expected]


def test_a_search_whose_depths_do_not_fit_walks() -> None:
    shelf = Shelf()
    shelf.store_chain(chain(8))
    shelf.store_chain(chain(8, "b"))
    assert shelf.index.prefix(shelf.space, packed([chain(1)[0], chain(1, "b")[0]])) == 1
    assert shelf.index.prefix(shelf.space, packed([chain(1)[0], chain(3)[2]])) == 1


@given(st.data())
def test_any_keys_against_a_walk(data: st.DataObject) -> None:
    shelf = Shelf()
    names = ["a", "b"]
    for name in names:
        shelf.store_chain(chain(data.draw(st.integers(0, 9)), name))
    pool = [key for name in names for key in chain(10, name)]
    for _ in range(data.draw(st.integers(0, 3))):
        name = data.draw(st.sampled_from(pool))
        if name in shelf.space.blocks and shelf.space.blocks[name].copies:
            shelf.lose(name)
    for name in names:
        assert shelf.prefix(chain(10, name)) == walk(shelf, chain(10, name))
    mixed = data.draw(st.lists(st.sampled_from(pool), max_size=12))
    found = walk(shelf, mixed)
    assert [block.key for block in shelf.index.prefix_blocks(shelf.space, packed(mixed))] == mixed[:found]
    assert shelf.index.prefix(shelf.space, packed(mixed)) >= found


# -- sets -----------------------------------------------------------------------------------------------------


def test_blocks_of_a_set_do_not_hang_together() -> None:
    shelf = Shelf(chained=False)
    keys = chain(4)
    for name in (keys[0], keys[2], keys[3]):
        block = shelf.store(name, keys[1])
        assert block is not None and block.parent is None
    assert shelf.present(keys) == [True, False, True, True]
    assert shelf.prefix(keys) == 1
    assert shelf.prefix(keys[2:]) == 2
    shelf.lose(keys[2])
    assert shelf.present(keys) == [True, False, False, True]


def test_a_set_takes_a_key_twice() -> None:
    shelf = Shelf(chained=False)
    shelf.store(key("a"))
    assert shelf.prefix([key("a"), key("a")]) == 2


# -- insert ---------------------------------------------------------------------------------------------------


def test_a_block_whose_parent_is_not_stored_is_not_inserted() -> None:
    shelf = Shelf()
    assert shelf.store(key("child"), key("parent")) is None
    assert not shelf.space.blocks


def test_a_block_is_not_inserted_under_an_orphan_or_a_hole() -> None:
    shelf = Shelf()
    keys = chain(4)
    shelf.store_chain(keys[:3])
    shelf.lose(keys[1])
    assert shelf.store(keys[3], keys[2]) is None
    assert shelf.store(key("other"), keys[1]) is None


# -- holes and orphans ----------------------------------------------------------------------------------------


def test_a_lost_leaf_is_forgotten() -> None:
    shelf = Shelf()
    shelf.store_chain(chain(3))
    shelf.lose(chain(3)[2])
    assert set(shelf.space.blocks) == set(chain(2))
    assert shelf.index.orphans == 0


def test_below_a_lost_parent_all_is_absent() -> None:
    shelf = Shelf()
    keys = chain(5)
    shelf.store_chain(keys)
    shelf.lose(keys[1])
    assert shelf.present(keys) == [True, False, False, False, False]
    assert shelf.prefix(keys) == 1
    assert shelf.prefix(keys[2:]) == 0
    assert shelf.index.orphans == 3
    assert set(shelf.orphaned) == set(keys[2:])


def test_orphans_are_found_again_when_the_parent_is_stored() -> None:
    shelf = Shelf()
    keys = chain(5)
    shelf.store_chain(keys)
    shelf.lose(keys[1])
    assert shelf.store(keys[1], keys[0]) is not None
    assert shelf.present(keys) == [True] * 5
    assert shelf.prefix(keys) == 5
    assert shelf.index.orphans == 0


def test_two_holes_must_both_be_filled() -> None:
    shelf = Shelf()
    keys = chain(6)
    shelf.store_chain(keys)
    shelf.lose(keys[3])
    shelf.lose(keys[1])
    assert shelf.index.orphans == 4  # the lower hole is one too
    assert shelf.store(keys[3], keys[2]) is None
    shelf.store(keys[1], keys[0])
    assert shelf.present(keys) == [True, True, True, False, False, False]
    assert shelf.index.orphans == 2
    shelf.store(keys[3], keys[2])
    assert shelf.prefix(keys) == 6


def test_a_hole_goes_with_its_last_child() -> None:
    shelf = Shelf()
    keys = chain(4)
    shelf.store_chain(keys)
    shelf.lose(keys[1])
    shelf.lose(keys[2])
    assert set(shelf.space.blocks) == set(keys)
    shelf.lose(keys[3])
    assert set(shelf.space.blocks) == {keys[0]}
    assert shelf.index.orphans == 0


def test_the_parent_is_told_when_its_last_child_has_gone() -> None:
    shelf = Shelf()
    keys = chain(4)
    shelf.store_chain(keys)
    other = key("other")
    shelf.store(other, keys[0])
    shelf.lose(keys[2])
    assert shelf.childless == []  # a hole is still there
    shelf.lose(keys[3])
    assert shelf.childless == [keys[1]]
    shelf.lose(keys[1])
    assert shelf.childless == [keys[1]]
    shelf.lose(other)
    assert shelf.childless == [keys[1], keys[0]]


def test_losing_every_block_of_a_tree_from_the_root_walks_each_edge_once() -> None:
    shelf = Shelf()
    keys = chain(3000)
    shelf.store_chain(keys)
    for name in keys:
        shelf.lose(name)
    assert shelf.orphaned == keys[1:]  # each was told once
    assert (len(shelf.space.blocks), shelf.index.orphans) == (0, 0)


def test_a_hole_may_be_filled_under_another_parent() -> None:
    """A caller that names its parents wrongly must not end up with a stored block under a hole."""
    shelf = Shelf()
    keys = chain(4)
    shelf.store_chain(keys)
    elsewhere = chain(2, "b")
    shelf.store_chain(elsewhere)
    shelf.lose(keys[1])
    shelf.lose(keys[2])
    moved = shelf.store(keys[2], elsewhere[1])
    assert moved is not None
    assert moved.parent is shelf.space.blocks[elsewhere[1]]
    assert keys[1] not in shelf.space.blocks
    assert shelf.childless == [keys[0]]
    assert shelf.prefix([*elsewhere, keys[2], keys[3]]) == 4
    assert shelf.index.orphans == 0
    shelf.lose(keys[2])
    root = shelf.store(keys[2], b"")
    assert root is not None and (root.parent, root.depth) == (None, 0)
    assert shelf.prefix(keys[2:]) == 2
    assert shelf.childless == [keys[0], elsewhere[1]]


# -- restart --------------------------------------------------------------------------------------------------


def recover(shelf: Shelf, records: list[tuple[bytes, bytes]]) -> None:
    for name, parent in records:
        shelf.index.recover(shelf.space, name, parent).copies = COLD
        assert shelf.prefix([name]) in (0, 1)
    shelf.index.settle(shelf.space)


def tree(count: int, seed: int) -> list[tuple[bytes, bytes]]:
    """(key, parent) of a random tree."""
    order = random.Random(seed)
    names = chain(count, f"tree{seed}")
    return [(name, names[order.randrange(i)] if i else b"") for i, name in enumerate(names)]


@pytest.mark.parametrize("seed", range(8))
def test_a_restart_finds_everything_in_any_order(seed: int) -> None:
    records = tree(60, seed)
    random.Random(seed).shuffle(records)
    shelf = Shelf()
    recover(shelf, records)
    assert all(shelf.present([name for name, _ in records]))
    assert (shelf.index.orphans, shelf.orphaned) == (0, [])
    for name, parent in records:
        block = shelf.space.blocks[name]
        assert block.depth == (shelf.space.blocks[parent].depth + 1 if parent else 0)


@pytest.mark.parametrize("seed", range(8))
def test_a_restart_that_lost_blocks_finds_what_is_whole(seed: int) -> None:
    order = random.Random(seed)
    records = tree(60, seed)
    parents = dict(records)
    kept = [record for record in records if order.random() < 0.8]
    stored = {name for name, _ in kept}
    order.shuffle(kept)
    shelf = Shelf()
    recover(shelf, kept)

    def whole(name: bytes) -> bool:
        return not name or (name in stored and whole(parents[name]))

    names = [name for name, _ in records]
    assert shelf.present(names) == [whole(name) for name in names]
    assert set(shelf.orphaned) == {name for name in stored if not whole(name)}
    assert shelf.index.orphans == sum(block.orphan for block in shelf.space.blocks.values())
    for name, parent in records:  # putting everything again heals it
        if not shelf.present([name])[0]:
            assert shelf.store(name, parent) is not None
    assert all(shelf.present(names))
    assert shelf.index.orphans == 0


def test_before_it_is_settled_nothing_below_the_root_is_found() -> None:
    shelf = Shelf()
    for name, parent in zip(chain(3), [b"", *chain(2)], strict=True):
        shelf.index.recover(shelf.space, name, parent).copies = COLD
    assert shelf.present(chain(3)) == [True, False, False]


def test_records_that_name_each_other_as_parent_do_not_make_a_ring() -> None:
    shelf = Shelf()
    a, b, c = chain(3)
    recover(shelf, [(a, b), (b, c), (c, a), (key("own parent"), key("own parent"))])
    assert len(shelf.space.blocks[a].top.subtree()) == 3
    for name in (a, b, c, key("own parent")):
        shelf.lose(name)
    assert not shelf.space.blocks


def test_a_set_is_recovered_without_parents() -> None:
    shelf = Shelf(chained=False)
    recover(shelf, [(name, key("parent")) for name in chain(3)])
    assert all(shelf.present(chain(3)))
    assert len(shelf.space.blocks) == 3


# -- clear ----------------------------------------------------------------------------------------------------


def test_a_clear_starts_an_epoch_and_finds_nothing() -> None:
    shelf = Shelf()
    shelf.store_chain(chain(4))
    gone = shelf.index.detach(shelf.space)
    assert set(gone) == set(chain(4))
    assert (shelf.space.epoch, len(shelf.space.blocks)) == (1, 0)
    assert shelf.prefix(chain(4)) == 0


def test_forgetting_a_cleared_block_leaves_a_newer_one_alone() -> None:
    shelf = Shelf()
    shelf.store_chain(chain(2))
    gone = shelf.index.detach(shelf.space)
    shelf.store_chain(chain(2))
    for name in reversed(chain(2)):
        gone[name].copies = 0
        shelf.index.lost(gone[name])
    assert shelf.prefix(chain(2)) == 2


def test_packed_keys_are_cut_into_keys() -> None:
    assert split_keys(packed(chain(3))) == chain(3)
    assert split_keys(b"") == []
