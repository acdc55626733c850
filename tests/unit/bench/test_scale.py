"""Full and quick runs."""

from __future__ import annotations

from dataclasses import replace

from kvstore.bench.scale import FULL, QUICK


def test_a_full_run_is_what_memcpy_means() -> None:
    assert FULL.working_set_bytes == 512 << 20
    assert FULL.rounds >= 7
    assert FULL.is_full
    assert replace(FULL, warm_bytes=8 << 30).is_full


def test_a_quick_run_says_that_it_is_one() -> None:
    assert not QUICK.is_full
    assert QUICK.warm_bytes >= 3 * QUICK.working_set_bytes // 2
