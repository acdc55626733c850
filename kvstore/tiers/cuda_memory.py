"""Pieces of a CUDA device's memory, which another process may be let read.

Where the device has virtual memory management a piece is physical memory (cuMemCreate) mapped at an address of its own,
so that its descriptor can be exported and mapped read-only elsewhere. Elsewhere it is cuMemAlloc's.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

from kvstore.protocol.cuda_calls import CudaError
from kvstore.tiers.cuda import CudaDevice

_PLAIN_GRANULARITY = 512


@dataclass(slots=True)
class DevicePiece:
    """Device memory; `handle` is None where it is cuMemAlloc's."""

    address: int
    nbytes: int
    handle: Any = None


class DeviceMemory:
    """Takes and gives back pieces of one device's memory. The caller has entered the device.

    Attributes:
        is_exportable: whether pieces can be exported.
        granularity: sizes are multiples of this.
    """

    def __init__(self, device: CudaDevice, *, exportable: bool = True) -> None:
        """Memory of `device`; `exportable` False: do not even try to make pieces that can be exported."""
        self._device = device
        self._calls = device.calls
        self.is_exportable = (
            exportable
            and device.has_attribute("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED")
            and device.has_attribute("HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED")
        )
        self.granularity = self._granularity() if self.is_exportable else _PLAIN_GRANULARITY

    def take(self, nbytes: int) -> DevicePiece:
        """`nbytes` (a multiple of the granularity) of device memory.

        Raises:
            CudaOutOfMemory: there is not so much.
            CudaError: the driver refuses.
        """
        if not self.is_exportable:
            return DevicePiece(int(self._calls("cuMemAlloc", nbytes)), nbytes)
        handle = self._calls("cuMemCreate", nbytes, self._properties(), 0)
        try:
            return self._map(handle, nbytes, self._calls.api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
        except CudaError:
            self._calls("cuMemRelease", handle)
            raise

    def give(self, piece: DevicePiece) -> None:
        """Give a piece back, or let go of an imported one. Nothing may be copying there."""
        if piece.handle is None:
            self._calls("cuMemFree", piece.address)
            return
        self._calls("cuMemUnmap", piece.address, piece.nbytes)
        self._calls("cuMemAddressFree", piece.address, piece.nbytes)
        self._calls("cuMemRelease", piece.handle)

    def export(self, piece: DevicePiece) -> int:
        """A descriptor of a piece, the caller's to close; it keeps the memory alive wherever it goes.

        Raises:
            CudaError: this piece cannot be exported.
        """
        if piece.handle is None:
            raise CudaError("this device's memory cannot be shared with other processes", "CUDA_ERROR_NOT_SUPPORTED")
        fd = int(self._calls("cuMemExportToShareableHandle", piece.handle, self._descriptor_type(), 0))
        os.set_inheritable(fd, False)
        return fd

    def import_read_only(self, fd: int, nbytes: int) -> DevicePiece:
        """Map another process's piece for reading; `fd` stays the caller's.

        Raises:
            CudaError: it is no such descriptor, or of another device.
        """
        handle = self._calls("cuMemImportFromShareableHandle", fd, self._descriptor_type())
        try:
            return self._map(handle, nbytes, self._calls.api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ)
        except CudaError:
            self._calls("cuMemRelease", handle)
            raise

    def _map(self, handle: Any, nbytes: int, flags: Any) -> DevicePiece:  # noqa: ANN401 - the driver's own types
        calls, api = self._calls, self._calls.api
        address = int(calls("cuMemAddressReserve", nbytes, 0, 0, 0))
        mapped = False
        try:
            calls("cuMemMap", address, nbytes, 0, handle, 0)
            mapped = True
            access = api.CUmemAccessDesc()
            access.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            access.location.id = self._device.ordinal
            access.flags = flags
            calls("cuMemSetAccess", address, nbytes, [access], 1)
        except CudaError:
            with contextlib.suppress(CudaError):
                if mapped:
                    calls("cuMemUnmap", address, nbytes)
                calls("cuMemAddressFree", address, nbytes)
            raise
        return DevicePiece(address, nbytes, handle)

    def _granularity(self) -> int:
        flags = self._calls.api.CUmemAllocationGranularity_flags
        minimum = flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(self._calls("cuMemGetAllocationGranularity", self._properties(), minimum))

    def _properties(self) -> Any:  # noqa: ANN401 - the driver's own type
        api = self._calls.api
        properties = api.CUmemAllocationProp()
        properties.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.requestedHandleTypes = self._descriptor_type()
        properties.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self._device.ordinal
        return properties

    def _descriptor_type(self) -> Any:  # noqa: ANN401 - the driver's own type
        return self._calls.api.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
