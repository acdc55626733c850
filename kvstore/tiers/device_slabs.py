"""A device's memory as slabs of equal slots.

All of it is taken at the start, so that an engine on the same device knows what is left to it. A slab is cut when a
size of block needs one and becomes whole again with its last block, so memory moves to the sizes that are used.
"""

from __future__ import annotations

import heapq
import logging
import threading
from typing import NamedTuple

from kvstore.protocol.cuda_calls import CudaError, CudaOutOfMemory
from kvstore.tiers.cuda_memory import DeviceMemory, DevicePiece

_SLAB_MIN_BYTES, _SLAB_MAX_BYTES = 64 << 20, 512 << 20
_SLABS = 32  # of a large tier: few for what they cost to make, enough for sizes of block to come and go
_SLABS_MIN = 8  # of a small tier, so that several sizes of block find one each
_SLOT_ALIGNMENT = 512

_log = logging.getLogger(__name__)


class DeviceSlot(NamedTuple):
    """Room for one block; `address` is the device's."""

    slab: int
    number: int
    address: int


class _Slab:
    """A piece of memory, cut into slots of `slot_bytes`; 0: not cut."""

    __slots__ = ("free", "piece", "slot_bytes", "slots")

    def __init__(self, piece: DevicePiece) -> None:
        self.piece = piece
        self.slot_bytes = 0
        self.slots = 0
        self.free: list[int] = []  # a heap: neighbours are handed out one after the other, and copied as one

    def cut(self, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.slots = self.piece.nbytes // slot_bytes
        self.free = list(range(self.slots))


class DeviceSlabs:
    """Gives out slots. Any thread that has entered the device."""

    def __init__(self, memory: DeviceMemory, capacity_bytes: int) -> None:
        """Take up to `capacity_bytes` of `memory`, in slabs: as many as there are.

        Raises:
            CudaOutOfMemory: there is not one slab.
            CudaError: the driver refuses.
        """
        grain = memory.granularity
        large = max(_SLAB_MIN_BYTES, min(_SLAB_MAX_BYTES, capacity_bytes // _SLABS))
        self.slab_bytes = max(grain, min(large, capacity_bytes // _SLABS_MIN) // grain * grain)
        self._memory = memory
        self._lock = threading.Lock()
        self._slabs: dict[int, _Slab] = {}
        self._whole: list[int] = []
        self._open: dict[int, dict[int, None]] = {}  # by size of slot, slabs with a free one, in order of their opening
        self._next_id = 0
        self._retiring: set[int] = set()  # to be given back once they are whole
        self.asked_bytes = capacity_bytes
        try:
            self._grow(max(1, capacity_bytes // self.slab_bytes))
        except CudaError:
            self.close()
            raise
        if not self._slabs:
            raise CudaOutOfMemory(f"not even one slab of {self.slab_bytes} bytes is free on the device")

    @property
    def capacity_bytes(self) -> int:
        """What blocks can take: all slabs, less what the cut ones cannot use at their end."""
        with self._lock:
            kept = [slab for slab_id, slab in self._slabs.items() if slab_id not in self._retiring]
            return sum(slab.slots * slab.slot_bytes or slab.piece.nbytes for slab in kept)

    def counts(self) -> dict[str, int]:
        """Slabs, and how many of them no block is in."""
        with self._lock:
            return {"slabs": len(self._slabs), "whole_slabs": len(self._whole)}

    def take(self, nbytes: int) -> DeviceSlot | None:
        """Room for a block; None where there is none for its size."""
        slot_bytes = max(1, -(-nbytes // _SLOT_ALIGNMENT)) * _SLOT_ALIGNMENT
        with self._lock:
            slab_id = self._with_room(slot_bytes)
            if slab_id is None:
                return None
            slab = self._slabs[slab_id]
            index = heapq.heappop(slab.free)
            if not slab.free:
                del self._open[slot_bytes][slab_id]
            return DeviceSlot(slab_id, index, slab.piece.address + index * slot_bytes)

    def give(self, slot: DeviceSlot) -> None:
        """The block in a slot has gone, and nothing copies there."""
        with self._lock:
            slab = self._slabs.get(slot.slab)
            if slab is None:  # after close()
                return
            heapq.heappush(slab.free, slot.number)
            if len(slab.free) == slab.slots:
                self._open.get(slab.slot_bytes, {}).pop(slot.slab, None)
                slab.slot_bytes = slab.slots = 0
                self._whole.append(slot.slab)
                self._release()
            elif slot.slab not in self._retiring:
                self._open.setdefault(slab.slot_bytes, {})[slot.slab] = None

    def resize(self, capacity_bytes: int) -> int:
        """Be of about that size, as far as the device allows; the capacity from now on.

        A slab with blocks in it goes when its last block has left it: see retiring().
        """
        with self._lock:
            wanted = max(1, capacity_bytes // self.slab_bytes)
            kept = [slab_id for slab_id in self._slabs if slab_id not in self._retiring]
            if wanted < len(kept):
                kept.sort(key=lambda slab_id: self._slabs[slab_id].slots - len(self._slabs[slab_id].free))
                for slab_id in kept[: len(kept) - wanted]:
                    self._retiring.add(slab_id)
                    self._open.get(self._slabs[slab_id].slot_bytes, {}).pop(slab_id, None)
            for slab_id in list(self._retiring)[: max(0, wanted - len(kept))]:
                self._retiring.remove(slab_id)
                if self._slabs[slab_id].free:
                    self._open.setdefault(self._slabs[slab_id].slot_bytes, {})[slab_id] = None
            self._grow(wanted - len(self._slabs) + len(self._retiring))
            self.asked_bytes = capacity_bytes
            self._release()
        return self.capacity_bytes

    def retiring(self) -> frozenset[int]:
        """Slabs that are only waiting for the blocks in them to leave."""
        with self._lock:
            return frozenset(self._retiring)

    def close(self) -> None:
        """Give everything back; idempotent."""
        with self._lock:
            slabs, self._slabs = self._slabs, {}
            self._whole.clear()
            self._open.clear()
            self._retiring.clear()
        for slab in slabs.values():
            self._memory.give(slab.piece)

    def _with_room(self, slot_bytes: int) -> int | None:
        opened = self._open.setdefault(slot_bytes, {})
        if opened:
            return next(iter(opened))
        if not self._whole or slot_bytes > self.slab_bytes:
            return None
        slab_id = self._whole.pop()
        self._slabs[slab_id].cut(slot_bytes)
        opened[slab_id] = None
        return slab_id

    def _grow(self, count: int) -> None:
        for _ in range(count):
            try:
                piece = self._memory.take(self.slab_bytes)
            except CudaOutOfMemory as error:
                taken = len(self._slabs)
                _log.warning("the device gave %d slabs of %d bytes, and no more: %s", taken, self.slab_bytes, error)
                return
            self._slabs[self._next_id] = _Slab(piece)
            self._whole.append(self._next_id)
            self._next_id += 1

    def _release(self) -> None:
        """Give back retired slabs that are whole."""
        for slab_id in self._retiring.intersection(self._whole):
            self._whole.remove(slab_id)
            self._retiring.remove(slab_id)
            try:
                self._memory.give(self._slabs.pop(slab_id).piece)
            except (
                CudaError
            ) as error:  # it is whoever gave the last slot back that comes by here, and none of his doing
                _log.warning("%d bytes stay taken until this process ends: %s", self.slab_bytes, error)
