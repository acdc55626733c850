"""Advice: capacities that were replayed, the knee, and the split."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from kvstore.replay.advice import POINTS, SHARES, WORTH, advise, capacities, steps
from kvstore.replay.runs import replay
from kvstore.replay.trace import Chain, Trace, made


def popular() -> Trace:
    """300 documents of 6 blocks, the first ones asked for most, and a tenth that nobody asks for twice."""
    rng, chain, trace = random.Random(1), Chain(), Trace("popular", 16)
    for number in range(1500):
        name = f"once-{number}" if number % 10 == 0 else str(min(299, int(rng.paretovariate(0.7))))
        trace.requests.append(made(chain, number, [f"{name}/{block}" for block in range(6)], 96, 16))
    return trace


def test_capacities_go_from_a_thousandth_to_all_by_equal_factors() -> None:
    found = capacities(1_000_000)
    assert (len(found), found[0], found[-1]) == (POINTS, 1000, 1_000_000)
    ratios = [after / before for before, after in pairwise(found)]
    assert max(ratios) / min(ratios) < 1.01
    assert capacities(5) == [1, 3, 5]


def test_every_figure_is_a_replays_own() -> None:
    """No figure is read off a line between two others: whoever replays that size finds the same."""
    trace, told = popular(), []
    result = advise(trace, "adaptive", 1000, told.append)
    assert 0 < sum(told) <= steps(trace)
    infinite = result["infinite_hit_ratio"]
    assert result["points"][-1]["hit_ratio"] == infinite == replay(trace, {"warm": trace.unique}, "opt")["optimum"]
    for share, reached in zip(SHARES, result["reach"], strict=True):
        again = replay(trace, {"warm": reached["blocks"]}, "adaptive")
        assert again["block_hit_ratio"] == reached["hit_ratio"] >= share * infinite
        smaller = [p for p in result["points"] if p["blocks"] < reached["blocks"]]
        assert all(point["hit_ratio"] < share * infinite for point in smaller)
        assert reached["bytes"] == 1000 * reached["blocks"]
    split = result["split"]
    tiers = {"warm": split["warm_blocks"], "cold": split["cold_blocks"]}
    assert replay(trace, tiers, "adaptive")["block_hit_ratio"] == split["hit_ratio"]


def test_gains_are_points_a_doubling_and_warm_ends_where_they_do() -> None:
    result = advise(popular(), "leaf-lru")
    points = result["points"]
    assert points[0]["gain_per_doubling"] is None
    warm = result["split"]["warm_blocks"]
    for point in points[1:]:
        if point["blocks"] == warm:
            assert point["gain_per_doubling"] >= WORTH * result["infinite_hit_ratio"]
        elif point["blocks"] > warm:
            assert point["gain_per_doubling"] < WORTH * result["infinite_hit_ratio"]


def test_a_step_has_its_knee_where_it_ends() -> None:
    """32 documents round and round: under the optimum hits grow with every block, and nothing is left beyond."""
    chain, trace = Chain(), Trace("step", 16)
    for number in range(4000):
        trace.requests.append(made(chain, number, [number % 32 if number % 2 else -number], 16, 16))
    result = advise(trace, "opt")
    assert 16 <= result["knee"]["blocks"] <= 32
    assert result["reach"][-1]["blocks"] <= 16
    assert "hit_ratio" not in result["split"]


def test_a_trace_without_reuse_has_no_answer() -> None:
    chain, trace = Chain(), Trace("once", 16)
    trace.requests += [made(chain, number, [number], 16, 16) for number in range(20)]
    with pytest.raises(ValueError, match="no full block twice"):
        advise(trace, "adaptive")
    with pytest.raises(ValueError, match="unknown policy"):
        advise(trace, "mru")
