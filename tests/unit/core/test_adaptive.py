"""The adaptive order: who leaves, who is let in, and what it remembers. Each case with a fixed candidate."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from core_world import PAGE, TENANT, World, chain, key, packed, warm_bytes_for
from kvstore.core.adaptive import CANDIDATES, Adaptive
from kvstore.core.block import COLD, WARM, Block, Namespace
from kvstore.core.shadows import FOREVER, Candidate

LRU, TWICE, AGAIN = Candidate(0), Candidate(2), Candidate(FOREVER)
CLOSED = Candidate(FOREVER, closed=True)


def anything(block: Block) -> bool:
    return True


class Order:
    """Blocks by name, and the order that they leave in."""

    def __init__(self, *candidates: Candidate) -> None:
        self.policy = Adaptive(WARM, WARM, candidates)
        self.clock = count(1)
        self.space = Namespace(key("ns"), TENANT, PAGE, PAGE, 16, chain=True)
        self.blocks: dict[str, Block] = {}

    def add(self, names: str, parent: str = "") -> None:
        """Each letter is a block, the child of the one before."""
        for name in names:
            self.blocks[name] = block = Block(self.space, key(name), self.blocks.get(parent))
            self.gain(block)
            parent = name

    def gain(self, block: Block) -> None:
        block.copies |= WARM
        block.touched = next(self.clock)
        self.policy.insert(block)

    def touch(self, names: str) -> None:
        for name in names:
            self.blocks[name].touched = next(self.clock)
            self.blocks[name].reused = True
            self.policy.touch(self.blocks[name])

    def wait(self, references: int) -> None:
        for _ in range(references):
            next(self.clock)

    def victim(self, allowed: Callable[[Block], bool] = anything) -> str:
        block = self.policy.victim(allowed)
        return next((name for name, other in self.blocks.items() if other is block), "")

    def evict(self) -> str:
        name = self.victim()
        if name:
            self.drop(name)
        return name

    def drop(self, name: str) -> None:
        self.blocks[name].copies &= ~WARM
        self.policy.remove(self.blocks[name])

    def empty(self) -> str:
        left = ""
        while name := self.evict():
            left += name
        return left

    def admits(self, name: str) -> bool:
        victim = self.policy.victim(anything)
        assert victim is not None
        return self.policy.admits(self.space, key(name), victim)


def order_of(candidate: Candidate, names: str, touched: str) -> Order:
    order = Order(candidate)
    for name in names:
        order.add(name)
    order.touch(touched)
    return order


def test_without_a_bias_it_is_leaf_first_lru() -> None:
    order = Order(LRU)
    order.add("abc")
    order.add("x")
    order.touch("c")
    order.add("y")
    assert order.empty() == "xcbay"


def test_what_was_used_again_leaves_last() -> None:
    assert order_of(AGAIN, "abcd", "ba").empty() == "cdba"


def test_used_again_counts_as_so_much_younger_and_no_more() -> None:
    order = order_of(TWICE, "ab", "a")  # a at 3, and a capacity of 2: it counts as used at 7
    order.wait(2)
    order.add("c")  # at 6
    assert order.empty() == "bca"
    order = order_of(TWICE, "ab", "a")
    order.wait(40)
    order.add("c")
    assert order.empty() == "bac"


def test_a_use_of_a_leaf_counts_for_its_ancestors() -> None:
    order = Order(AGAIN)
    order.add("abc")
    order.add("x")
    order.touch("c")
    order.add("y")
    assert order.empty() == "xycba"


def test_a_new_block_that_would_be_the_next_to_leave_is_refused_until_it_is_back() -> None:
    order = order_of(AGAIN, "ab", "ab")
    assert not order.admits("n")
    order.policy.refuse(order.space, [key("n")])
    assert order.admits("n")
    assert not order.admits("m")


def test_a_new_block_is_let_in_while_something_was_used_only_once() -> None:
    assert order_of(AGAIN, "ab", "b").admits("n")
    assert order_of(LRU, "ab", "ab").admits("n")


def test_a_closed_order_lets_in_only_what_it_knows() -> None:
    order = order_of(CLOSED, "ab", "b")
    assert not order.admits("n")
    order.policy.refuse(order.space, [key("n")])
    assert order.admits("n")


def test_an_orphan_makes_room_for_anybody_and_leaves_first() -> None:
    order = order_of(CLOSED, "ab", "ab")
    orphan = order.blocks["b"]
    orphan.touched = orphan.queued = 0
    order.policy.offer(orphan)
    assert order.victim() == "b"
    assert order.admits("n")


def test_what_is_back_soon_after_it_left_counts_as_used_again() -> None:
    order = order_of(AGAIN, "abc", "")
    assert order.evict() == "a"
    order.gain(order.blocks["a"])
    assert order.blocks["a"].reused
    assert order.empty() == "bca"


def test_what_was_deleted_is_no_ghost() -> None:
    order = order_of(AGAIN, "abc", "")
    assert order.victim() == "a"
    order.drop("b")
    order.gain(order.blocks["b"])
    assert not order.blocks["b"].reused


def test_to_switch_moves_nothing() -> None:
    order = Order(LRU, AGAIN)
    for name in "abcd":
        order.add(name)
    order.touch("a")
    order.add("e")
    order.touch("b")
    assert order.victim() == "c"
    order.drop("c")
    order.drop("d")
    assert order.victim() == "a"
    order.policy._shadows.best = 1
    assert order.policy.candidate is AGAIN and order.victim() == "e"
    order.policy._shadows.best = 0
    assert order.empty() == "aeb"


def test_capacity_is_the_most_that_was_held_of_late() -> None:
    order = Order(TWICE)
    for i in range(100):
        order.add(chr(1000 + i))
    assert order.admits("n")
    assert order.policy._capacity == 100
    for _ in range(60):
        order.evict()
    for i in range(300):
        order.add(chr(5000 + i))
        order.evict()
    assert order.policy._capacity == 41


def test_memory_beside_the_blocks_is_bounded() -> None:
    order = Order(*CANDIDATES)
    for i in range(30_000):
        block = Block(order.space, key(i), None)
        order.policy.refer(order.space, block.key)
        order.gain(block)
        if i >= 1000:
            victim = order.policy.victim(anything)
            assert victim is not None
            victim.copies = 0
            order.policy.remove(victim)
    assert len(order.policy._once) + len(order.policy._again) <= 2 * 1001 + 257
    assert len(order.policy._shadows) <= len(CANDIDATES) * 1001
    assert order.policy._ghosts.nbytes <= 8 * 4 * 1100


# -- in the core ----------------------------------------------------------------------------------------------


def adaptive_world(slots: int, candidate: Candidate, cold_blocks: int = 0) -> World:
    world = World(warm_bytes_for(slots), cold_bytes=cold_blocks * PAGE)
    world.cache.residency.orders._policy = lambda tier, mark: Adaptive(tier, mark, (candidate,))
    return world


def read(world: World, space: Namespace, keys: list[bytes]) -> int:
    lease = world.acquire(space, keys)
    if lease is None:
        return 0
    world.load_all()
    found = len(lease.parts[0].slots)
    world.release(lease)
    return found


def test_a_put_that_is_refused_says_so_and_is_stored_the_second_time() -> None:
    world = adaptive_world(4, AGAIN)
    space = world.open()
    world.put(space, chain(4))
    assert read(world, space, chain(4)) == 4
    assert world.put(space, chain(2, "n")) == ["NOT_ADMITTED", "NO_PARENT"]
    assert world.cache.reads.match(space, packed(chain(4))).blocks == 4, "nothing left for what was refused"
    assert world.put(space, chain(2, "n")) == ["STORED", "STORED"]


def test_a_refused_block_of_a_set_says_nothing_of_the_next() -> None:
    world = adaptive_world(2, AGAIN)
    space = world.open(chain=False)
    for name in chain(2):
        world.put(space, [name])
        assert read(world, space, [name]) == 1
    assert world.put(space, chain(1, "n")) == ["NOT_ADMITTED"]
    assert world.put(space, [*chain(1, "m"), *chain(1, "n")]) == ["NOT_ADMITTED", "STORED"]


def test_a_prefix_that_is_stored_in_pieces_has_not_been_used_again() -> None:
    world = adaptive_world(8, AGAIN)
    space = world.open()
    keys = chain(4)
    world.put(space, keys[:2])
    world.put(space, keys[2:], keys[1])
    assert not any(block.reused for block in space.blocks.values())
    assert read(world, space, keys[:2]) == 2
    assert space.blocks[keys[1]].reused


def test_what_has_come_back_from_cold_was_used_again() -> None:
    world = adaptive_world(4, AGAIN, cold_blocks=40)
    space = world.open()
    world.put(space, chain(2))
    world.save_all()
    world.cache.evict(WARM, 2 * PAGE)
    assert all(block.copies == COLD for block in space.blocks.values())
    for _ in range(2):
        assert read(world, space, chain(2)) == 2
    world.put(space, chain(2, "b"))
    world.put(space, chain(2, "c"))
    assert [bool(space.blocks[name].copies & WARM) for name in chain(2)] == [True, True]
