"""A CUDA device as this worker uses it: copies on streams of their own, and shared memory registered with the driver.

Everything that needs the driver is here. It shares the device's primary context with torch and makes it current only
for as long as a call takes. The package cuda-bindings is imported when a call first names device memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from kvstore.protocol.cuda_calls import CudaBroken, CudaCalls, CudaError, CudaMissing, load_driver
from kvstore.protocol.cuda_copies import AsyncCopies, Direction, Rows, Run, await_event
from kvstore.protocol.errors import InternalError, InvalidRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PORTABLE, _READ_ONLY = 1, 8  # CU_MEMHOSTREGISTER_*
_NON_BLOCKING_STREAM = 1
_UNTIMED_EVENT = 2
_EXCHANGE = "cuThreadExchangeStreamCaptureMode"
_WAIT_S = 60.0  # 256 MiB take 0.1 s on the slowest bus: a device that takes so long does not come back

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_devices: dict[tuple[int, int], Device] = {}


class After(NamedTuple):
    """What a copy must not come before: all work that a stream has now, or an event."""

    handle: int
    is_event: bool


class _Lane(NamedTuple):
    stream: Any
    done: Any
    ordering: Any


def device(ordinal: int) -> Device:
    """The device of this process.

    Raises:
        InvalidRequest: there is no driver, or no such device.
    """
    key = (os.getpid(), ordinal)
    with _lock:
        if key not in _devices:
            with device_errors():
                _devices[key] = Device(ordinal)
        return _devices[key]


def ordinal_of(address: int) -> int:
    """The device that an address of device memory belongs to.

    Raises:
        InvalidRequest: none.
    """
    with device_errors():
        calls = CudaCalls(load_driver())
        attribute = calls.api.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        return int(calls("cuPointerGetAttribute", attribute, address))


class UnfinishedCopy(InternalError):
    """It cannot be told whether a copy has ended: the memory that it touches must not be used for anything else."""


@contextlib.contextmanager
def device_errors() -> Iterator[None]:
    """The driver's errors as this package's."""
    try:
        yield
    except CudaMissing as error:
        raise InvalidRequest(f"device memory cannot be used here: {error}") from error
    except CudaBroken as error:
        raise UnfinishedCopy(f"the CUDA driver failed: {error}") from error
    except CudaError as error:
        raise InternalError(f"the CUDA driver failed: {error}") from error


class Device:
    """One device. Any thread; made by device()."""

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        self.calls = calls = CudaCalls(load_driver())
        calls("cuInit", 0)
        count = calls("cuDeviceGetCount")
        if not 0 <= ordinal < count:
            raise CudaMissing(f"there is no cuda:{ordinal}: the driver sees {count} CUDA devices")
        handle = calls("cuDeviceGet", ordinal)
        self._context = calls("cuDevicePrimaryCtxRetain", handle)  # for as long as the process lives, as torch does
        self.copies = AsyncCopies(calls)
        self.pins = Pins(self, self._read_only_flag(handle))
        self._lanes_lock = threading.Lock()
        self._idle: list[_Lane] = []
        self._kept: list[object] = []

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """The device's context on this thread, for now.

        Relaxed, or a call of ours would spoil the graph that another thread of the engine captures meanwhile.
        """
        calls = self.calls
        calls("cuCtxPushCurrent", self._context)
        try:
            mode = calls(_EXCHANGE, calls.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
            try:
                yield
            finally:
                calls(_EXCHANGE, mode)
        finally:
            calls("cuCtxPopCurrent")

    def begin(self, after: Sequence[After]) -> Transfer:
        """A set of copies that begin once `after` is done.

        Raises:
            CudaError: the driver refuses.
            InvalidRequest: `after` is a stream whose work is being captured, so it has no end to wait for.
        """
        with self.current():
            for what in after:
                if not what.is_event and int(self.calls("cuStreamIsCapturing", what.handle)):
                    raise InvalidRequest("the stream is capturing a graph; read and put outside of the capture")
            lane = self._take()
            try:
                for what in after:
                    event = what.handle
                    if not what.is_event:
                        event = lane.ordering
                        self.calls("cuEventRecord", event, what.handle)
                    self.calls("cuStreamWaitEvent", lane.stream, event, 0)
            except CudaError:
                self.give(lane)
                raise
        return Transfer(self, lane)

    def keep(self, *memory: object) -> None:
        """Hold on to what a copy may still touch whose end cannot be told, for as long as the process lives."""
        self._kept.extend(memory)

    def give(self, lane: _Lane) -> None:
        """A stream on which nothing is under way."""
        with self._lanes_lock:
            self._idle.append(lane)

    def _take(self) -> _Lane:
        with self._lanes_lock:
            if self._idle:
                return self._idle.pop()
        with contextlib.ExitStack() as made:
            stream = self.calls("cuStreamCreate", _NON_BLOCKING_STREAM)
            made.callback(self.calls, "cuStreamDestroy", stream)
            done = self.calls("cuEventCreate", _UNTIMED_EVENT)
            made.callback(self.calls, "cuEventDestroy", done)
            lane = _Lane(stream, done, self.calls("cuEventCreate", _UNTIMED_EVENT))
            made.pop_all()
        return lane

    def _read_only_flag(self, handle: Any) -> int | None:  # noqa: ANN401 - the driver's own type
        """How to register memory that is mapped for reading only; None where the device cannot."""
        name = "CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED"
        attribute = getattr(self.calls.api.CUdevice_attribute, name, None)
        if attribute is None or not self.calls("cuDeviceGetAttribute", attribute, handle):
            return None
        return _PORTABLE | _READ_ONLY


class Transfer:
    """Copies under way on a stream of their own; finish() must follow, whatever happens meanwhile."""

    def __init__(self, owner: Device, lane: _Lane) -> None:
        self._device = owner
        self._lane = lane
        self._is_over = False

    def runs(self, direction: Direction, runs: Sequence[Run], *, pinned: bool) -> None:
        """Begin to copy runs. Raises CudaError where the driver refuses."""
        with self._device.current():
            self._device.copies.runs(direction, runs, self._lane.stream, pinned=pinned)

    def rows(self, direction: Direction, rows: Rows) -> None:
        """Begin to copy rows. Raises CudaError where the driver refuses."""
        with self._device.current():
            self._device.copies.rows(direction, rows, self._lane.stream)

    def finish(self) -> None:
        """Return once nothing is copied any more, also where a signal's handler raises meanwhile. Idempotent.

        Raises:
            CudaBroken: that cannot be told: this process cannot use its device any more.
            BaseException: what a handler raised; nothing is copied any more.
        """
        interruption: BaseException | None = None
        deadline_s = time.monotonic() + _WAIT_S
        while not self._is_over:
            try:
                self._await(deadline_s)
            except CudaBroken:
                self._is_over = True
                raise
            except BaseException as raised:  # noqa: BLE001 - of a handler: the copy goes on all the same
                interruption = raised
        if interruption is not None:
            raise interruption

    def _await(self, deadline_s: float) -> None:
        calls = self._device.calls
        try:
            with self._device.current():
                calls("cuEventRecord", self._lane.done, self._lane.stream)
                await_event(calls, self._lane.done, deadline_s - time.monotonic())
        except CudaError as error:
            raise CudaBroken(f"copies may still be under way: {error}") from error
        self._is_over = True
        self._device.give(self._lane)


class _Pin:
    """Memory that is registered, or will be; `tried` is set once that has been decided."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array
        self.tried = threading.Event()
        self.is_pinned = False


class Pins:
    """Registers shared memory with the driver, on a thread of its own: it takes milliseconds for a slab.

    Until it is done, and where the device cannot, copies go through the driver's own buffer: slower, as right.
    """

    def __init__(self, owner: Device, read_only: int | None) -> None:
        self._device = owner
        self._read_only = read_only
        self._lock = threading.Lock()
        self._pins: dict[int, _Pin] = {}  # by address
        self._jobs: SimpleQueue[tuple[_Pin, bool]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def want(self, holder: Any, array: NDArray[Any]) -> bool:  # noqa: ANN401 - whoever keeps the array
        """Whether `array` is registered; if not, it will be, until `holder` is no longer used by anybody."""
        return self._pin(holder, array).is_pinned

    def await_pinned(self, holder: Any, array: NDArray[Any], timeout_s: float) -> bool:  # noqa: ANN401
        """want(), after a wait for the registering; False where it is not done in time or cannot be."""
        pin = self._pin(holder, array)
        pin.tried.wait(max(timeout_s, 0.0))
        return pin.is_pinned

    def pinned_bytes(self) -> int:
        """Bytes registered now."""
        with self._lock:
            return sum(pin.array.nbytes for pin in self._pins.values() if pin.is_pinned)

    def _pin(self, holder: Any, array: NDArray[Any]) -> _Pin:  # noqa: ANN401
        address = int(array.ctypes.data)
        pin = self._pins.get(address)
        if pin is not None:
            return pin
        with self._lock:
            pin = self._pins.get(address)
            if pin is not None:
                return pin
            pin = self._pins[address] = _Pin(array)
        # The queue keeps the array, and so the mapping, until the driver has let go of it.
        weakref.finalize(holder, self._submit, pin, False).atexit = False
        self._submit(pin, True)
        return pin

    def _submit(self, pin: _Pin, is_wanted: bool) -> None:
        """Queue it. What is not wanted comes from finalizers, so it takes no lock that their thread may hold."""
        self._jobs.put((pin, is_wanted))
        if not is_wanted:
            return
        with self._lock:  # one thread only: it registers and lets go in the order of the queue
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="kvstore-client-pins", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            pin, is_wanted = self._jobs.get()
            try:
                with self._device.current():
                    if is_wanted:
                        pin.is_pinned = self._register(pin.array)
                    elif pin.is_pinned:
                        self._device.calls("cuMemHostUnregister", pin.array.ctypes.data)
                        pin.is_pinned = False
            except (CudaError, CudaBroken) as error:
                _log.warning("memory stays as it is registered: %s", error)
            pin.tried.set()
            # What stays registered stays mapped too: at an address that is used again the driver would copy from the
            # pages of before.
            if not is_wanted and not pin.is_pinned:
                with self._lock:
                    self._pins.pop(int(pin.array.ctypes.data), None)
            del pin  # or the mapping would live until the next job

    def _register(self, array: NDArray[Any]) -> bool:
        flags = _PORTABLE if array.flags.writeable else self._read_only
        if flags is None:
            return False
        try:
            self._device.calls("cuMemHostRegister", array.ctypes.data, array.nbytes, flags)
        except CudaError as error:
            _log.warning("%d bytes are not pinned, copies are slower: %s", array.nbytes, error)
            return False
        return True
