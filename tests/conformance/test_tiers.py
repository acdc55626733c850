"""The tier contract over every tier and every wrapper."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from fake_cuda import FakeDriver
from kvstore.codec.frame import FrameFormat
from kvstore.tiers.base import SlabMemory, Tier
from kvstore.tiers.cold import LmdbTier
from kvstore.tiers.conformance import DURABLE_CHECKS, TIER_CHECKS, Check
from kvstore.tiers.cuda import CudaDevice
from kvstore.tiers.host import HostMemoryTier
from kvstore.tiers.hot_cuda import HotCuda
from kvstore.tiers.memory import ArrayMemory
from kvstore.tiers.wrappers import Faulty, Metered, SeededFaults, Throttled

Maker = Callable[[Path, SlabMemory, int], Tier]


def host(_path: Path, memory: SlabMemory, capacity_bytes: int) -> Tier:
    return HostMemoryTier(capacity_bytes, memory)


def cold(path: Path, memory: SlabMemory, capacity_bytes: int, policy: str = "auto") -> LmdbTier:
    return LmdbTier(path / "cold", capacity_bytes, memory, FrameFormat(policy))


def hot(_path: Path, memory: SlabMemory, capacity_bytes: int, *, exportable: bool = True) -> Tier:
    assert isinstance(memory, ArrayMemory)
    return HotCuda(CudaDevice("cuda:0", FakeDriver()), capacity_bytes, memory, exportable=exportable)


def metered(inner: Maker, path: Path, memory: SlabMemory, capacity_bytes: int) -> Tier:
    return Metered(inner(path, memory, capacity_bytes))


def throttled(inner: Maker, path: Path, memory: SlabMemory, capacity_bytes: int) -> Tier:
    return Throttled(inner(path, memory, capacity_bytes), bytes_per_s=1e6, sleep=lambda _seconds: None)


def faulty(inner: Maker, path: Path, memory: SlabMemory, capacity_bytes: int) -> Tier:
    return Faulty(inner(path, memory, capacity_bytes), memory, SeededFaults(0, {}))


DURABLE: dict[str, Maker] = {"cold": cold, "cold-raw": partial(cold, policy="raw")}
TIERS: dict[str, Maker] = {
    "host": host,
    "hot": hot,
    "hot-plain": partial(hot, exportable=False),
    **DURABLE,
    **{
        f"{wrap.__name__}-{name}": partial(wrap, inner)
        for wrap in (metered, throttled, faulty)
        for name, inner in (("host", host), ("cold", cold))
    },
}


@pytest.mark.parametrize("check", TIER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("maker", TIERS.values(), ids=list(TIERS))
def test_tier(maker: Maker, check: Check, tmp_path: Path) -> None:
    check(partial(maker, tmp_path))


@pytest.mark.parametrize("check", DURABLE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("maker", DURABLE.values(), ids=list(DURABLE))
def test_durable_tier(maker: Maker, check: Check, tmp_path: Path) -> None:
    check(partial(maker, tmp_path))
