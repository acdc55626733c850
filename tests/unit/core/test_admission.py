"""What is written to the SSD: a yield that is worth the wear, and a budget of bytes that is kept."""

from __future__ import annotations

from core_checks import check
from core_world import PAGE, World, chain, key, tiers_of, warm_bytes_for
from kvstore.core.admission import EVIDENCE_MIN, YIELD_MIN, Admission
from kvstore.core.block import COLD, REFUSED, WARM, Block, Namespace

HOUR_S = 3600.0


def block(name: object = "a", reused: bool = False) -> Block:
    made = Block(Namespace(key("ns"), "tenant", PAGE, PAGE, 16, chain=True), key(name), None)
    made.reused = reused
    return made


def test_without_a_limit_everything_is_within_the_budget() -> None:
    admission = Admission()
    assert all(admission.admits(block(), 1 << 40, 0.0) for _ in range(100))


def test_no_more_is_written_than_the_budget_of_a_day_and_one_hour() -> None:
    admission = Admission(24 * 1000)
    written = 0
    for minute in range(3 * 24 * 60):
        while admission.admits(block(reused=True), 10, 60.0 * minute):
            written += 10
    assert 3 * 24 * 1000 <= written <= (3 * 24 + 1) * 1000
    assert admission.counts.refused_budget > 0


def test_below_half_an_hour_of_budget_only_what_was_used_again_is_written() -> None:
    admission = Admission(24 * 1000)
    while admission.admits(block(), 10, 0.0):
        pass
    assert admission.admits(block(reused=True), 10, 0.0)
    assert not admission.admits(block(), 10, 0.0)


def test_what_took_less_than_was_taken_for_it_gives_the_rest_back() -> None:
    admission = Admission(24 * 1000)
    for _ in range(500):
        assert admission.admits(block(reused=True), 10, 0.0)
        admission.settle(10, 1)


def test_blocks_that_must_be_written_are_missing_from_what_comes() -> None:
    admission = Admission(24 * 1000)
    assert admission.admits(block(), 5000, 0.0, wanted=True)
    assert not admission.admits(block(reused=True), 10, 3 * HOUR_S)
    assert admission.admits(block(reused=True), 10, 5 * HOUR_S)


def test_first_uses_that_nobody_asks_for_again_are_refused_until_they_would_have_paid() -> None:
    admission = Admission()
    space = Namespace(key("ns"), "tenant", PAGE, PAGE, 16, chain=True)
    assert all(admission.admits_first_use() for _ in range(int(EVIDENCE_MIN) - 1))
    assert not admission.admits_first_use()
    left = [block(number) for number in range(2000)]
    for one in left:
        admission.left(one)
    admission.missed(space, [one.key for one in left[-200:]], held=1000)
    assert admission.writes_all, "they came back"


def test_hits_on_what_was_used_once_keep_it_open() -> None:
    admission = Admission()
    for number in range(10 * int(EVIDENCE_MIN)):
        assert admission.admits_first_use()
        if number % int(0.5 / YIELD_MIN) == 0:
            admission.hit()


# -- in the core ----------------------------------------------------------------------------------------------


def test_a_block_that_is_refused_is_dropped_unless_it_is_used_again() -> None:
    world = World(warm_bytes_for(8), cold_bytes=4 * PAGE)
    space = world.open()
    for number in range(4):
        world.put(space, chain(1, number))
    world.save_all()
    world.cache.evict(WARM, 4 * PAGE)
    assert [tiers_of(one) for one in space.blocks.values()] == ["cold"] * 4
    world.cache.residency.admission.admits_first_use = lambda: False  # type: ignore[method-assign]
    for number in range(4, 8):
        world.put(space, chain(1, number))
    world.cache.moves.let_leave(4 * PAGE)
    assert world.start_saves(flush=False) == []
    refused = [space.blocks[chain(1, number)[0]] for number in range(4, 8)]
    assert all(one.spare & REFUSED and one not in world.cache.residency.dirty for one in refused)
    check(world)
    world.release(world.lease(space, chain(1, 4)))
    assert not refused[0].spare & REFUSED and refused[0] in world.cache.residency.dirty
    world.cache.evict(WARM, 3 * PAGE)
    assert [tiers_of(one) for one in refused] == ["warm", "", "", ""]
    assert world.cache.residency.dropped_unsaved == 0
    check(world)


def test_what_was_refused_while_it_stayed_is_judged_again_when_it_leaves() -> None:
    """Regression: a day's budget that had run out cost a block its copy for as long as it stayed in warm."""
    world = World(warm_bytes_for(8), cold_bytes=64 * PAGE)
    space = world.open()
    world.put(space, chain(1))
    (one,) = space.blocks.values()
    world.cache.residency.refuse_save(one)
    world.cache.moves.let_leave(PAGE)
    (save,) = world.start_saves(flush=False)
    world.end_save(save)
    assert tiers_of(one) == "warm cold"
    check(world)


def test_a_flush_saves_what_was_refused_above_what_it_saves() -> None:
    world = World(warm_bytes_for(8), cold_bytes=64 * PAGE)
    space = world.open()
    world.put(space, chain(2))
    parent = space.blocks[chain(2)[0]]
    world.cache.residency.refuse_save(parent)
    assert world.save_all() == 2
    assert parent.copies & COLD and world.match(space, chain(2)) == 2
    check(world)
