"""Targets, suites and the shape of results."""

from __future__ import annotations

import pytest

from kvstore.bench.figures import SUITES, TARGETS, Result, chosen, latency_figures, transfer_result


def test_every_result_belongs_to_one_suite() -> None:
    named = [name for names in SUITES.values() for name in names]
    assert sorted(named) == sorted(TARGETS)


def test_goals_are_at_least_as_hard_as_musts() -> None:
    for targets in TARGETS.values():
        for target in targets:
            assert target.reached(target.must)
            assert target.reached(target.goal)


def test_nothing_named_is_everything_and_names_keep_their_order() -> None:
    left_out = {*SUITES["cold"], *SUITES["gpu"]}
    assert chosen([]) == [name for name in TARGETS if name not in left_out], "minutes, or a device: only by name"
    assert chosen(list(SUITES)) == list(TARGETS)
    assert chosen(["put", "get_64"]) == ["get_64", "put_256", "put_spill"]


def test_an_unknown_name_is_told_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no suite 'gets'; there are get, get_256k, put"):
        chosen(["gets"])


def test_a_ratio_is_the_median_of_the_rounds_and_not_of_the_sums() -> None:
    result = transfer_result("get_64", memcpy_s=[1.0, 1.0, 9.0], taken_s=[1.0, 2.0, 10.0], nbytes=1000)
    assert result.figures["ratio_memcpy"] == 0.9
    assert (result.figures["ratio_min"], result.figures["ratio_max"]) == (0.5, 1.0)
    document = result.document()
    assert {"name": "get_64", "seconds": 2.0, "bytes": 1000, "must": 0.82, "goal": 0.95, "ok": True}.items() <= (
        document.items()
    )


def test_a_result_is_judged_by_every_figure_it_is_bound_by() -> None:
    good = Result("idle", {"cpu_percent": 0.1, "rss_mb": 120})
    assert good.document()["must"] == {"cpu_percent": 1.0, "rss_mb": 140}
    assert good.ok
    assert not Result("idle", {"cpu_percent": 0.1, "rss_mb": 141}).ok
    assert not Result("get_64", {"ratio_memcpy": 0.81}).ok
    assert not Result("call_local_us", {"median_us": 80.1}).ok


def test_latencies_are_a_median_and_a_99th_percentile() -> None:
    figures = latency_figures([i * 1e-6 for i in range(1, 201)])
    assert (figures["median_us"], figures["p99_us"], figures["calls"]) == (100.5, 199.0, 200)
    assert latency_figures([0.002], "ms")["median_ms"] == 2.0
