"""Ranges of the staging segment."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_client.staging import Range, RangeSet, Staging

PAGE = 4096


def staging(pages: int, pump: object = None) -> Staging:
    return Staging(np.zeros(pages * PAGE, np.uint8), pump or (lambda: None))  # type: ignore[arg-type]


def test_first_fit_and_joining() -> None:
    room = staging(4)
    a, b, c = (room.take(PAGE, 0.0) for _ in range(3))
    assert (a, b, c) == (Range(0, PAGE), Range(PAGE, PAGE), Range(2 * PAGE, PAGE))
    assert a is not None
    assert b is not None
    assert c is not None
    assert room.take(2 * PAGE, 0.0) is None
    room.give(a)
    room.give(c)
    assert room.take(2 * PAGE, 0.0) == Range(2 * PAGE, 2 * PAGE), "the last two pages are one range again"
    room.give(b)
    assert room.take(1, 0.0) == Range(0, PAGE), "whole pages"


def test_take_is_bounded_and_pumps() -> None:
    pumped: list[int] = []
    room = staging(1, lambda: pumped.append(1))
    place = room.take(PAGE, 0.0)
    assert room.take(PAGE, time.monotonic() + 0.03) is None
    assert pumped, "an answer that nobody waits for may free a range"
    assert room.take(2 * PAGE, time.monotonic() + 3600) is None, "can never fit: does not wait"
    assert place is not None
    room.give(place)
    assert room.take(PAGE, 0.0) is not None


def test_a_pump_that_frees_a_range_ends_the_wait() -> None:
    taken: list[Range] = []

    def free() -> None:
        room.give(taken.pop(), is_suspect=True)

    room = staging(1, free)
    place = room.take(PAGE, 0.0)
    assert place is not None
    taken.append(place)
    again = room.take(PAGE, time.monotonic() + 30)
    assert again is not None
    assert room.is_suspect(again)
    room.clear_suspicion(again)
    assert not room.is_suspect(again)


def test_rows_have_a_stride() -> None:
    room = staging(2)
    place = room.take(300, 0.0)
    assert place is not None
    rows = room.rows(place, 3, 100, 90)
    assert rows.shape == (3, 90)
    rows[:] = 1
    assert room.memory[:300].reshape(3, 100).sum(axis=1).tolist() == [90, 90, 90]


PARTS = st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda pair: Range(*pair))


@given(st.lists(st.tuples(st.booleans(), PARTS), max_size=30), PARTS)
def test_a_range_set_is_a_set_of_bytes(steps: list[tuple[bool, Range]], probe: Range) -> None:
    ranges, model = RangeSet(), set[int]()
    for adds, part in steps:
        if adds:
            ranges.add(part)
            model |= set(range(part.offset, part.stop))
        else:
            ranges.remove(part)
            model -= set(range(part.offset, part.stop))
    assert ranges.touches(probe) == bool(model & set(range(probe.offset, probe.stop)))
    fit = ranges.first_fit(probe.nbytes)
    places = [at for at in range(81) if set(range(at, at + probe.nbytes)) <= model]
    assert (fit is None) == (not places)
    if fit is not None:
        assert fit.offset in places
        assert fit.nbytes == probe.nbytes


@pytest.mark.parametrize("count", [1, 7])
def test_no_two_takers_share_a_byte(count: int) -> None:
    room = staging(count)
    places = [room.take(PAGE, 0.0) for _ in range(count)]
    assert len({place.offset for place in places if place}) == count
    assert room.take(1, 0.0) is None
