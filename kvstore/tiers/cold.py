"""The cold tier: blocks on an SSD, in one LMDB environment.

Readers are the callers' own threads: each read is a short transaction that decodes a block straight from the map into
slab memory. Writing is one thread's (cold_writer); what comes before it, checking and encoding, is again
the caller's, and overlaps with the commit of the blocks before.

How a block is framed is injected (BlockFormat). What this tier answers for itself is the checksum: it is verified over
the raw bytes on every write and on every read, because LMDB has none (58 of 60 bits flipped in data pages came back
silently wrong).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import lmdb
import numpy as np
from numpy.typing import NDArray

from kvstore.tiers.base import BlockRef, Outcome, Scannable, SlabMemory, StoredRecord, Tier, TierItem, WriteResult
from kvstore.tiers.checksums import block_checksum
from kvstore.tiers.cold_env import ColdEnvironment, open_environment
from kvstore.tiers.cold_records import entry_key, footprint_bytes, pack_record, unpack_record
from kvstore.tiers.cold_writer import ColdWriter, Drop, Job, Put
from kvstore.tiers.gate import Gate
from kvstore.tiers.tally import Tally

_log = logging.getLogger(__name__)

_HEAD_BYTES = 256  # of a damaged frame: enough to tell it from one that took its place
_SCAN_BATCH = 1000  # records per read transaction: no transaction outlives a batch, whoever consumes the scan
_DROP_BATCH = 256
_MIN_RESERVE_BYTES = 256 << 10
_RESERVE_SHARE = 64

_COUNTERS = (
    "bad_records",  # damaged records met by a scan
    "corrupt",  # copies dropped, and writes refused, because the bytes failed their checksum
    "full",  # writes refused to stay within the capacity
    "map_full",  # transactions that found no room in the map
    "missing",
    "read_failures",  # errors of LMDB while reading
    "unmapped",
    "unsupported",  # copies that another build wrote
    "write_failures",  # errors of LMDB or of the disk while writing
)


class BlockFormat(Protocol):
    """How a block is written to the medium and read back. Called by many threads at once."""

    def encode(self, item: TierItem, raw: NDArray[np.uint8]) -> Sequence[bytes | memoryview]:
        """The pieces to store one after the other; they may be views of `raw`, which is already verified."""

    def decode(self, frame: memoryview, item: TierItem, out: NDArray[np.uint8]) -> None:
        """Decode what encode() made into `out`, whose size is the block's raw size.

        Raises:
            ValueError: the frame is damaged, or holds another block or other content than `item` names.
            LookupError: the frame is intact and written in a way that this build does not know.
        """


@dataclass(frozen=True, slots=True)
class LmdbOptions:
    """Sizes and limits that only tests and experiments change."""

    commit_blocks: int = 8  # a transaction; 32 were slower
    commit_bytes: int = 32 << 20  # raw bytes in a transaction; bounds what is encoded ahead of the writer
    queue_jobs: int = 2
    max_readers: int = 64
    patience_s: float = 60.0  # for the writer, before a call answers BUSY
    map_bytes: int = 0  # 0: the capacity
    boot_id: str = ""  # empty: the kernel's


DEFAULT_OPTIONS = LmdbOptions()


class _Pending(NamedTuple):
    """A job that the writer has, with what its blocks are in the caller's batch and what they will take."""

    job: Job
    positions: list[int]
    stored_bytes: list[int]


class LmdbTier(Tier, Scannable):
    """A durable tier in the directory `path`. Any thread may call any method.

    `set_aside` is where a damaged environment went that was found at the start (None: there was none). `failure` is
    empty unless the environment became unusable since: everything answers BUSY or MISSING then, and opening the tier
    anew (in a fresh process) repairs it.
    """

    def __init__(
        self,
        path: Path,
        capacity_bytes: int,
        memory: SlabMemory,
        block_format: BlockFormat,
        options: LmdbOptions = DEFAULT_OPTIONS,
    ) -> None:
        """Open or create; `capacity_bytes` bounds the file.

        A 64th of it, and at least 256 KiB, stays free: even a delete needs pages for the tree's new nodes.

        Raises:
            OSError: the directory cannot be used.
        """
        self.name = "cold"
        self.capacity_bytes = capacity_bytes
        self._memory = memory
        self._format = block_format
        self._options = options
        self._tally = Tally(_COUNTERS)
        self._gate = Gate()
        self._close_lock = threading.Lock()
        self._closed = False
        map_bytes = options.map_bytes or capacity_bytes
        self._cold: ColdEnvironment = open_environment(path, map_bytes, options.max_readers, options.boot_id)
        self._budget_bytes = capacity_bytes - max(_MIN_RESERVE_BYTES, capacity_bytes // _RESERVE_SHARE)
        self._writer = ColdWriter(self._cold, self._budget_bytes, options.queue_jobs, self._tally)

    @property
    def set_aside(self) -> Path | None:
        """Where a damaged environment was moved when this tier was opened."""
        return self._cold.set_aside

    @property
    def failure(self) -> str:
        """Why this tier can do no more; empty while it can."""
        return self._writer.failure

    def write(self, items: Sequence[TierItem]) -> list[WriteResult]:
        """Store blocks; each one that is OK survives the death of this process at any time.

        CORRUPT: the bytes fail the item's checksum. FULL: no room, on the disk or within the capacity. BUSY: the
        slab is not mapped, or the writer did not answer in time.
        """
        results = [WriteResult(Outcome.BUSY)] * len(items)
        with self._gate.inside() as entered:
            pending = self._submit_all(items, results) if entered else []
            patience_s = self._options.patience_s
            for job, positions, stored_bytes in pending:
                outcomes = job.wait(patience_s)
                if Outcome.BUSY in outcomes:
                    patience_s = 0.0  # a writer that hangs is waited for once
                for position, nbytes, outcome in zip(positions, stored_bytes, outcomes, strict=True):
                    results[position] = WriteResult(outcome, nbytes if outcome is Outcome.OK else 0)
        return results

    def read(self, items: Sequence[TierItem]) -> list[Outcome]:
        """Fetch blocks.

        A copy that is damaged is CORRUPT, and deleted; one that is intact but of an unknown format is MISSING, and
        kept for a build that knows it.
        """
        with self._gate.inside() as entered:
            return [self._read(item) if entered else Outcome.MISSING for item in items]

    def delete(self, refs: Sequence[BlockRef]) -> None:
        """Forget blocks; returns once that is committed (or the writer's patience is over)."""
        with self._gate.inside() as entered:
            if entered:
                self._drop([Drop(entry_key(ref)) for ref in refs])

    def scan(self, after: BlockRef | None = None) -> Iterator[StoredRecord]:
        """Every record, ordered by namespace and key, from behind `after`; touches no payload.

        Blocks stored or deleted meanwhile may be in it or not. Damaged records are deleted with their blocks.
        """
        position = entry_key(after) if after else b""
        while True:
            with self._gate.inside() as entered:
                entries = self._entries_after(position) if entered else []
                found = self._parse(entries)
            yield from found
            if len(entries) < _SCAN_BATCH:
                return
            position = entries[-1][0]

    def flush(self) -> None:
        """Return once everything that was written before (whose write() has returned OK) is on the medium.

        Raises:
            OSError: the medium did not take it.
        """
        with self._gate.inside() as entered:
            if not entered:
                return
            try:
                self._cold.env.sync(True)
            except lmdb.Error as error:
                self._tally.add("write_failures")
                raise OSError(f"cold tier could not be synced: {error}") from error

    def stats(self) -> Mapping[str, int]:
        """Sums over the blocks held (`blocks`, `raw_bytes`, `stored_bytes`), the map, and counters since the start.

        `stored_bytes` is in whole pages; `map_used_bytes` is what the file takes at most, `map_bytes` its bound.
        """
        totals = self._writer.totals
        with self._gate.inside() as entered:
            used_bytes = self._cold.used_bytes() if entered else 0
            map_bytes = int(self._cold.env.info()["map_size"]) if entered else 0
        return {
            "blocks": totals.blocks,
            "raw_bytes": totals.raw_bytes,
            "stored_bytes": totals.stored_bytes,
            "budget_bytes": self._budget_bytes,
            "map_used_bytes": used_bytes,
            "map_bytes": map_bytes,
            "set_aside": int(self.set_aside is not None),
            "failed": int(bool(self.failure)),
            **self._tally.snapshot(),
        }

    def close(self) -> None:
        """Finish what is under way, sync and close; idempotent.

        Where a reader or the writer does not end within the patience, the environment stays open: unmapping it under
        a reader would be a SIGSEGV.

        Raises:
            OSError: the medium did not take the last writes.
        """
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
            patience_s = self._options.patience_s
            if self._gate.close(patience_s) and self._writer.close(patience_s):
                self._cold.close()
            else:
                _log.error("cold tier: still in use after %.0f s; left open", patience_s)

    def _submit_all(self, items: Sequence[TierItem], results: list[WriteResult]) -> list[_Pending]:
        """Hand blocks to the writer in groups of one transaction; the writer commits one while the next is encoded.

        What cannot be handed over gets its result here.
        """
        pending: list[_Pending] = []
        positions: list[int] = []
        puts: list[Put] = []
        for position, item in enumerate(items):
            put = self._encode(item)
            if isinstance(put, Outcome):
                results[position] = WriteResult(put)
            else:
                positions.append(position)
                puts.append(put)
            if puts and (self._group_is_full(puts) or position == len(items) - 1):
                job = self._writer.submit(puts, self._options.patience_s)
                pending.append(_Pending(job, positions, [put.stored_bytes for put in puts]))
                if job.turned_away:
                    break
                positions, puts = [], []
        return pending

    def _group_is_full(self, puts: Sequence[Put]) -> bool:
        options = self._options
        return len(puts) >= options.commit_blocks or sum(put.raw_bytes for put in puts) >= options.commit_bytes

    def _encode(self, item: TierItem) -> Put | Outcome:
        """The block as it will be stored, sharing no memory with the slab; or why not."""
        entry = entry_key(item.ref)
        try:
            raw = self._memory.view(item.range)
        except KeyError:
            self._tally.add("unmapped")
            return Outcome.BUSY
        if block_checksum(raw) != item.checksum:
            self._tally.add("corrupt")
            return Outcome.CORRUPT
        frame = _join(self._format.encode(item, raw))
        stored_bytes = footprint_bytes(frame.nbytes)
        return Put(entry, frame, pack_record(entry, item, stored_bytes), raw.nbytes, stored_bytes)

    def _read(self, item: TierItem) -> Outcome:
        entry = entry_key(item.ref)
        try:
            out = self._memory.view(item.range)
        except KeyError:
            self._tally.add("unmapped")
            return Outcome.BUSY
        if self.failure:
            return Outcome.MISSING
        try:
            with self._cold.env.begin(db=self._cold.blocks, buffers=True) as txn:
                frame = txn.get(entry)
                if frame is None:
                    self._tally.add("missing")
                    return Outcome.MISSING
                outcome = self._decode(frame, item, out)
                head = bytes(frame[:_HEAD_BYTES]) if outcome is Outcome.CORRUPT else b""
        except lmdb.Error as error:
            return self._read_failed(error)
        if outcome is Outcome.CORRUPT:
            self._drop([Drop(entry, head)])
        return outcome

    def _decode(self, frame: memoryview, item: TierItem, out: NDArray[np.uint8]) -> Outcome:
        try:
            self._format.decode(frame, item, out)
            if block_checksum(out) == item.checksum:
                return Outcome.OK
            reason = "the checksum of its bytes is wrong"
        except LookupError as error:
            self._tally.add("unsupported")
            _log.info("cold tier: block %s is not readable by this build: %s", item.ref.key.hex(), error)
            return Outcome.MISSING
        except ValueError as error:
            reason = str(error)
        self._tally.add("corrupt")
        _log.warning("cold tier: block %s dropped: %s", item.ref.key.hex(), reason)
        return Outcome.CORRUPT

    def _read_failed(self, error: lmdb.Error) -> Outcome:
        if isinstance(error, lmdb.ReadersFullError):
            return Outcome.BUSY
        self._writer.note(error, "read_failures")
        return Outcome.MISSING

    def _drop(self, drops: Sequence[Drop]) -> None:
        """Have the writer carry out, and wait for it."""
        patience_s = self._options.patience_s
        for start in range(0, len(drops), _DROP_BATCH):
            if Outcome.BUSY in self._writer.submit(drops[start : start + _DROP_BATCH], patience_s).wait(patience_s):
                return

    def _entries_after(self, position: bytes) -> list[tuple[bytes, bytes]]:
        """The next records as they are stored, with their entry keys; in a transaction of their own."""
        try:
            with self._cold.env.begin(db=self._cold.records) as txn, txn.cursor() as cursor:
                if not cursor.set_range(position):  # set_range(b"") is the first
                    return []
                if position and cursor.key() == position and not cursor.next():
                    return []
                return list(islice(cursor.iternext(keys=True, values=True), _SCAN_BATCH))
        except lmdb.Error as error:
            self._read_failed(error)
            return []

    def _parse(self, entries: Sequence[tuple[bytes, bytes]]) -> list[StoredRecord]:
        """The records that are whole; the others are dropped."""
        found, damaged = [], []
        for entry, data in entries:
            try:
                found.append(unpack_record(entry, data))
            except ValueError:
                damaged.append(Drop(entry))
        self._tally.add("bad_records", len(damaged))
        self._drop(damaged)
        return found


def _join(pieces: Sequence[bytes | memoryview]) -> NDArray[np.uint8]:
    """All pieces in one buffer. bytes.join would hold the GIL while it copies."""
    arrays = [np.frombuffer(piece, dtype=np.uint8) for piece in pieces]
    return np.concatenate(arrays)
