"""Slabs registered with the CUDA driver, so that copies need no buffer of the driver's between."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.protocol.cuda_calls import CudaError
from kvstore.tiers.base import SlabMemory
from kvstore.tiers.cuda import CudaDevice

_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE: pinned for every context of the process

_log = logging.getLogger(__name__)


class SegmentMemory(SlabMemory, Protocol):
    """Slab memory that can say what a whole slab is."""

    def segment(self, slab_id: int) -> NDArray[np.uint8]:
        """Every byte of a slab. Raises KeyError for one that is not mapped."""


class _Slab:
    """A slab's bytes, which keep its mapping; `is_pinned` is None until that has been tried."""

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self.array = array
        self.lock = threading.Lock()
        self.is_pinned: bool | None = None


class PinnedSlabs:
    """Registers each slab at its first use. A slab that the driver does not take is used as it is: slower, as right."""

    def __init__(self, device: CudaDevice, memory: SegmentMemory) -> None:
        self._device = device
        self._memory = memory
        self._lock = threading.Lock()  # not held while a slab is registered: that takes milliseconds
        self._slabs: dict[int, _Slab] = {}
        self._stuck: list[_Slab] = []

    def pin(self, slab_id: int) -> bool:
        """Register a slab, if that has not been tried yet; whether it is pinned.

        Raises:
            KeyError: no such slab.
        """
        with self._lock:
            slab = self._slabs.get(slab_id)
            if slab is None:
                slab = self._slabs[slab_id] = _Slab(self._memory.segment(slab_id))
        with slab.lock:
            if slab.is_pinned is None:
                slab.is_pinned = self._register(slab_id, slab.array)
            return slab.is_pinned

    def pinned_bytes(self) -> int:
        """Bytes that the driver has pinned."""
        with self._lock:
            return sum(slab.array.nbytes for slab in self._slabs.values() if slab.is_pinned)

    def forget(self, slab_id: int) -> None:
        """The slab is to be unmapped; nothing copies there any more. One that is not known is fine."""
        self._device.enter()
        with self._lock:
            slab = self._slabs.pop(slab_id, None)
        if slab is None:
            return
        with slab.lock:  # whoever registers it right now is done then, and nobody begins to any more
            if slab.is_pinned:
                self._unregister(slab_id, slab)
            slab.is_pinned = False

    def close(self) -> None:
        """Forget every slab."""
        with self._lock:
            slab_ids = list(self._slabs)
        for slab_id in slab_ids:
            self.forget(slab_id)

    def _register(self, slab_id: int, array: NDArray[np.uint8]) -> bool:
        self._device.enter()
        try:
            self._device.calls("cuMemHostRegister", array.ctypes.data, array.nbytes, _PORTABLE)
        except CudaError as error:
            _log.warning("slab %d is not pinned, copies are slower: %s", slab_id, error)
            return False
        return True

    def _unregister(self, slab_id: int, slab: _Slab) -> None:
        try:
            self._device.calls("cuMemHostUnregister", slab.array.ctypes.data)
        except CudaError as error:
            # It stays mapped too: at an address that is used again the driver would copy from the pages of before.
            self._stuck.append(slab)
            _log.warning("slab %d stays pinned and mapped until this process ends: %s", slab_id, error)
