"""Copies between pinned host memory and a device, on streams of their own; several may be under way at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from kvstore.protocol.cuda_calls import CudaBroken, CudaError
from kvstore.protocol.cuda_copies import AsyncCopies, Direction, Run, await_event
from kvstore.tiers.cuda import CudaDevice

_NON_BLOCKING_STREAM = 1
_UNTIMED_EVENT = 2
_WAIT_S = 600.0  # longer than any agent_timeout_s: the daemon ends an agent that waits for a hung device


class _Lane(NamedTuple):
    stream: Any
    event: Any


class Copying:
    """Copies under way; wait() must follow, whatever happens meanwhile."""

    def __init__(self, copier: Copier, lane: _Lane, error: CudaError | None) -> None:
        self._copier = copier
        self._lane = lane
        self._error = error

    def wait(self) -> None:
        """Return once nothing is copied any more.

        Raises:
            CudaError: not all was copied, and nothing is being copied.
            CudaBroken: it cannot be told; nobody may touch the memory before this process has ended.
        """
        self._copier._settle(self._lane)
        if self._error is not None:
            raise self._error


class Copier:
    """Starts copies, on any thread.

    A call holds a stream until it has been waited for, so there are as many streams as calls were ever under way.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._calls = device.calls
        self._lock = threading.Lock()
        self._idle: list[_Lane] = []
        self._all: list[_Lane] = []
        self._copies = AsyncCopies(device.calls)

    def start(self, direction: Direction, runs: Sequence[Run], *, pinned: bool = True) -> Copying:
        """Begin to copy, in order.

        Args:
            direction: which way.
            runs: what; neighbours are merged.
            pinned: whether the host's side is registered with the driver.

        Raises:
            CudaError: there is no stream to be had; nothing was begun.
        """
        self._device.enter()
        lane = self._take()
        error: CudaError | None = None
        try:
            self._copies.runs(direction, runs, lane.stream, pinned=pinned)
        except CudaError as failure:  # some may be under way: whoever waits hears of it
            error = failure
        return Copying(self, lane, error)

    def close(self) -> None:
        """Give the streams back; nothing may be under way."""
        with self._lock:
            lanes, self._all = self._all, []
            self._idle.clear()
        for lane in lanes:
            self._calls("cuEventDestroy", lane.event)
            self._calls("cuStreamDestroy", lane.stream)

    def _take(self) -> _Lane:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        stream = self._calls("cuStreamCreate", _NON_BLOCKING_STREAM)
        try:
            lane = _Lane(stream, self._calls("cuEventCreate", _UNTIMED_EVENT))
        except CudaError:
            self._calls("cuStreamDestroy", stream)
            raise
        with self._lock:
            self._all.append(lane)
        return lane

    def _settle(self, lane: _Lane) -> None:
        self._device.enter()
        try:
            self._calls("cuEventRecord", lane.event, lane.stream)
        except CudaError as error:
            raise CudaBroken(f"copies may still be under way: {error}") from error
        await_event(self._calls, lane.event, _WAIT_S)
        with self._lock:
            self._idle.append(lane)
