"""A CUDA driver in host memory, with the functions of cuda.bindings.driver that this project calls.

Device pointers are numbers that no host address has; behind them lies real memory, so bytes can be compared. Copies run
when their stream is waited for and not before, so a missing wait shows. Every call is recorded, any call can be made to
fail, and `leaks()` says what was not given back.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

GRANULARITY = 64 << 10
# What the driver calls potentially unsafe while any thread captures.
_UNSAFE = {"cuMemHostRegister", "cuMemHostUnregister", "cuMemAlloc", "cuMemFree", "cuEventQuery", "cuStreamCreate"}
_FIRST_ADDRESS = 0x7F00_0000_0000_0000  # no process has memory there


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712
    CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900


class CUdevice_attribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102
    CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED = 103
    CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED = 113


class CUstreamCaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_GLOBAL = 0
    CU_STREAM_CAPTURE_MODE_RELAXED = 2


CUpointer_attribute = IntEnum("CUpointer_attribute", {"CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL": 9})
CUmemAllocationType = IntEnum("CUmemAllocationType", {"CU_MEM_ALLOCATION_TYPE_PINNED": 1})
CUmemAllocationHandleType = IntEnum("CUmemAllocationHandleType", {"CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR": 1})
CUmemLocationType = IntEnum("CUmemLocationType", {"CU_MEM_LOCATION_TYPE_DEVICE": 1})


class CUmemAccess_flags(IntEnum):
    CU_MEM_ACCESS_FLAGS_PROT_READ = 1
    CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3


CUmemAllocationGranularity_flags = IntEnum("CUmemAllocationGranularity_flags", {"CU_MEM_ALLOC_GRANULARITY_MINIMUM": 0})
CUmemcpySrcAccessOrder = IntEnum("CUmemcpySrcAccessOrder", {"CU_MEMCPY_SRC_ACCESS_ORDER_STREAM": 1})


class CUmemorytype(IntEnum):
    CU_MEMORYTYPE_HOST = 1
    CU_MEMORYTYPE_DEVICE = 2


class CUdeviceptr(int):
    pass


def _structure(**fields: Any) -> Callable[[], SimpleNamespace]:
    return lambda: SimpleNamespace(**{name: value() if callable(value) else value for name, value in fields.items()})


class _Memory:
    """Physical memory; `fds` are its exported descriptors' inodes."""

    def __init__(self, nbytes: int) -> None:
        self.data: NDArray[np.uint8] = np.zeros(nbytes, np.uint8)
        self.holders = 1


class _Span:
    """A range of device addresses."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.memory: _Memory | None = None
        self.flags = 0


Refusal = CUresult | Callable[..., Any]


class FakeDriver:
    """Stands for the module; `free_bytes` is what the device has."""

    CUresult, CUdevice_attribute, CUdeviceptr = CUresult, CUdevice_attribute, CUdeviceptr
    CUpointer_attribute = CUpointer_attribute
    CUmemAllocationType, CUmemAllocationHandleType = CUmemAllocationType, CUmemAllocationHandleType
    CUmemLocationType, CUmemAccess_flags = CUmemLocationType, CUmemAccess_flags
    CUmemAllocationGranularity_flags, CUmemcpySrcAccessOrder = CUmemAllocationGranularity_flags, CUmemcpySrcAccessOrder
    CUmemorytype, CUstreamCaptureMode = CUmemorytype, CUstreamCaptureMode
    CUmemAllocationProp = staticmethod(_structure(type=0, requestedHandleTypes=0, location=_structure(type=0, id=0)))
    CUmemAccessDesc = staticmethod(_structure(location=_structure(type=0, id=0), flags=0))
    CUmemcpyAttributes = staticmethod(_structure(srcAccessOrder=0))
    CUDA_MEMCPY2D = staticmethod(
        _structure(srcMemoryType=0, dstMemoryType=0, srcHost=0, dstHost=0, srcDevice=0, dstDevice=0, srcPitch=0,
                   dstPitch=0, WidthInBytes=0, Height=0)
    )  # fmt: skip

    def __init__(self, free_bytes: int = 64 << 20, devices: int = 1, *, attributes: int = 1) -> None:
        self.free_bytes = self.total_bytes = free_bytes
        self.devices = devices
        self.attributes = attributes
        self.calls: list[tuple[Any, ...]] = []
        self.registered: dict[int, tuple[int, int]] = {}  # host address: bytes, flags
        self.capturing: int | None = None  # a stream whose work another thread captures: spoilt by many a call
        self.spoilt_by: list[str] = []
        self.before_call: Callable[[str], None] = lambda name: None
        self._lock = threading.RLock()
        self._refusals: dict[str, tuple[int, Refusal]] = {}
        self._counts: Counter[str] = Counter()
        self._current = threading.local()
        self._contexts: Counter[int] = Counter()
        self._next = _FIRST_ADDRESS - (1 << 40)  # of handles, streams and events
        self._next_address = _FIRST_ADDRESS
        self._spans: dict[int, _Span] = {}
        self._handles: dict[int, _Memory] = {}
        self._exported: dict[int, _Memory] = {}  # by inode
        self._streams: dict[int, list[Callable[[], None]]] = {0: []}
        self._events: dict[int, tuple[int, int]] = {}  # event: stream, commands before it
        self._done: Counter[int] = Counter()  # commands of a stream that ran

    # -- for tests --------------------------------------------------------------------------------------------

    def refuse(self, name: str, how: Refusal, after: int = 0) -> None:
        """Let a function give `how` (or what it gives) from its call number `after` on."""
        self._refusals[name] = (self._counts[name] + after, how)

    def relent(self, name: str) -> None:
        """Let a function work again."""
        self._refusals.pop(name, None)

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        """The recorded calls of some functions, in order."""
        return [call for call in self.calls if call[0] in names]

    def leaks(self) -> dict[str, int]:
        """What was made and not given back."""
        found = {
            "addresses": len(self._spans),
            "handles": len(self._handles),
            "streams": len(self._streams) - 1,
            "events": len(self._events),
            "registered": len(self.registered),
            "contexts": sum(self._contexts.values()),
        }
        return {name: count for name, count in found.items() if count}

    def bytes_at(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        """The device's bytes as they are now; copies that nobody waited for have not happened."""
        return self._range(address, nbytes, 0)

    def array(self, shape: tuple[int, ...], itemsize: int = 1, **interface: Any) -> FakeArray:
        """Device memory as an array library hands it out."""
        self.cuCtxSetCurrent(1000)
        _, address = self.cuMemAlloc(math.prod(shape) * itemsize)
        return FakeArray(self, address, shape, itemsize, interface)

    def under_way(self) -> int:
        """Copies that were begun and not waited for."""
        return sum(len(queue) - self._done[stream] for stream, queue in self._streams.items())

    # -- the driver -------------------------------------------------------------------------------------------

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("cu") or name == "cuGetErrorString" or not callable(value):
            return value

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.before_call(name)
            with self._lock:
                self.calls.append((name, *arguments))
                self._counts[name] += 1
                after, how = self._refusals.get(name, (1 << 60, CUresult.CUDA_SUCCESS))
                if self.capturing is not None and name in _UNSAFE and not getattr(self._current, "mode", 0):
                    self.spoilt_by.append(name)
                    return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
                if self._counts[name] > after:
                    refused = how(*arguments) if not isinstance(how, CUresult) else (how,)
                    if refused is not None:
                        return refused
                try:
                    given = value(*arguments)
                except _Refused as refusal:
                    return (refusal.args[0],)
            if given is None:
                return (CUresult.CUDA_SUCCESS,)
            return (CUresult.CUDA_SUCCESS, *given) if isinstance(given, tuple) else (CUresult.CUDA_SUCCESS, given)

        return call

    def cuGetErrorString(self, result: CUresult) -> tuple[CUresult, bytes]:
        return CUresult.CUDA_SUCCESS, f"in words: {result.name.lower()}".encode()

    def cuInit(self, flags: int) -> None:
        pass

    def cuDriverGetVersion(self) -> int:
        return 13000

    def cuDeviceGetCount(self) -> int:
        return self.devices

    def cuDeviceGet(self, ordinal: int) -> int:
        return ordinal

    def cuDeviceGetName(self, length: int, device: int) -> bytes:
        return b"Fake GPU\0\0\0"

    def cuDeviceGetAttribute(self, attribute: CUdevice_attribute, device: int) -> int:
        return self.attributes

    def cuDevicePrimaryCtxRetain(self, device: int) -> int:
        self._contexts[device] += 1
        return 1000 + device

    def cuDevicePrimaryCtxRelease(self, device: int) -> None:
        self._contexts[device] -= 1

    def cuCtxSetCurrent(self, context: int) -> None:
        self._current.stack = [context]

    def cuCtxPushCurrent(self, context: int) -> None:
        self._current.stack = [*getattr(self._current, "stack", []), context]

    def cuCtxPopCurrent(self) -> int:
        self._need_context()
        context: int = self._current.stack.pop()
        return context

    def cuThreadExchangeStreamCaptureMode(self, mode: CUstreamCaptureMode) -> CUstreamCaptureMode:
        before = getattr(self._current, "mode", CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
        self._current.mode = mode
        return CUstreamCaptureMode(before)

    def cuStreamIsCapturing(self, stream: int) -> int:
        self._need_context()
        return int(stream == self.capturing)

    def cuPointerGetAttribute(self, attribute: CUpointer_attribute, address: int) -> int:
        self._range(address, 1, 0)
        return 0

    def cuMemGetInfo(self) -> tuple[int, int]:
        self._need_context()
        return self.free_bytes, self.total_bytes

    def cuMemGetAllocationGranularity(self, properties: Any, option: Any) -> int:
        assert properties.type and properties.requestedHandleTypes and properties.location.type
        return GRANULARITY

    def cuMemCreate(self, nbytes: int, properties: Any, flags: int) -> int:
        assert nbytes % GRANULARITY == 0
        return self._handle(self._allocate(nbytes))

    def cuMemRelease(self, handle: int) -> None:
        self._drop(self._handles.pop(handle))

    def cuMemAddressReserve(self, nbytes: int, alignment: int, address: int, flags: int) -> int:
        return self._span(nbytes)

    def cuMemAddressFree(self, address: int, nbytes: int) -> None:
        assert self._spans[address].memory is None, "freed while mapped"
        assert self._spans.pop(address).nbytes == nbytes

    def cuMemMap(self, address: int, nbytes: int, offset: int, handle: int, flags: int) -> None:
        memory, span = self._handles[handle], self._spans[address]
        assert (span.nbytes, span.memory) == (nbytes, None) and memory.data.nbytes == nbytes
        memory.holders += 1
        span.memory = memory

    def cuMemSetAccess(self, address: int, nbytes: int, access: list[Any], count: int) -> None:
        assert len(access) == count == 1
        self._spans[address].flags = int(access[0].flags)

    def cuMemUnmap(self, address: int, nbytes: int) -> None:
        span = self._spans[address]
        assert span.memory is not None and span.nbytes == nbytes
        self._drop(span.memory)
        span.memory, span.flags = None, 0

    def cuMemExportToShareableHandle(self, handle: int, kind: Any, flags: int) -> int:
        fd = os.memfd_create("fake-device")
        self._exported[os.fstat(fd).st_ino] = self._handles[handle]
        return fd

    def cuMemImportFromShareableHandle(self, fd: int, kind: Any) -> int:
        memory = self._exported.get(os.fstat(fd).st_ino)
        if memory is None:
            raise _Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
        memory.holders += 1
        return self._handle(memory)

    def cuMemAlloc(self, nbytes: int) -> int:
        self._need_context()
        memory = self._allocate(nbytes)
        address = self._span(nbytes)
        self._spans[address].memory, self._spans[address].flags = memory, 3
        return address

    def cuMemFree(self, address: int) -> None:
        self._need_context()
        memory = self._spans.pop(address).memory
        assert memory is not None
        self._drop(memory)

    def cuMemHostRegister(self, address: int, nbytes: int, flags: int) -> None:
        self._need_context()
        if any(at < address + nbytes and address < at + size for at, (size, _) in self.registered.items()):
            raise _Refused(CUresult.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED)
        self.registered[address] = (nbytes, flags)

    def cuMemHostUnregister(self, address: int) -> None:
        self._need_context()
        if self.registered.pop(address, None) is None:
            raise _Refused(CUresult.CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED)

    def cuStreamCreate(self, flags: int) -> int:
        self._need_context()
        self._next += 8
        self._streams[self._next] = []
        return self._next

    def cuStreamDestroy(self, stream: int) -> None:
        self._need_context()
        assert self._done[stream] == len(self._streams.pop(stream)), "destroyed with copies under way"

    def cuStreamSynchronize(self, stream: int) -> None:
        self._run(stream, len(self._streams[stream]))

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        self._need_context()
        other, upto = self._events[event]
        self._streams[stream].append(lambda: self._run(other, upto))

    def cuEventCreate(self, flags: int) -> int:
        self._need_context()
        self._next += 8
        self._events[self._next] = (0, 0)
        return self._next

    def cuEventDestroy(self, event: int) -> None:
        del self._events[event]

    def cuEventRecord(self, event: int, stream: int) -> None:
        self._need_context()
        assert event in self._events
        self._events[event] = (stream, len(self._streams[stream]))

    def cuEventQuery(self, event: int) -> None:
        self._run(*self._events[event])

    def cuMemcpyHtoDAsync(self, to: int, source: int, nbytes: int, stream: int) -> None:
        target = self._range(to, nbytes, CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
        self._enqueue(stream, lambda: ctypes.memmove(target.ctypes.data, source, nbytes))

    def cuMemcpyDtoHAsync(self, to: int, source: int, nbytes: int, stream: int) -> None:
        origin = self._range(source, nbytes, CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ)
        self._enqueue(stream, lambda: ctypes.memmove(to, origin.ctypes.data, nbytes))

    def cuMemcpyDtoDAsync(self, to: int, source: int, nbytes: int, stream: int) -> None:
        target = self._range(to, nbytes, CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
        origin = self._range(source, nbytes, CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ)
        self._enqueue(stream, lambda: np.copyto(target, origin))

    def cuMemcpy2DAsync(self, copy: Any, stream: int) -> None:
        assert copy.WidthInBytes <= min(copy.srcPitch, copy.dstPitch)
        for row in range(copy.Height):
            to, source = self._row(copy, "dst", row), self._row(copy, "src", row)
            self._copy_any(to, source, copy.WidthInBytes, stream)

    def cuMemcpyBatchAsync(
        self, to: list[int], source: list[int], sizes: list[int], count: int, how: list[Any], at: list[int],
        numbers: int, stream: int,
    ) -> None:  # fmt: skip
        assert len(to) == len(source) == len(sizes) == count and (len(how), at, numbers) == (1, [0], 1)
        assert all(isinstance(address, CUdeviceptr) for address in [*to, *source]) and stream
        for item in zip(to, source, sizes, strict=True):
            self._copy_any(*item, stream)

    # -- inside -----------------------------------------------------------------------------------------------

    def _copy_any(self, to: int, source: int, nbytes: int, stream: int) -> None:
        on_device = (to >= _FIRST_ADDRESS, source >= _FIRST_ADDRESS)
        copy = {
            (True, False): self.cuMemcpyHtoDAsync,
            (False, True): self.cuMemcpyDtoHAsync,
            (True, True): self.cuMemcpyDtoDAsync,
        }[on_device]
        result, *_ = copy(to, source, nbytes, stream)
        if result:
            raise _Refused(result)

    def _row(self, copy: Any, side: str, row: int) -> int:
        kind = getattr(copy, f"{side}MemoryType")
        base = getattr(copy, f"{side}Host" if kind == CUmemorytype.CU_MEMORYTYPE_HOST else f"{side}Device")
        return int(base) + row * int(getattr(copy, f"{side}Pitch"))

    def _need_context(self) -> None:
        if not getattr(self._current, "stack", None):
            raise _Refused(CUresult.CUDA_ERROR_INVALID_CONTEXT)

    def _allocate(self, nbytes: int) -> _Memory:
        if nbytes > self.free_bytes:
            raise _Refused(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        self.free_bytes -= nbytes
        return _Memory(nbytes)

    def _drop(self, memory: _Memory) -> None:
        memory.holders -= 1
        if not memory.holders:
            self.free_bytes += memory.data.nbytes

    def _handle(self, memory: _Memory) -> int:
        self._next += 8
        self._handles[self._next] = memory
        return self._next

    def _span(self, nbytes: int) -> int:
        address = self._next_address  # without a gap, as a driver does: a copy may not cross from one into the next
        self._spans[address] = _Span(nbytes)
        self._next_address += -(-nbytes // GRANULARITY) * GRANULARITY
        return address

    def _range(self, address: int, nbytes: int, access: int) -> NDArray[np.uint8]:
        for base, span in self._spans.items():
            if base <= address < base + span.nbytes:
                if address + nbytes > base + span.nbytes:
                    raise _Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
                if span.memory is None or span.flags & access != access:
                    break
                return span.memory.data[address - base : address - base + nbytes]
        raise _Refused(CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)

    def _enqueue(self, stream: int, copy: Callable[[], Any]) -> None:
        self._need_context()
        self._streams[stream].append(copy)

    def _run(self, stream: int, upto: int) -> None:
        queue = self._streams.get(stream, [])
        while self._done[stream] < min(upto, len(queue)):
            position = self._done[stream]
            self._done[stream] += 1
            queue[position]()


class FakeArray:
    """An array on the device with `__cuda_array_interface__`."""

    def __init__(
        self, driver: FakeDriver, address: int, shape: tuple[int, ...], itemsize: int, interface: dict[str, Any]
    ) -> None:
        self.address = address
        self.nbytes = math.prod(shape) * itemsize
        self._driver = driver
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": f"<V{itemsize}" if itemsize > 1 else "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
            **interface,
        }

    def bytes(self) -> NDArray[np.uint8]:
        """What the device has there; writable."""
        return self._driver.bytes_at(self.address, self.nbytes)


class _Refused(Exception):
    pass
