"""From blocks in slab memory to puts for the cold tier's writer, on the callers' own threads.

Frames lie in buffers of a ring: no block takes fresh memory, and what is encoded ahead of the writer is bounded.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.tiers.base import Outcome, SlabMemory, StoredRecord, TierItem, WriteResult
from kvstore.tiers.buffers import BufferRing
from kvstore.tiers.checksums import block_checksum
from kvstore.tiers.cold_jobs import Command, CommitLimits, Job, Put
from kvstore.tiers.cold_records import entry_key, footprint_bytes
from kvstore.tiers.cold_room import Room
from kvstore.tiers.cold_writer import ColdWriter
from kvstore.tiers.tally import Tally

Piece = bytes | memoryview


class EncodedBlock(Protocol):
    """A block as it will be stored."""

    @property
    def pieces(self) -> Sequence[Piece]:
        """What to store, one after the other; may be views of the raw bytes."""

    @property
    def codec(self) -> int:
        """The codec's id."""

    @property
    def checksum(self) -> bytes:
        """xxh3-128 of what decoding gives."""

    @property
    def lossy(self) -> bool:
        """Whether decoding gives other bytes than the raw ones."""


class BlockFormat(Protocol):
    """How a block is written to the medium and read back. Called by many threads at once."""

    def encode(self, item: TierItem, raw: NDArray[np.uint8]) -> EncodedBlock:
        """Encode a block whose bytes are already verified."""

    def decode(self, frame: memoryview, item: TierItem, out: NDArray[np.uint8]) -> None:
        """Decode what encode() made into `out`, whose size is the block's raw size.

        Raises:
            ValueError: the frame is damaged, or holds another block or other content than `item` names.
            LookupError: the frame is intact and written in a way that this build does not know.
        """


@dataclass(slots=True)
class Encoder:
    """What every batch of writes needs; `tally` has corrupt, full and unmapped."""

    memory: SlabMemory
    block_format: BlockFormat
    writer: ColdWriter
    room: Room
    tally: Tally
    ring: BufferRing
    limits: CommitLimits
    patience_s: float

    def write(self, items: Sequence[TierItem]) -> list[WriteResult]:
        """Store blocks; the writer commits some while the next are encoded."""
        batch = _Batch(self, len(items))
        for position, item in enumerate(items):
            batch.add(position, item)
        return batch.finish()


class _Pending(NamedTuple):
    job: Job
    positions: list[int]


class _Batch:
    """One call's blocks on their way to the writer."""

    def __init__(self, encoder: Encoder, size: int) -> None:
        self._encoder = encoder
        self._results = [WriteResult(Outcome.BUSY)] * size
        self._pending: list[_Pending] = []
        self._positions: list[int] = []
        self._puts: list[Put] = []
        self._bytes = 0  # of their frames
        self._patience_s = encoder.patience_s

    def add(self, position: int, item: TierItem) -> None:
        """Encode a block, and hand over what fills a job; what cannot be stored gets its result here."""
        put = self._encode(item)
        if isinstance(put, Outcome):
            self._results[position] = WriteResult(put)
            return
        self._positions.append(position)
        self._puts.append(put)
        self._bytes += put.frame.nbytes
        if self._encoder.limits.are_reached(len(self._puts), self._bytes):
            self._submit()

    def finish(self) -> list[WriteResult]:
        """Results in order, once the writer has answered (BUSY where it did not in time)."""
        self._submit()
        for job, positions in self._pending:
            results = job.wait(self._patience_s)
            if any(result.outcome is Outcome.BUSY for result in results):
                self._patience_s = 0.0  # a writer that hangs is waited for once
            for position, result in zip(positions, results, strict=True):
                self._results[position] = result
        return self._results

    def _submit(self) -> None:
        if not self._puts:
            return
        job = self._encoder.writer.submit(self._puts, self._patience_s, self._release)
        self._pending.append(_Pending(job, self._positions))
        if job.turned_away:
            self._patience_s = 0.0
        self._positions, self._puts, self._bytes = [], [], 0

    def _release(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Put):
                self._encoder.ring.give_back(command.buffer)

    def _encode(self, item: TierItem) -> Put | Outcome:
        """The block as it will be stored, sharing no memory with the slab; or why not."""
        encoder = self._encoder
        entry = entry_key(item.ref)
        if encoder.writer.failure or encoder.writer.paused or not self._patience_s:
            return Outcome.BUSY
        if encoder.room.is_closed():  # not worth the encoding
            encoder.tally.add("full")
            return Outcome.FULL
        try:
            raw = encoder.memory.view(item.range)
        except KeyError:
            encoder.tally.add("unmapped")
            return Outcome.BUSY
        if block_checksum(raw) != item.checksum:
            encoder.tally.add("corrupt")
            return Outcome.CORRUPT
        encoded = encoder.block_format.encode(item, raw)
        arrays = [np.frombuffer(piece, dtype=np.uint8) for piece in encoded.pieces]
        nbytes = sum(array.nbytes for array in arrays)
        buffer = self._take(nbytes)
        if buffer is None:
            return Outcome.BUSY
        frame = buffer[:nbytes]
        np.concatenate(arrays, out=frame)  # bytes.join would hold the GIL while it copies
        return Put(entry, frame, _record(item, encoded, nbytes), buffer)

    def _take(self, nbytes: int) -> NDArray[np.uint8] | None:
        """A buffer; while there is none, the writer gets what this batch holds, or two batches could wait for ever."""
        buffer = self._encoder.ring.take(nbytes, 0.0)
        if buffer is None:
            self._submit()
            buffer = self._encoder.ring.take(nbytes, self._patience_s)
            if buffer is None:
                self._patience_s = 0.0
        return buffer


def _record(item: TierItem, encoded: EncodedBlock, frame_bytes: int) -> StoredRecord:
    return StoredRecord(
        item.ref,
        item.parent,
        encoded.checksum,
        item.range.nbytes,
        footprint_bytes(frame_bytes),
        item.epoch,
        encoded.codec,
        item.hits,
        int(time.time()),
        encoded.lossy,
    )
