"""The hot tier: raw blocks in the memory of a CUDA device.

The warm slabs are registered with the driver at their first use. A call copies on a stream of its own, and hashes the
host's bytes while the device copies them; a slot is published, reused or given back only after its copy has ended.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.protocol.cuda_calls import CudaError, CudaOutOfMemory
from kvstore.protocol.cuda_copies import Direction, Run
from kvstore.tiers.base import BlockRef, Outcome, Tier, TierItem, WriteResult
from kvstore.tiers.checksums import block_checksum
from kvstore.tiers.cuda import CudaDevice
from kvstore.tiers.cuda_copies import Copier
from kvstore.tiers.cuda_memory import DeviceMemory
from kvstore.tiers.device_slabs import DeviceSlabs, DeviceSlot
from kvstore.tiers.pinned import PinnedSlabs, SegmentMemory
from kvstore.tiers.tally import Tally

_log = logging.getLogger(__name__)


class _Held:
    """A block on the device; `readers` copy from its slot right now, `gone` says that nobody may begin to."""

    __slots__ = ("checksum", "gone", "nbytes", "readers", "slot")

    def __init__(self, slot: DeviceSlot, nbytes: int, checksum: bytes) -> None:
        self.slot = slot
        self.nbytes = nbytes
        self.checksum = checksum
        self.readers = 0
        self.gone = False


class _Part:
    """An item that is being copied: its bytes in host memory, and where it lies on the device."""

    __slots__ = ("array", "at", "held", "item")

    def __init__(self, at: int, item: TierItem, array: NDArray[np.uint8], held: _Held) -> None:
        self.at = at
        self.item = item
        self.array = array
        self.held = held


class HotCuda(Tier):
    """Blocks on one device. Any thread may call any method; a batch is one set of copies on one stream."""

    def __init__(
        self,
        device: CudaDevice,
        capacity_bytes: int,
        memory: SegmentMemory,
        *,
        exportable: bool = True,
    ) -> None:
        """Take up to `capacity_bytes` of `device`, which is this tier's to close from now on.

        Raises:
            CudaOutOfMemory: there is no room for a single slab.
            CudaError: the driver refuses.
        """
        self.name = "hot"
        self._device = device
        self._memory = memory
        self._lock = threading.Lock()
        self._held: dict[BlockRef, _Held] = {}
        self._used_bytes = 0
        self._closed = False
        self._tally = Tally(("corrupt", "missing", "full", "unmapped", "too_large", "copy_errors"))
        try:
            self._pins = PinnedSlabs(device, memory)
            self._copier = Copier(device)
            self._slabs = _slabs(device, capacity_bytes, exportable)
        except CudaError:
            device.close()
            raise
        self.capacity_bytes = self._slabs.capacity_bytes  # what blocks can take: follows how slabs are cut, in stats()

    def write(self, items: Sequence[TierItem]) -> list[WriteResult]:
        """Copy blocks to the device.

        FULL where no slot of their size is free, CORRUPT where their checksum fails, BUSY where no slab is so large.
        """
        self._device.enter()
        results = [WriteResult(Outcome.BUSY)] * len(items)
        parts: list[_Part] = []
        for at, item in enumerate(items):
            outcome = self._prepare_write(at, item, parts)
            if outcome is not Outcome.OK:
                results[at] = WriteResult(outcome)
        sound = self._copy(Direction.TO_DEVICE, parts)
        for part in parts:
            if sound is None:
                self._slabs.give(part.held.slot)
            elif not sound[part.at]:
                self._tally.add("corrupt")
                self._slabs.give(part.held.slot)
                results[part.at] = WriteResult(Outcome.CORRUPT)
            else:
                results[part.at] = self._publish(part)
        return results

    def read(self, items: Sequence[TierItem]) -> list[Outcome]:
        """Copy blocks from the device; a copy that fails its checksum is dropped."""
        self._device.enter()
        outcomes = [Outcome.BUSY] * len(items)
        parts: list[_Part] = []
        for at, item in enumerate(items):
            outcomes[at] = self._prepare_read(at, item, parts)
        sound = self._copy(Direction.FROM_DEVICE, parts)
        for part in parts:
            if sound is None:
                outcomes[part.at] = Outcome.BUSY
            elif not sound[part.at]:
                self._tally.add("corrupt")
                outcomes[part.at] = Outcome.CORRUPT
                self._drop(part.item.ref, part.held)
            self._end_read(part.held)
        return outcomes

    def delete(self, refs: Sequence[BlockRef]) -> None:
        """Forget blocks; the slot of one that is being read comes free with its last reader."""
        self._device.enter()
        for ref in refs:
            with self._lock:
                held = self._held.get(ref)
            if held is not None:
                self._drop(ref, held)

    def stats(self) -> Mapping[str, int]:
        """Blocks and bytes held, the memory behind them, and what went wrong."""
        self._device.enter()
        self._move_out()
        self.capacity_bytes = self._slabs.capacity_bytes
        with self._lock:
            blocks, used = len(self._held), self._used_bytes
        return {
            "blocks": blocks,
            "raw_bytes": used,
            "stored_bytes": used,
            "capacity_bytes": self.capacity_bytes,
            "pinned_bytes": self._pins.pinned_bytes(),
            **self._slabs.counts(),
            **self._tally.snapshot(),
        }

    def resize(self, capacity_bytes: int) -> int:
        """Be of another size, slab by slab; the capacity from now on. Blocks are the caller's to delete first.

        What is left in slabs that go is moved to others as room comes free, now and whenever statistics are asked for.
        """
        self._device.enter()
        self.capacity_bytes = self._slabs.resize(capacity_bytes)
        self._move_out()
        return self.capacity_bytes

    def slab_unmapped(self, slab_id: int) -> None:
        """A warm slab is about to be unmapped."""
        self._pins.forget(slab_id)

    def close(self) -> None:
        """Give everything back to the device. Reads are MISSING and writes FULL from here on; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._held.clear()
            self._used_bytes = 0
        self._device.enter()
        self._copier.close()
        self._pins.close()
        self._slabs.close()
        self._device.close()

    # -- one block --------------------------------------------------------------------------------------------

    def _prepare_write(self, at: int, item: TierItem, parts: list[_Part]) -> Outcome:
        try:
            array = self._memory.view(item.range)
        except KeyError:
            self._tally.add("unmapped")
            return Outcome.BUSY
        if array.nbytes > self._slabs.slab_bytes:  # not FULL: no room that others could make would help
            self._tally.add("too_large")
            return Outcome.BUSY
        slot = self._slabs.take(array.nbytes)
        if slot is None:
            self._tally.add("full")
            return Outcome.FULL
        parts.append(_Part(at, item, array, _Held(slot, array.nbytes, item.checksum)))
        return Outcome.OK

    def _prepare_read(self, at: int, item: TierItem, parts: list[_Part]) -> Outcome:
        try:
            array = self._memory.view(item.range)
        except KeyError:
            array = None
        with self._lock:
            held = self._held.get(item.ref)
            missing = held is None or (held.checksum, held.nbytes) != (item.checksum, item.range.nbytes)
            if held is not None and not missing and array is not None:
                held.readers += 1
                parts.append(_Part(at, item, array, held))
                return Outcome.OK
        self._tally.add("missing" if missing else "unmapped")
        return Outcome.MISSING if missing else Outcome.BUSY

    def _publish(self, part: _Part) -> WriteResult:
        old = None
        with self._lock:
            if self._closed:
                return WriteResult(Outcome.FULL)
            old = self._held.get(part.item.ref)
            self._held[part.item.ref] = part.held
            self._used_bytes += part.held.nbytes
            idle = old is not None and self._retire(old)
        if idle and old is not None:
            self._slabs.give(old.slot)
        return WriteResult(Outcome.OK, part.held.nbytes)

    def _drop(self, ref: BlockRef, held: _Held) -> None:
        """Forget this copy of a block, unless a newer one has taken its place."""
        with self._lock:
            if self._held.get(ref) is not held:
                return
            del self._held[ref]
            idle = self._retire(held)
        if idle:
            self._slabs.give(held.slot)

    def _retire(self, held: _Held) -> bool:
        """Under the lock: nobody begins to read it any more; whether its slot is free now."""
        held.gone = True
        self._used_bytes -= held.nbytes
        return not held.readers

    def _end_read(self, held: _Held) -> None:
        with self._lock:
            held.readers -= 1
            idle = held.gone and not held.readers
        if idle:
            self._slabs.give(held.slot)

    # -- slabs that go ----------------------------------------------------------------------------------------

    def _move_out(self) -> None:
        """Copy blocks that nobody reads out of slabs that are to be given back, as far as others have room."""
        retiring = self._slabs.retiring()
        if not retiring:
            return
        with self._lock:
            moving = [held for held in self._held.values() if held.slot.slab in retiring and not held.readers]
            for held in moving:
                held.readers += 1  # as if it were read: its slot stays until the copy has ended
        places = [self._slabs.take(held.nbytes) for held in moving]
        runs = [
            Run(place.address, held.slot.address, held.nbytes)
            for held, place in zip(moving, places, strict=True)
            if place is not None
        ]
        is_copied = True
        try:
            if runs:
                self._copier.start(Direction.ON_DEVICE, runs).wait()
        except CudaError as error:
            is_copied = False
            _log.warning("%d blocks stay in slabs that are to go: %s", len(runs), error)
        for held, place in zip(moving, places, strict=True):
            self._settle_move(held, place if is_copied else None)
            if place is not None and not is_copied:
                self._slabs.give(place)

    def _settle_move(self, held: _Held, place: DeviceSlot | None) -> None:
        free: DeviceSlot | None = place
        with self._lock:
            held.readers -= 1
            if held.gone and not held.readers:
                self._slabs.give(held.slot)
            elif place is not None and not held.gone and not held.readers:
                held.slot, free = place, held.slot
        if free is not None:
            self._slabs.give(free)

    # -- copies -----------------------------------------------------------------------------------------------

    def _copy(self, direction: Direction, parts: Sequence[_Part]) -> dict[int, bool] | None:
        """Copy all parts; by position whether the host's bytes have their checksum. None: the driver refused."""
        if not parts:
            return {}
        inward = direction is Direction.TO_DEVICE
        try:
            pinned = all(self._pins.pin(slab_id) for slab_id in {part.item.range.slab_id for part in parts})
        except KeyError:  # unmapped since it was looked up
            self._tally.add("unmapped", len(parts))
            return None
        try:
            copying = self._copier.start(direction, [_run(part, inward) for part in parts], pinned=pinned)
            try:
                sound = _checked(parts) if inward else {}
            finally:
                copying.wait()
        except CudaError as error:
            self._tally.add("copy_errors", len(parts))
            _log.warning("%d copies failed: %s", len(parts), error)
            return None
        return sound if inward else _checked(parts)


def _slabs(device: CudaDevice, capacity_bytes: int, exportable: bool) -> DeviceSlabs:
    memory = DeviceMemory(device, exportable=exportable)
    try:
        return DeviceSlabs(memory, capacity_bytes)
    except CudaOutOfMemory:
        raise
    except CudaError as error:  # a device may claim what its container or hypervisor forbids
        if not memory.is_exportable:
            raise
        _log.warning("device memory cannot be shared with other processes: %s", error)
        return DeviceSlabs(DeviceMemory(device, exportable=False), capacity_bytes)


def _run(part: _Part, inward: bool) -> Run:
    host, device = int(part.array.ctypes.data), part.held.slot.address
    return Run(device, host, part.array.nbytes) if inward else Run(host, device, part.array.nbytes)


def _checked(parts: Sequence[_Part]) -> dict[int, bool]:
    return {part.at: block_checksum(part.array) == part.item.checksum for part in parts}
