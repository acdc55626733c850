"""Encoding gives way to loads, within bounds."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from kvstore.agents import loads as module
from kvstore.agents.loads import Loads, PausingFormat
from kvstore.tiers.base import BlockRef, SlabRange, TierItem
from polling import eventually

ITEM = TierItem(BlockRef(b"n" * 32, b"k" * 32), SlabRange(1, 0, 1), b"c" * 16)
LARGE = np.zeros(2 << 20, np.uint8)
SMALL = np.zeros(16 << 10, np.uint8)


class Played:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, item: TierItem, raw: NDArray[np.uint8]) -> str:
        self.encoded += raw.nbytes
        return "frame"

    def decode(self, frame: memoryview, item: TierItem, out: NDArray[np.uint8]) -> None:
        out[:] = 7


@pytest.fixture
def loads() -> Loads:
    return Loads()


@pytest.fixture
def paused(loads: Loads) -> PausingFormat:
    return PausingFormat(Played(), loads)  # type: ignore[arg-type]


def test_without_loads_nothing_waits(paused: PausingFormat) -> None:
    for _ in range(100):
        assert paused.encode(ITEM, LARGE) == "frame"  # type: ignore[comparison-overlap]
    assert paused.stats() == {"encode_pauses": 0, "encode_pause_us": 0}


def test_encoding_waits_for_the_last_load(loads: Loads, paused: PausingFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FLOOR_BYTES_S", 1)  # patience without end
    loads.begin(2)
    thread = threading.Thread(target=paused.encode, args=(ITEM, LARGE))
    thread.start()
    loads.end()
    assert thread.is_alive()
    loads.end()
    thread.join(30.0)
    assert not thread.is_alive()
    eventually(lambda: paused.stats()["encode_pauses"] == 1, "the pause to be counted")


def test_loads_without_end_do_not_stop_it(loads: Loads, paused: PausingFormat) -> None:
    loads.begin(1)
    for _ in range(4):
        paused.encode(ITEM, LARGE)
    assert paused.stats()["encode_pauses"] == 4
    assert paused.stats()["encode_pause_us"] > 0


def test_small_blocks_pause_together(loads: Loads, paused: PausingFormat) -> None:
    loads.begin(1)
    for _ in range(128):
        paused.encode(ITEM, SMALL)
    assert paused.stats()["encode_pauses"] == 2


def test_decoding_never_waits(loads: Loads, paused: PausingFormat) -> None:
    loads.begin(1)
    out = np.zeros(4, np.uint8)
    paused.decode(memoryview(b""), ITEM, out)
    assert out.tolist() == [7] * 4


def test_any_number_of_threads_counts_right(loads: Loads) -> None:
    def work(change: Callable[[], None]) -> None:
        for _ in range(1000):
            change()

    loads.begin(4000)
    threads = [threading.Thread(target=work, args=(loads.end,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not loads.await_none(30.0)
