"""Asynchronous copies through the CUDA driver: neighbours as one, and many in one call where the driver can."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

from kvstore.protocol.cuda_calls import CudaBroken, CudaCalls, CudaError

_BATCH_MIN = 4  # fewer runs are called one by one
_PITCH_MAX = (1 << 31) - 1  # CU_DEVICE_ATTRIBUTE_MAX_PITCH of every device so far
# A block of 2 MiB takes some 100 us over PCIe. What takes longer loses little by a step of sleep.
_SPIN_S = 200e-6
_STEP_S = 50e-6

_log = logging.getLogger(__name__)


class Direction(Enum):
    """Which way bytes go, by the driver's call for it."""

    TO_DEVICE = "cuMemcpyHtoDAsync"
    FROM_DEVICE = "cuMemcpyDtoHAsync"
    ON_DEVICE = "cuMemcpyDtoDAsync"


class Run(NamedTuple):
    """Bytes to be copied from one address to another."""

    to: int
    source: int
    nbytes: int


class Rows(NamedTuple):
    """`height` rows of `width` bytes, each side's so many bytes apart."""

    to: int
    to_pitch: int
    source: int
    source_pitch: int
    width: int
    height: int


def await_event(calls: CudaCalls, event: Any, timeout_s: float) -> None:  # noqa: ANN401 - a CUevent
    """Wait until everything before an event's record has ended.

    By asking again and again: some versions of the bindings keep the GIL while cuEventSynchronize waits, and nothing
    bounds it.

    Raises:
        CudaBroken: it has not ended within `timeout_s`, or that cannot be told.
    """
    began_s = time.monotonic()
    try:
        while not calls.is_done(event):
            waited_s = time.monotonic() - began_s
            if waited_s > timeout_s:
                raise CudaBroken(f"copies have not ended within {timeout_s:g} s")
            time.sleep(0.0 if waited_s < _SPIN_S else _STEP_S)
    except CudaError as error:
        raise CudaBroken(f"copies may still be under way: {error}") from error


def merged(runs: Sequence[Run]) -> list[Run]:
    """The same bytes in fewer runs: neighbours that touch on both sides become one."""
    found: list[Run] = []
    for run in runs:
        last = found[-1] if found else None
        if last is not None and (last.to + last.nbytes, last.source + last.nbytes) == (run.to, run.source):
            found[-1] = Run(last.to, last.source, last.nbytes + run.nbytes)
        else:
            found.append(run)
    return found


class AsyncCopies:
    """Puts copies on streams; any thread whose context is the device's. Who waits for the stream is the caller."""

    def __init__(self, calls: CudaCalls) -> None:
        self._calls = calls
        self._may_batch = calls.has("cuMemcpyBatchAsync")

    def runs(self, direction: Direction, runs: Sequence[Run], stream: Any, *, pinned: bool) -> None:  # noqa: ANN401
        """Copy runs, merged and in order. `pinned`: the host's side is registered with the driver.

        Raises:
            CudaError: the driver refuses; some may be under way.
        """
        fewer = merged(runs)
        try:
            self._runs(direction, fewer, stream, pinned)
        except CudaError:
            # Neighbours can lie in two allocations, across whose border the driver does not copy. What is under way by
            # now is copied again: the same bytes to the same places.
            if len(fewer) == len(runs):
                raise
            self._runs(direction, runs, stream, pinned)

    def _runs(self, direction: Direction, runs: Sequence[Run], stream: Any, pinned: bool) -> None:  # noqa: ANN401
        if self._may_batch and pinned and len(runs) >= _BATCH_MIN:
            try:
                self._batch(runs, stream)
                return
            except CudaError as error:  # an older driver under newer bindings, say
                self._may_batch = False
                _log.warning("copies are called one by one from now on: %s", error)
        for run in runs:
            self._calls(direction.value, run.to, run.source, run.nbytes, stream)

    def rows(self, direction: Direction, rows: Rows, stream: Any) -> None:  # noqa: ANN401 - the driver's own type
        """Copy rows, to the device or from it. Raises as runs() does."""
        if rows.width == rows.to_pitch == rows.source_pitch:
            self._calls(direction.value, rows.to, rows.source, rows.width * rows.height, stream)
            return
        if rows.height == 1 or max(rows.to_pitch, rows.source_pitch) > _PITCH_MAX:
            for row in range(rows.height):
                to, source = rows.to + row * rows.to_pitch, rows.source + row * rows.source_pitch
                self._calls(direction.value, to, source, rows.width, stream)
            return
        api = self._calls.api
        host, device = api.CUmemorytype.CU_MEMORYTYPE_HOST, api.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy = api.CUDA_MEMCPY2D()
        if direction is Direction.TO_DEVICE:
            copy.srcMemoryType, copy.srcHost = host, rows.source
            copy.dstMemoryType, copy.dstDevice = device, api.CUdeviceptr(rows.to)
        else:
            copy.srcMemoryType, copy.srcDevice = device, api.CUdeviceptr(rows.source)
            copy.dstMemoryType, copy.dstHost = host, rows.to
        copy.srcPitch, copy.dstPitch = rows.source_pitch, rows.to_pitch
        copy.WidthInBytes, copy.Height = rows.width, rows.height
        self._calls("cuMemcpy2DAsync", copy, stream)

    def _batch(self, runs: Sequence[Run], stream: Any) -> None:  # noqa: ANN401 - the driver's own type
        api = self._calls.api
        how = api.CUmemcpyAttributes()
        how.srcAccessOrder = api.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        self._calls(
            "cuMemcpyBatchAsync",
            [api.CUdeviceptr(run.to) for run in runs],
            [api.CUdeviceptr(run.source) for run in runs],
            [run.nbytes for run in runs],
            len(runs),
            [how],
            [0],
            1,
            stream,
        )
