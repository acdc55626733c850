"""What leaves the warm pool: in which order, how much at once, and what happens when the medium does not take it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from kvstore.core.block import COLD, HOT, Block
from kvstore.engine import saver as module
from kvstore.engine.saver import LOADS_FIRST, SAVES_UNDER_WAY
from kvstore.protocol.errors import InternalError, Unavailable
from kvstore.tiers.base import Outcome
from played_media import PATIENCE_S, EngineRig, refs_of
from polling import eventually

MakeRig = Callable[..., EngineRig]


def written(rig: EngineRig) -> list[tuple[bytes, bytes]]:
    return [ref for batch in rig.cold.of("write") for ref in batch]


# -- order ----------------------------------------------------------------------------------------------------


def test_a_flush_saves_what_was_used_last_first_and_each_prefix_from_its_root_on(rig: EngineRig) -> None:
    """Time may run out: what was saved by then is the most valuable part, and usable after a restart."""
    old, new, middle = (rig.put(name, 3) for name in ("old", "new", "middle"))
    with rig.lock:
        rig.cache.reads.match(rig.space, b"".join(block.key for block in new))
    rig.mover.start()
    assert rig.mover.flush(PATIENCE_S) == 0
    assert written(rig) == refs_of([*new, *middle, *old])


def test_in_normal_operation_what_leaves_next_is_saved_first(make_rig: MakeRig) -> None:
    rig = make_rig(slots=12)
    first, second, third = (rig.put(name, 4) for name in ("first", "second", "third"))
    with rig.lock:
        rig.cache.reads.match(rig.space, b"".join(block.key for block in first))  # only its leaf is noted
    rig.mover.start()
    rig.mover.kick_saves()
    eventually(lambda: rig.cache.residency.counts[COLD].blocks, "a batch to be saved")
    assert written(rig)[:4] == refs_of(second)
    assert third and not any(block.copies & COLD for block in first)


def test_a_victim_that_a_newer_use_hid_is_saved_before_it_leaves(make_rig: MakeRig) -> None:
    """Regression: blocks were saved in the order of puts, so that what was used all the time went first."""
    rig = make_rig(slots=32)
    space = rig.open("set", is_chain=False)
    used = rig.put("used", 16, space)
    idle = rig.put("idle", 16, space)
    with rig.lock:
        for block in used:
            rig.cache.residency.touch(block)
        rig.cache.moves.let_leave(16 * 4096)
        batch = rig.cache.moves.begin_saves(16, 1 << 30)
        assert [copy.block for copy in batch] == idle
        for copy in batch:
            rig.cache.moves.saved(copy, None)


def test_a_hot_tier_without_a_slot_of_that_size_gets_room_by_what_is_used_least(make_rig: MakeRig) -> None:
    """A device's memory is cut into slots: the budget says that there is room, and the device says no."""
    rig = make_rig(hot_bytes=64 * 4096)
    blocks = rig.put("a", 40)
    rig.hot.outcome = lambda item: Outcome.FULL if len(rig.hot.blocks) >= 32 else Outcome.OK
    rig.mover.start()
    for _ in range(4):
        lease = rig.acquire("a", 40)
        rig.release(lease)
        rig.mover.kick_saves()
        eventually(lambda: not rig.cache.reads.promotions, "the promotions to be tried")
    eventually(lambda: rig.hot.of("delete"), "room to be made in hot")
    assert rig.cache.residency.counts[HOT].write_failures > 0
    assert len(blocks) == 40


# -- a medium that takes nothing ------------------------------------------------------------------------------


def test_a_flush_into_a_full_tier_ends_without_its_whole_time(rig: EngineRig) -> None:
    """Regression: it went on polling for a batch that nobody would ever take."""
    rig.put("a", 8)
    rig.cold.outcome = lambda item: Outcome.FULL
    rig.mover.start()
    assert rig.mover.flush(1e6) == 8
    assert 0 < len(rig.cold.of("write")) <= 4
    rig.cold.outcome = lambda item: Outcome.OK
    assert rig.mover.flush(1e6) == 0


def test_a_flush_without_room_below_ends_at_once(make_rig: MakeRig) -> None:
    rig = make_rig(cold_bytes=3 * 4096)
    blocks = rig.put("a", 8)
    rig.mover.start()
    assert rig.mover.flush(1e6) == 5
    assert written(rig) == refs_of(blocks[:3])


def test_one_block_that_cannot_be_saved_does_not_cost_the_others(rig: EngineRig) -> None:
    blocks = rig.put("a", 8)
    bad = refs_of(blocks)[5]
    rig.cold.outcome = lambda item: Outcome.CORRUPT if item.ref == bad else Outcome.OK
    rig.mover.start()
    assert rig.mover.flush(1e6) == 1
    assert rig.cold.blocks.keys() == set(refs_of(blocks)) - {bad}


def test_a_flush_while_the_agent_is_down_returns(rig: EngineRig) -> None:
    rig.put("a", 8)
    rig.cache.residency.up[COLD] = False
    rig.mover.start()
    assert rig.mover.flush(1e6) == 8
    assert rig.cold.events == []


def test_a_flush_is_bounded_by_its_time(rig: EngineRig) -> None:
    go_on = threading.Event()
    rig.put("a", 8)
    rig.cold.before_results = lambda: go_on.wait(PATIENCE_S)
    rig.mover.start()
    assert rig.mover.flush(0.05) == 8
    go_on.set()
    assert rig.mover.flush(PATIENCE_S) == 0


# -- side by side ---------------------------------------------------------------------------------------------


def test_the_next_batches_are_sent_while_the_first_is_committed(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_BLOCKS", 4)
    rig = make_rig()
    for number in range(10):
        rig.put(f"a-{number}", 4)
    go_on = threading.Event()
    rig.cold.before_results = lambda: go_on.wait(PATIENCE_S)
    rig.mover.start()
    flushing = threading.Thread(target=rig.mover.flush, args=(PATIENCE_S,))
    flushing.start()
    eventually(lambda: len(rig.cold.of("write")) == SAVES_UNDER_WAY, "the batches to be sent")
    go_on.set()
    flushing.join()
    assert len(set(written(rig))) == len(written(rig)) == 40
    counters = rig.mover.counters()
    assert counters["save_batches"] == 10
    assert counters["save_bytes"] == 40 * 4096


def test_a_key_that_is_on_its_way_is_not_saved_again_beside_it(rig: EngineRig) -> None:
    """Deleted and put again meanwhile: the deletion of the first copy must not hit the second."""
    (first,) = rig.put("a", 1)
    with rig.lock:
        (copy,) = rig.cache.moves.begin_saves(1, 1 << 20, newest_first=True)
        rig.cache.delete(rig.space, first.key)
    (second,) = rig.put("a", 1)
    with rig.lock:
        assert rig.cache.moves.begin_saves(1, 1 << 20) == []
        assert rig.cache.moves.begin_saves(1, 1 << 20, newest_first=True) == []
        rig.cache.moves.saved(copy, 4096)
        assert rig.cache.residency.deletes[COLD] == refs_of([first])
    rig.mover.start()
    assert rig.mover.flush(PATIENCE_S) == 0
    assert [kind for kind, _ in rig.cold.events] == ["delete", "write"]
    assert second.copies & COLD


# -- reads first ----------------------------------------------------------------------------------------------


def cold_prefix(rig: EngineRig, name: str, count: int) -> list[Block]:
    blocks = rig.put(name, count)
    assert rig.mover.flush(PATIENCE_S) == 0
    rig.evict_warm()
    return blocks


def test_saving_gives_way_to_queued_loads_but_not_for_ever(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.engine.mover._LOAD_BLOCKS", 1)
    rig = make_rig(slots=160)
    rig.mover.start()
    cold_prefix(rig, "cold", 4 * LOADS_FIRST)
    stuck = threading.Event()
    rig.cold.before_read = lambda item: stuck.wait(PATIENCE_S)
    lease = rig.acquire("cold", 4 * LOADS_FIRST)
    saved_before = len(rig.cold.of("write"))
    rig.put("fresh", 120)
    rig.mover.kick_saves()
    eventually(lambda: rig.mover.counters()["saves_yielded"], "the saver to give way")
    eventually(lambda: len(rig.cold.of("write")) > saved_before, "a batch all the same")
    stuck.set()
    eventually(lambda: rig.ready(lease) == 4 * LOADS_FIRST, "the loads to end")
    rig.release(lease)


def test_a_flush_does_not_give_way(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.engine.mover._LOAD_BLOCKS", 1)
    monkeypatch.setattr(module, "YIELD_MAX_S", 1e6)
    rig = make_rig(slots=160)
    rig.mover.start()
    cold_prefix(rig, "cold", 4 * LOADS_FIRST)
    stuck = threading.Event()
    rig.cold.before_read = lambda item: stuck.wait(PATIENCE_S)
    lease = rig.acquire("cold", 4 * LOADS_FIRST)
    rig.put("fresh", 4)
    assert rig.mover.flush(PATIENCE_S) == 0
    stuck.set()
    rig.release(lease)


# -- deletions ------------------------------------------------------------------------------------------------


def test_deletes_that_the_agent_refuses_are_asked_for_again_and_no_write_passes_them(rig: EngineRig) -> None:
    """A write that came before would lose its copy to the deletion of the one before it."""
    rig.mover.start()
    (block,) = cold_prefix(rig, "a", 1)
    rig.cold.events.clear()
    refusals = iter([InternalError("the disk is full"), Unavailable("the agent went away"), OSError(24, "no fds")])

    def refuse() -> None:
        for error in refusals:
            raise error

    rig.cold.before_delete = refuse
    with rig.lock:
        rig.cache.delete(rig.space, block.key)
    rig.put("a", 1)
    rig.put("b", 2)
    while rig.mover.flush(PATIENCE_S):
        pass
    assert [kind for kind, _ in rig.cold.events] == ["delete", "write"]
    assert rig.cold.of("delete") == [refs_of([block])]
    assert rig.mover.counters()["deletes_refused"] == 3
    assert len(rig.cold.blocks) == 3


def test_deletes_wait_for_an_agent_that_is_down(rig: EngineRig) -> None:
    rig.mover.start()
    (block,) = cold_prefix(rig, "a", 1)
    with rig.lock:
        rig.cache.residency.up[COLD] = False
        rig.cache.delete(rig.space, block.key)
    rig.mover.kick_saves()
    rig.mover.wake_saver()
    rig.put("b", 1)
    assert rig.cold.of("delete") == []
    with rig.lock:
        rig.cache.residency.up[COLD] = True
    rig.mover.wake_saver()
    eventually(lambda: rig.cold.of("delete") == [refs_of([block])], "the deletion to be carried out")


def test_an_end_without_the_deletes_says_so(make_rig: MakeRig) -> None:
    def refuse() -> None:
        raise InternalError("the disk is full")

    rig = make_rig()
    rig.mover.start()
    (block,) = cold_prefix(rig, "a", 1)
    rig.cold.before_delete = refuse
    with rig.lock:
        rig.cache.delete(rig.space, block.key)
    assert not rig.mover.close()
    assert rig.cache.residency.deletes[COLD] == refs_of([block])


def test_a_hot_tier_that_refuses_does_not_hold_up_the_cold_one(make_rig: MakeRig) -> None:
    def refuse() -> None:
        raise InternalError("no")

    rig = make_rig(hot_bytes=1 << 20)
    rig.hot.before_delete = refuse
    rig.cache.residency.deletes[HOT].append((b"n" * 32, b"k" * 32))
    rig.put("a", 4)
    rig.mover.start()
    assert rig.mover.flush(PATIENCE_S) == 0
    assert rig.cache.residency.deletes[HOT]


# -- defects --------------------------------------------------------------------------------------------------


def test_a_defect_costs_its_step_and_not_the_thread(rig: EngineRig, caplog: pytest.LogCaptureFixture) -> None:
    defects = iter(range(2))

    def fail() -> None:
        for number in defects:
            raise ZeroDivisionError(f"nobody thought of {number}")

    rig.cold.before_results = fail
    rig.put("a", 4)
    rig.mover.start()
    while rig.mover.flush(PATIENCE_S):
        pass
    assert all(f"nobody thought of {number}" in caplog.text for number in range(2))
    with rig.lock:
        assert not any(block.saving or block.slot.pins for block in rig.space.blocks.values() if block.slot)
