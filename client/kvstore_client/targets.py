"""Where blocks are copied to: the caller's host memory, or its memory on a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from kvstore.protocol.cuda_calls import CudaBroken
from kvstore.protocol.cuda_copies import Direction, Rows
from kvstore.protocol.cuda_copies import Run as CopyRun
from kvstore.protocol.layout import KVLayout
from kvstore_client._lazy import np, xxhash
from kvstore_client.buffers import BlockBuffers, Wanted, block_buffers
from kvstore_client.device import After, Transfer, device, device_errors
from kvstore_client.device_buffers import DeviceBuffers, DevicePart, device_buffers
from kvstore_client.placement import Run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore_client.slabs import Slab

Ranges: TypeAlias = Sequence[tuple[int, int]]
"""Bytes [first, stop) of a block, in ascending order."""


class Target(Protocol):
    """Memory for consecutive blocks; one thread at a time.

    Attributes:
        is_asynchronous: whether copies go on by themselves between take() and finish().
    """

    is_asynchronous: bool

    def take(self, run: Run, ranges: Ranges) -> None:
        """Begin to copy these bytes of the blocks in a run to their places."""

    def finish(self) -> None:
        """Return once nothing is copied any more; to be called after take(), whatever happened. Idempotent."""

    def digest(self, block: int) -> bytes:
        """xxh3-128 of what was copied for a block."""


def target_of(out: Any, layout: KVLayout, blocks: int, start: int, after: After | None = None) -> Target:  # noqa: ANN401
    """The caller's memory `out` for blocks [start, start + blocks).

    Args:
        out: host or device memory.
        layout: of a block.
        blocks: how many there must be room for.
        start: index of the first.
        after: what copies to a device must not overtake; None: what the memory itself says.

    Raises:
        InvalidRequest: it does not fit, or there is no driver for it.
    """
    wanted = Wanted("out", blocks, False, True)
    on_device = None if type(out) is np.ndarray else device_buffers(out, layout, wanted)
    if on_device is None:
        return HostTarget(block_buffers(out, layout, wanted), layout.nbytes, start)
    return DeviceTarget(on_device if after is None else on_device._replace(after=(after,)), layout.nbytes, start)


class HostTarget:
    """Host memory; copies have ended when take() returns."""

    is_asynchronous = False

    __slots__ = ("_nbytes", "_pieces", "_start", "_whole")

    def __init__(self, buffers: BlockBuffers, nbytes: int, start: int) -> None:
        self._whole, self._pieces = buffers
        self._nbytes = nbytes
        self._start = start

    def take(self, run: Run, ranges: Ranges) -> None:
        """See Target."""
        at, count = run.first - self._start, run.stop - run.first
        if (
            self._whole is not None and len(ranges) == 1 and ranges[0] == (0, self._nbytes)
        ):  # 1 us less for small blocks
            np.copyto(self._whole[at : at + count], run.slab.rows[run.slot : run.slot + count, : self._nbytes])
            return
        rows = run.slab.rows[run.slot : run.slot + count]
        if self._whole is None:
            for row, pieces in zip(rows, self._pieces[at : at + count], strict=True):
                _fill(pieces, row, ranges)
            return
        for first, stop in ranges:
            np.copyto(self._whole[at : at + count, first:stop], rows[:, first:stop])

    def write(self, block: int, offset: int, data: memoryview) -> None:
        """Put a piece of a block to its place."""
        source, at = np.frombuffer(data, np.uint8), block - self._start
        for piece in (self._whole[at],) if self._whole is not None else self._pieces[at]:
            if not len(source):
                break
            part = source[: max(len(piece) - offset, 0)]
            np.copyto(piece[offset : offset + len(part)], part)
            source, offset = source[len(part) :], max(offset - len(piece), 0)

    def finish(self) -> None:
        """See Target."""

    def digest(self, block: int) -> bytes:
        """See Target."""
        at = block - self._start
        hasher = xxhash.xxh3_128()
        for piece in (self._whole[at],) if self._whole is not None else self._pieces[at]:
            hasher.update(piece.data)
        return bytes(hasher.digest())


class DeviceTarget:
    """Device memory; copies run on a stream of their own until finish()."""

    is_asynchronous = True

    def __init__(self, buffers: DeviceBuffers, nbytes: int, start: int) -> None:
        self._buffers = buffers
        self._nbytes = nbytes
        self._start = start
        self._device = device(buffers.ordinal)
        self._transfer: Transfer | None = None
        self._after = (
            buffers.after
        )  # once: what the caller does later, as with the layers before, is not to be waited for
        self._slabs: list[Slab] = []  # mapped for as long as something is copied out of them

    def take(self, run: Run, ranges: Ranges) -> None:
        """See Target."""
        buffers, at, count = self._buffers, run.first - self._start, run.stop - run.first
        slab = run.slab
        source = int(slab.rows.ctypes.data) + run.slot * slab.slot_bytes
        with device_errors():
            if self._transfer is None:
                self._transfer = self._device.begin(self._after)
            self._slabs.append(slab)
            pinned = self._device.pins.want(slab, slab.memory)
            if buffers.address:
                for first, stop in ranges:
                    to = buffers.address + at * buffers.pitch + first
                    rows = Rows(to, buffers.pitch, source + first, slab.slot_bytes, stop - first, count)
                    self._transfer.rows(Direction.TO_DEVICE, rows)
                return
            runs = [
                CopyRun(part.address + skipped, source + row * slab.slot_bytes + offset, length)
                for row, pieces in enumerate(buffers.pieces[at : at + count])
                for part, skipped, offset, length in _cut(pieces, ranges)
            ]
            self._transfer.runs(Direction.TO_DEVICE, runs, pinned=pinned)

    def finish(self) -> None:
        """See Target."""
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            with device_errors():
                try:
                    transfer.finish()
                except CudaBroken:
                    self._device.keep(self._buffers.owner, *self._slabs)
                    raise
            self._after = ()
        self._slabs.clear()

    def digest(self, block: int) -> bytes:
        """See Target."""
        host = np.empty((1, self._nbytes), np.uint8)
        copy_to_host(self._buffers, host, block - self._start, host, host)
        return bytes(xxhash.xxh3_128_digest(host.data))


def copy_to_host(
    buffers: DeviceBuffers,
    rows: NDArray[np.uint8],
    first: int,
    holder: object,
    memory: NDArray[np.uint8],
) -> None:
    """Copy blocks from `first` on into rows of host memory; returns once they are there.

    Args:
        buffers: where the blocks are.
        rows: (n, block_nbytes), each row contiguous.
        first: the block that goes to the first row.
        holder: whoever keeps `memory`; where it is not the memory itself, the memory is registered for him.
        memory: the whole segment that the rows are in.

    Raises:
        InternalError: the driver refuses.
        UnfinishedCopy: rows may still be written to.
    """
    count, nbytes = rows.shape
    to, pitch = int(rows.ctypes.data), int(rows.strides[0])
    with device_errors():
        owner = device(buffers.ordinal)
        pinned = holder is not memory and owner.pins.want(holder, memory)
        transfer = owner.begin(buffers.after)
        try:
            if buffers.address:
                source = buffers.address + first * buffers.pitch
                transfer.rows(Direction.FROM_DEVICE, Rows(to, pitch, source, buffers.pitch, nbytes, count))
            else:
                runs = [
                    CopyRun(to + row * pitch + offset, part.address + skipped, length)
                    for row, pieces in enumerate(buffers.pieces[first : first + count])
                    for part, skipped, offset, length in _cut(pieces, ((0, nbytes),))
                ]
                transfer.runs(Direction.FROM_DEVICE, runs, pinned=pinned)
        finally:
            try:
                transfer.finish()
            except CudaBroken:
                owner.keep(buffers.owner, memory)
                raise


def _fill(pieces: Sequence[NDArray[np.uint8]], row: NDArray[np.uint8], ranges: Ranges) -> None:
    """Copy these bytes of one block into its segments."""
    offset = 0
    for piece in pieces:
        end = offset + len(piece)
        for first, stop in ranges:
            low, high = max(first, offset), min(stop, end)
            if low < high:
                np.copyto(piece[low - offset : high - offset], row[low:high])
        offset = end


def _cut(pieces: Sequence[DevicePart], ranges: Ranges) -> list[tuple[DevicePart, int, int, int]]:
    """The parts of a block's segments that lie in the ranges.

    Returns:
        For each the segment, how far in it begins, where in the block that is, and how many bytes.
    """
    found = []
    offset = 0
    for piece in pieces:
        end = offset + piece.nbytes
        for first, stop in ranges:
            low, high = max(first, offset), min(stop, end)
            if low < high:
                found.append((piece, low - offset, low, high - low))
        offset = end
    return found
