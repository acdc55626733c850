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


class PinnedSlabs:
    """Registers each slab at its first use. A slab that the driver does not take is used as it is: slower, as right."""

    def __init__(self, device: CudaDevice, memory: SegmentMemory) -> None:
        self._device = device
        self._memory = memory
        self._lock = threading.Lock()
        # The array keeps the mapping: memory must not be unmapped while the driver has it.
        self._slabs: dict[int, tuple[NDArray[np.uint8], bool]] = {}

    def pin(self, slab_id: int) -> bool:
        """Register a slab, if that has not been tried yet; whether it is pinned.

        Raises:
            KeyError: no such slab.
        """
        with self._lock:
            known = self._slabs.get(slab_id)
            if known is None:
                array = self._memory.segment(slab_id)
                known = self._slabs[slab_id] = (array, self._register(slab_id, array))
            return known[1]

    def pinned_bytes(self) -> int:
        """Bytes that the driver has pinned."""
        with self._lock:
            return sum(array.nbytes for array, pinned in self._slabs.values() if pinned)

    def forget(self, slab_id: int) -> None:
        """The slab is to be unmapped; nothing copies there any more. One that is not known is fine."""
        self._device.enter()
        with self._lock:
            array, pinned = self._slabs.pop(slab_id, (None, False))
        if array is not None and pinned:
            self._unregister(slab_id, array)

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

    def _unregister(self, slab_id: int, array: NDArray[np.uint8]) -> None:
        try:
            self._device.calls("cuMemHostUnregister", array.ctypes.data)
        except CudaError as error:  # its pages go when this process does
            _log.warning("slab %d stays pinned: %s", slab_id, error)
