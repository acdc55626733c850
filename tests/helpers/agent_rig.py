"""Supervised agents over a slab of blocks whose bytes follow from their number, so that any mix-up is seen."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvstore.engine.supervisor import AgentSupervisor
from kvstore.tiers.base import BlockRef, SlabRange, TierItem
from kvstore.tiers.checksums import block_checksum
from kvstore.tiers.segment import Segment
from kvstore.v1 import agent_pb2

PATIENCE_S = 60.0
NAMESPACE = hashlib.sha256(b"namespace").digest()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll until it holds, or fail."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {PATIENCE_S:g} s for: {what}"
        time.sleep(0.002)


def cold_config(path: Path, capacity_bytes: int = 256 << 20) -> agent_pb2.AgentConfig:
    return agent_pb2.AgentConfig(tier="cold", path=str(path), capacity_bytes=capacity_bytes, reader_threads=2)


def hot_config(capacity_bytes: int = 256 << 20) -> agent_pb2.AgentConfig:
    return agent_pb2.AgentConfig(tier="hot", device="cpu", capacity_bytes=capacity_bytes, reader_threads=2)


class Slots:
    """One slab, cut into slots of one block each; its lower half holds sources, the upper half is to be read into."""

    def __init__(self, slots: int = 32, block_bytes: int = 64 << 10, slab_id: int = 1) -> None:
        self.slab_id = slab_id
        self.block_bytes = block_bytes
        self._half = slots // 2
        self.segment = Segment("test-slots", slots * block_bytes)

    def map_into(self, supervisor: AgentSupervisor) -> None:
        supervisor.map_slab(self.slab_id, self.segment.fd, self.segment.nbytes)

    def source(self, number: int) -> TierItem:
        """A block to write, its bytes in the slab."""
        place = self._place(number % self._half)
        self.bytes_at(place)[:] = self.content(number)
        ref = BlockRef(NAMESPACE, number.to_bytes(32, "big"))
        return TierItem(ref, place, block_checksum(self.content(number)), b"", 0, "bfloat16")

    def target(self, number: int) -> TierItem:
        """The same block, to be read into a slot of zeros."""
        place = self._place(self._half + number % self._half)
        self.bytes_at(place)[:] = 0
        return self.source_name(number)._replace(range=place)

    def source_name(self, number: int) -> TierItem:
        ref = BlockRef(NAMESPACE, number.to_bytes(32, "big"))
        return TierItem(ref, self._place(0), block_checksum(self.content(number)), b"", 0, "bfloat16")

    def is_whole(self, item: TierItem) -> bool:
        number = int.from_bytes(item.ref.key, "big")
        return bool((self.bytes_at(item.range) == self.content(number)).all())

    def content(self, number: int) -> NDArray[np.uint8]:
        return np.random.default_rng(number).integers(0, 256, self.block_bytes, dtype=np.uint8)

    def bytes_at(self, place: SlabRange) -> NDArray[np.uint8]:
        return self.segment.array[place.offset : place.offset + place.nbytes]

    def sources(self, numbers: Iterable[int]) -> list[TierItem]:
        return [self.source(number) for number in numbers]

    def targets(self, numbers: Iterable[int]) -> list[TierItem]:
        return [self.target(number) for number in numbers]

    def _place(self, slot: int) -> SlabRange:
        return SlabRange(self.slab_id, slot * self.block_bytes, self.block_bytes)
