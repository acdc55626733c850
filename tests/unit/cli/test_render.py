"""Small pieces of what people see."""

from __future__ import annotations

import pytest

from kvstore.cli import render
from kvstore.v1 import admin_pb2 as pb


@pytest.mark.parametrize(
    ("used", "capacity", "shown"),
    [(0, 100, "····"), (100, 100, "████"), (50, 100, "██··"), (200, 100, "████"), (0, 0, "····"), (1, 32, "▏···")],
)
def test_a_bar_is_as_full_as_the_tier(used: int, capacity: int, shown: str) -> None:
    assert render.bar(used, capacity, width=4) == shown


@pytest.mark.parametrize(
    ("milliseconds", "shown"),
    [(0, "0ms"), (999, "999ms"), (1000, "1s"), (61_000, "1m 1s"), (90_061_000, "1d 1h"), (3_600_000, "1h")],
)
def test_durations_have_two_units(milliseconds: int, shown: str) -> None:
    assert render.duration(milliseconds) == shown


def test_a_share_of_nothing_is_no_number() -> None:
    assert render.percent(0, 0) == "-"
    assert render.percent(1, 8) == "12.5%"


def test_messages_become_plain_values() -> None:
    message = pb.GetStatsResponse(
        version="1", tiers=[pb.TierStats(name="warm", hits=1 << 60)], counters={"b": 2, "a": 1}
    )
    document = render.plain(message)
    assert document["tiers"][0]["hits"] == 1 << 60
    assert list(document["counters"]) == ["a", "b"]
    assert document["put_rejected"] == {}
    assert render.plain(pb.BlockInfo(key=b"\xab\xcd", tiers=["hot"]))["key"] == "abcd"
    assert render.plain(pb.BlockInfo(orphan=True))["orphan"] is True
