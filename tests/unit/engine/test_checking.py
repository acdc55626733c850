"""Checks of the cold tier, page by page, and what the engine learns from them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvstore.core.block import COLD, WARM
from kvstore.engine.checking import Checker
from kvstore.engine.mover import Mover
from kvstore.protocol.errors import InvalidRequest
from kvstore.tiers.base import BlockRef, CheckPage
from played_media import PATIENCE_S, EngineRig, refs_of

MakeRig = Callable[..., EngineRig]


@pytest.fixture
def checker(rig: EngineRig) -> Checker:
    rig.mover.start()
    return Checker(rig.lock, rig.cache, rig.pool, rig.mover)


def test_a_page_is_passed_on(rig: EngineRig, checker: Checker) -> None:
    asked: list[tuple[BlockRef | None, int, bool]] = []
    last = BlockRef(b"n" * 32, b"k" * 32)

    def check(after: BlockRef | None, limit: int, repair: bool) -> CheckPage:
        asked.append((after, limit, repair))
        return CheckPage(last, 5, 2, 1, 0)

    rig.cold.check = check  # type: ignore[method-assign]
    reply = checker.check_cold(b"", 0, False)
    assert (reply.checked, reply.corrupt, reply.missing, reply.repaired) == (5, 2, 1, 0)
    assert reply.last == b"".join(last)
    checker.check_cold(reply.last, 7, True)
    assert asked[0][0] is None
    assert asked[0][1] > 0
    assert asked[1][0] == last
    assert asked[1][1] <= 7
    assert asked[1][2]


def test_a_page_of_large_blocks_is_short(rig: EngineRig, checker: Checker) -> None:
    rig.put("a", 4)
    assert rig.mover.flush(PATIENCE_S) == 0
    limits: list[int] = []
    rig.cold.check = lambda after, limit, repair: limits.append(limit) or CheckPage(None)  # type: ignore
    rig.cache.residency.raw_cold_bytes *= 1 << 14  # blocks of 64 MiB
    checker.check_cold(b"", 0, False)
    rig.cache.residency.raw_cold_bytes //= 1 << 14
    assert limits == [4]


def test_what_a_repair_dropped_is_forgotten_and_saved_again_where_warm_has_it(rig: EngineRig, checker: Checker) -> None:
    blocks = rig.put("a", 8)
    assert rig.mover.flush(PATIENCE_S) == 0
    in_warm, only_cold = refs_of(blocks)[2], refs_of(blocks)[7]
    with rig.lock:
        rig.cache.residency.drop_warm(blocks[7])
    for ref in (in_warm, only_cold):
        del rig.cold.blocks[ref]
    rig.cold.page = CheckPage(None, 8, 2, 0, 2)
    reply = checker.check_cold(b"", 0, True)
    assert (reply.checked, reply.corrupt, reply.repaired, reply.last) == (8, 2, 2, b"")
    assert blocks[2].copies == WARM
    assert blocks[7].copies == 0
    assert {block.copies for block in (*blocks[:2], *blocks[3:7])} == {WARM | COLD}
    assert rig.cache.residency.counts[COLD].corrupt == 2
    assert rig.mover.flush(PATIENCE_S) == 0
    assert in_warm in rig.cold.blocks


def test_only_the_page_is_looked_at(rig: EngineRig, checker: Checker) -> None:
    blocks = rig.put("a", 8)
    assert rig.mover.flush(PATIENCE_S) == 0
    order = sorted(refs_of(blocks))
    for ref in order:
        del rig.cold.blocks[ref]
    rig.cold.page = CheckPage(order[4], 3, 3, 0, 3)
    checker.check_cold(b"".join(order[1]), 3, True)
    kept = {ref for ref, block in zip(refs_of(blocks), blocks, strict=True) if block.copies & COLD}
    assert kept == {*order[:2], *order[5:]}


def test_without_a_cold_tier_there_is_nothing_to_check(rig: EngineRig) -> None:
    mover = Mover(rig.lock, rig.cache, rig.pool)
    with pytest.raises(InvalidRequest, match="the cold tier is off"):
        Checker(rig.lock, rig.cache, rig.pool, mover).check_cold(b"", 0, False)
