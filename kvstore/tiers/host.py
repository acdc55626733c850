"""A tier in host memory: the stand-in for the hot tier where there is no device, and the simplest tier there is."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.tiers.base import BlockRef, Outcome, SlabMemory, Tier, TierItem, WriteResult
from kvstore.tiers.checksums import block_checksum
from kvstore.tiers.tally import Tally


class _Held(NamedTuple):
    checksum: bytes
    data: NDArray[np.uint8]  # never written to once it is here, so readers copy from it without the lock


class HostMemoryTier(Tier):
    """Keeps copies of blocks in a dict, up to a number of bytes. Any thread may call any method."""

    def __init__(self, capacity_bytes: int, memory: SlabMemory, name: str = "host") -> None:
        self.name = name
        self.capacity_bytes = capacity_bytes
        self._memory = memory
        self._lock = threading.Lock()
        self._held: dict[BlockRef, _Held] = {}
        self._used_bytes = 0
        self._tally = Tally(("corrupt", "missing", "full", "unmapped"))

    def write(self, items: Sequence[TierItem]) -> list[WriteResult]:
        """Copy blocks in. FULL where the capacity does not allow it, CORRUPT where the bytes fail their checksum."""
        return [self._write(item) for item in items]

    def read(self, items: Sequence[TierItem]) -> list[Outcome]:
        """Copy blocks out; a copy that fails its checksum is dropped."""
        return [self._read(item) for item in items]

    def delete(self, refs: Sequence[BlockRef]) -> None:
        """Forget blocks."""
        with self._lock:
            for ref in refs:
                self._forget(ref)

    def stats(self) -> Mapping[str, int]:
        """Blocks and bytes held, and what went wrong."""
        with self._lock:
            blocks, used = len(self._held), self._used_bytes
        return {"blocks": blocks, "raw_bytes": used, "stored_bytes": used, **self._tally.snapshot()}

    def resize(self, capacity_bytes: int) -> int:
        """Take no more than that from now on; what is held stays until it is deleted."""
        with self._lock:
            self.capacity_bytes = capacity_bytes
        return capacity_bytes

    def close(self) -> None:
        """Release every block; reads are MISSING from here on."""
        with self._lock:
            self._held.clear()
            self._used_bytes = 0
            self.capacity_bytes = 0

    def _write(self, item: TierItem) -> WriteResult:
        try:
            data = self._memory.view(item.range).copy()
        except KeyError:
            self._tally.add("unmapped")
            return WriteResult(Outcome.BUSY)
        if block_checksum(data) != item.checksum:
            self._tally.add("corrupt")
            return WriteResult(Outcome.CORRUPT)
        with self._lock:
            old = self._held.get(item.ref)
            if self._used_bytes + data.nbytes - (old.data.nbytes if old else 0) > self.capacity_bytes:
                self._tally.add("full")
                return WriteResult(Outcome.FULL)
            self._forget(item.ref)
            self._held[item.ref] = _Held(item.checksum, data)
            self._used_bytes += data.nbytes
        return WriteResult(Outcome.OK, data.nbytes)

    def _read(self, item: TierItem) -> Outcome:
        with self._lock:
            held = self._held.get(item.ref)
        if held is None:
            self._tally.add("missing")
            return Outcome.MISSING
        try:
            out = self._memory.view(item.range)
        except KeyError:
            self._tally.add("unmapped")
            return Outcome.BUSY
        if (held.checksum, held.data.nbytes) != (item.checksum, out.nbytes):
            self._tally.add("missing")  # what is held is another content, and not damaged
            return Outcome.MISSING
        np.copyto(out, held.data)
        if block_checksum(out) == item.checksum:
            return Outcome.OK
        self._tally.add("corrupt")
        with self._lock:
            if self._held.get(item.ref) is held:  # not a newer copy, written meanwhile
                self._forget(item.ref)
        return Outcome.CORRUPT

    def _forget(self, ref: BlockRef) -> None:
        held = self._held.pop(ref, None)
        if held is not None:
            self._used_bytes -= held.data.nbytes
