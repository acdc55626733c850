"""Codecs are compiled once there is work for them, beside the work, and at most once."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from kvstore.agents.compiling import CompilingFormat
from kvstore.agents.loads import Loads
from kvstore.tiers.base import BlockRef, SlabRange, TierItem

BOUND_S = 20.0
ITEM = TierItem(BlockRef(bytes(32), bytes(32)), SlabRange(1, 0, 100), bytes(16))


class Frames:
    """A format that notes what is asked of it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.compiled = 0
        self.begun, self.may_end = threading.Event(), threading.Event()
        self._error = error

    def encode(self, item: TierItem, raw: Any) -> Any:
        return raw.nbytes

    def decode(self, frame: memoryview, item: TierItem, out: Any) -> None:
        out[:] = 1

    def compile(self) -> bool:
        self.begun.set()
        assert self.may_end.wait(BOUND_S)
        self.compiled += 1
        if self._error is not None:
            raise self._error
        return True

    def describe(self) -> str:
        return "compiled"


def test_nothing_is_compiled_for_a_short_life() -> None:
    frames = Frames()
    subject = CompilingFormat(frames, Loads(), worth_bytes=1000)
    for _ in range(9):
        subject.encode(ITEM, np.zeros(100, np.uint8))
    assert not frames.begun.is_set()


@pytest.mark.parametrize("error", [None, RuntimeError("no compiler")])
def test_compiling_waits_for_nobody_and_nobody_for_it(error: Exception | None) -> None:
    frames = Frames(error)
    subject = CompilingFormat(frames, Loads(), worth_bytes=1000)
    out = np.zeros(600, np.uint8)
    subject.encode(ITEM, out)
    subject.decode(memoryview(b""), ITEM, out)
    assert frames.begun.wait(BOUND_S)
    assert subject.encode(ITEM, out) == 600, "served while it compiles"
    frames.may_end.set()
    for thread in threading.enumerate():
        if thread.name == "agent-compiler":
            thread.join(BOUND_S)
    subject.encode(ITEM, out)
    assert frames.compiled == 1
