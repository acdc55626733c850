"""The cold tier: blocks on an SSD, in LMDB.

Readers are the callers' own threads: each read is a short transaction that decodes a block straight from the map into
slab memory (cold_read). Writing is one thread's (cold_writer); what comes before it, checking and encoding, is again
the caller's, and overlaps with the commit of the blocks before (cold_encode). A second thread syncs (cold_sync), a
third tidies up (cold_keeper).

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

import lmdb

from kvstore.tiers.base import (
    BlockRef,
    Checkable,
    CheckPage,
    CompactResult,
    Outcome,
    ReadAhead,
    Scannable,
    SlabMemory,
    StoredRecord,
    Tier,
    TierItem,
    WriteResult,
)
from kvstore.tiers.buffers import BufferRing
from kvstore.tiers.cold_check import Checker
from kvstore.tiers.cold_compact import Compaction
from kvstore.tiers.cold_encode import BlockFormat, Encoder
from kvstore.tiers.cold_env import StoreOptions, open_store
from kvstore.tiers.cold_file import DamagedEnvironmentError
from kvstore.tiers.cold_jobs import CommitLimits, Drop, Run
from kvstore.tiers.cold_keeper import Keeper
from kvstore.tiers.cold_map import ValueMap
from kvstore.tiers.cold_read import READ_COUNTERS, ColdReader
from kvstore.tiers.cold_records import ENTRY_BYTES, entry_key, unpack_record
from kvstore.tiers.cold_room import Room, reserve_bytes, usable_bytes
from kvstore.tiers.cold_store import Transactions
from kvstore.tiers.cold_sync import SYNC_COUNTERS, Durability, Syncer
from kvstore.tiers.cold_writer import ColdWriter
from kvstore.tiers.gate import Gate
from kvstore.tiers.tally import Tally

__all__ = ["DEFAULT_OPTIONS", "BlockFormat", "LmdbOptions", "LmdbTier"]

_log = logging.getLogger(__name__)

_SCAN_BATCH = 1000  # records per read transaction: no transaction outlives a batch, whoever consumes the scan
_DROP_BATCH = 256
_MIN_SLACK_BYTES = 256 << 10
_SLACK_SHARE = 16
_REPAIR_PATIENCE_S = 5.0  # a read that met a bad copy does not wait longer behind the writer

_COUNTERS = (
    *READ_COUNTERS,
    *SYNC_COUNTERS,
    "bad_records",  # damaged records met by a scan
    "full",  # writes refused for want of room: within the capacity, on the disk, or above the reserve
    "map_full",  # transactions that found no room in the map
    "swept",  # payloads without a record, and the reverse
    "write_failures",  # errors of LMDB or of the disk while writing
    "written_bytes",  # of frames
)
_DURABILITIES: tuple[Durability, ...] = ("none", "interval", "commit")


@dataclass(frozen=True, slots=True)
class LmdbOptions:
    """How durable it is, and sizes and limits that only tests and experiments change."""

    durability: Durability = "interval"
    sync_interval_s: float = 1.0  # after a commit, with `interval`
    free_reserve_bytes: int = 0  # on the file system; 0: the larger of 1 GiB and 5 %, less where it is small
    commit_blocks: int = 8  # a transaction; 32 were slower
    commit_bytes_least: int = 1 << 20  # of frames; blocks that are smaller are put together up to 64
    commit_bytes_most: int = 8 << 20
    buffer_bytes: int = 16 << 20  # of frames that are being encoded, wait, or are being written
    max_readers: int = 64
    patience_s: float = 60.0  # for the writer, before a call answers BUSY
    reader_check_s: float = 30.0
    map_bytes: int = 0  # of the payloads; 0: what the capacity leaves
    boot_id: str = ""  # empty: the kernel's


DEFAULT_OPTIONS = LmdbOptions()


class LmdbTier(Tier, Scannable, ReadAhead, Checkable):
    """A durable tier in the directory `path`. Any thread may call any method.

    `set_aside` is where a damaged store went that was found at the start (None: there was none). `failure` is empty
    unless the store became unusable since: everything answers BUSY or MISSING then, and opening the tier anew (in a
    fresh process) repairs it.
    """

    def __init__(
        self,
        path: Path,
        capacity_bytes: int,
        memory: SlabMemory,
        block_format: BlockFormat,
        options: LmdbOptions = DEFAULT_OPTIONS,
    ) -> None:
        """Open or create; `capacity_bytes` bounds the files.

        A 16th of it, and at least 256 KiB, stays free: even a delete needs pages for the tree's new nodes, and free
        pages are in pieces.

        Raises:
            OSError: the directory cannot be used, or holds a newer format (which is left as it is).
            ValueError: there is no such durability.
        """
        if options.durability not in _DURABILITIES:
            raise ValueError(f"durability {options.durability!r}; there are {', '.join(_DURABILITIES)}")
        self.name = "cold"
        self.capacity_bytes = capacity_bytes
        self._memory = memory
        self._options = options
        self._tally = Tally(_COUNTERS)
        self._gate = Gate()
        self._close_lock = threading.Lock()
        self._closed = False
        sync = options.durability == "commit"
        self._store = open_store(
            path, StoreOptions(capacity_bytes, options.max_readers, options.map_bytes, sync, options.boot_id)
        )
        self._budget_bytes = capacity_bytes - max(_MIN_SLACK_BYTES, capacity_bytes // _SLACK_SHARE)
        self._room = Room(path, reserve_bytes(path, capacity_bytes, options.free_reserve_bytes), self._free_in_file)
        self._assemble(block_format)
        for part in (self._writer, self._syncer, self._keeper):
            part.start()

    def _assemble(self, block_format: BlockFormat) -> None:
        """The parts, none of them running yet."""
        options, store = self._options, self._store
        limits = CommitLimits(options.commit_blocks, options.commit_bytes_least, options.commit_bytes_most)
        self._transactions = Transactions(store, self._budget_bytes, self._tally)
        self._syncer = Syncer(store, self._gate, options.durability, options.sync_interval_s, self._tally)
        self._writer = ColdWriter(
            store,
            self._transactions,
            self._room,
            self._tally,
            self._syncer.committed,
            limits,
        )
        repair_s = min(options.patience_s, _REPAIR_PATIENCE_S)
        self._reader = ColdReader(store, self._writer, block_format.decode, self._memory, self._tally, repair_s)
        ring = BufferRing(options.buffer_bytes)
        self._encoder = Encoder(
            self._memory, block_format, self._writer, self._room, self._tally, ring, limits, options.patience_s
        )
        self._keeper = Keeper(store, self._gate, self._writer, self._transactions, self._reader, options.reader_check_s)

    @property
    def set_aside(self) -> Path | None:
        """Where a damaged store was moved when this tier was opened."""
        return self._store.set_aside

    @property
    def failure(self) -> str:
        """Why this tier can do no more; empty while it can."""
        return self._writer.failure

    def write(self, items: Sequence[TierItem]) -> list[WriteResult]:
        """Store blocks; each one that is OK survives the death of this process at any time.

        What it survives beyond that is the durability's. CORRUPT: the bytes fail the item's checksum. FULL: no room,
        on the disk or within the capacity. BUSY: the slab is not mapped, or the writer did not answer in time. A lossy
        copy does not replace an exact one: that is OK, with the sizes of what is kept.
        """
        with self._gate.inside() as entered:
            if entered:
                return self._encoder.write(items)
        return [WriteResult(Outcome.BUSY)] * len(items)

    def read(self, items: Sequence[TierItem]) -> list[Outcome]:
        """Fetch blocks.

        A copy that is damaged is CORRUPT, and deleted. MISSING, and kept: a copy of another content than is asked
        for, and one that is intact but of an unknown format.
        """
        with self._gate.inside() as entered:
            return self._reader.read(items) if entered else [Outcome.MISSING] * len(items)

    def prefetch(self, items: Sequence[TierItem]) -> None:
        """Have the disk read what read() will be asked for, in order; returns at once."""
        with self._gate.inside() as entered:
            if entered:
                self._reader.prefetch(items)

    def delete(self, refs: Sequence[BlockRef]) -> None:
        """Forget blocks; returns once that is committed.

        Raises:
            OSError: some deletes are not confirmed (the writer was busy, the disk is full); ask again for all.
        """
        with self._gate.inside() as entered:
            if not entered:
                raise OSError("the cold tier is closed; nothing was deleted")
            unsure = self._drop([Drop(entry_key(ref)) for ref in refs])
        if unsure:
            raise OSError(f"{unsure} of {len(refs)} deletes are not confirmed. {self.failure}")

    def scan(self, after: BlockRef | None = None) -> Iterator[StoredRecord]:
        """Every record, ordered by namespace and key, from behind `after`; touches no payload.

        Blocks stored or deleted meanwhile may be in it or not. Damaged records are deleted with their blocks.
        """
        position = entry_key(after) if after else b""
        while True:
            with self._gate.inside() as entered:
                entries = self._entries_after(position, _SCAN_BATCH) if entered else []
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
        self._syncer.flush()

    def check(self, after: BlockRef | None, limit: int, repair: bool) -> CheckPage:
        """See Checkable. Blocks of a format that this build does not know count as checked and are left alone."""
        with self._gate.inside() as entered:
            if not entered or self.failure:
                raise OSError(f"the cold tier cannot be checked: {self.failure or 'it is closed'}")
            entries = [entry for entry, _ in self._entries_after(entry_key(after) if after else b"", limit)]
            return Checker(self._reader, repair=repair).run(entries, more=len(entries) == limit)

    def compact(self) -> CompactResult:
        """See Checkable."""
        compaction = Compaction(self._store, self._gate, self._options.patience_s)
        with self._gate.inside() as entered:
            if not entered or self.failure or self._writer.paused:
                raise OSError(f"the cold tier cannot be compacted now. {self.failure}")
            compaction.check_room(self._room.reserve_bytes)
        outcome: list[CompactResult | OSError] = []
        self._writer.paused = True
        try:
            job = self._writer.submit([Run(lambda: self._compact(compaction, outcome))], self._options.patience_s)
            while not job.is_done(1.0):  # for as long as a copy takes; the writer's thread always answers
                pass
        finally:
            self._writer.paused = False
        self._keeper.wake()
        result = outcome[0] if outcome else OSError(f"the cold tier's writer did not compact. {self.failure}")
        if isinstance(result, OSError):
            raise result
        return result

    def stats(self) -> Mapping[str, int]:
        """Sums over the blocks held, the files, and counters since the start; see docs/durability.md.

        `stored_bytes` is in whole pages; `map_used_bytes` is what the files take at most, `map_bytes` the bound of
        the larger one. `device_bytes` are pages that LMDB wrote; `durability` is 0, 1 or 2 for none, interval, commit.
        """
        totals = self._transactions.totals
        return {
            "blocks": totals.blocks,
            "raw_bytes": totals.raw_bytes,
            "stored_bytes": totals.stored_bytes,
            "budget_bytes": self._budget_bytes,
            "map_used_bytes": self._store.used_bytes(),
            "map_bytes": self._store.payload.map_bytes,
            "reserve_bytes": self._room.reserve_bytes,
            "device_bytes": self._writer.device_bytes(),
            "durability": _DURABILITIES.index(self._options.durability),
            "set_aside": int(self.set_aside is not None),
            "failed": int(bool(self.failure)),
            **self._tally.snapshot(),
        }

    def close(self) -> None:
        """Finish what is under way, sync and close; idempotent.

        Where a reader or the writer does not end within the patience, the store stays open: unmapping it under a
        reader would be a SIGSEGV.

        Raises:
            OSError: the medium did not take the last writes.
        """
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
            patience_s = self._options.patience_s
            ended = [part.close(patience_s) for part in (self._keeper, self._syncer)]
            if all(ended) and self._gate.close(patience_s) and self._writer.close(patience_s):
                self._store.close()
            else:
                _log.error("cold tier: still in use after %.0f s; left open", patience_s)

    def _free_in_file(self) -> int:
        return usable_bytes(self._store.payload.used_bytes, self._transactions.totals.stored_bytes)

    def _compact(self, compaction: Compaction, outcome: list[CompactResult | OSError]) -> None:
        """On the writer's thread."""
        self._reader.pages_known = False
        try:
            outcome.append(compaction.run())
        except OSError as error:
            outcome.append(error)
        except DamagedEnvironmentError as error:
            self._writer.damaged(str(error))
        self._reader.values = ValueMap(self._store.payload)
        self._reader.pages_known = self._store.pages_are_known()

    def _drop(self, drops: Sequence[Drop]) -> int:
        """Have the writer carry out, and wait for it; how many are not confirmed."""
        patience_s = self._options.patience_s
        for start in range(0, len(drops), _DROP_BATCH):
            results = self._writer.submit(drops[start : start + _DROP_BATCH], patience_s).wait(patience_s)
            if any(result.outcome is Outcome.BUSY for result in results):
                return len(drops) - start
        return 0

    def _entries_after(self, position: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """The next records as they are stored, with their entry keys; in a transaction of their own."""
        try:
            with self._store.records.env.begin() as txn, txn.cursor() as cursor:
                if not cursor.set_range(position):  # set_range(b"") is the first
                    return []
                if position and cursor.key() == position and not cursor.next():
                    return []
                pairs = cursor.iternext(keys=True, values=True)
                return list(islice((pair for pair in pairs if len(pair[0]) == ENTRY_BYTES), limit))
        except lmdb.Error as error:
            self._writer.note(error, "read_failures")
            return []

    def _parse(self, entries: Sequence[tuple[bytes, bytes]]) -> list[StoredRecord]:
        """The records that are whole; the others are dropped."""
        found, damaged = [], []
        for entry, data in entries:
            try:
                found.append(unpack_record(entry, data).record)
            except ValueError:
                damaged.append(Drop(entry, data))
        self._tally.add("bad_records", len(damaged))
        self._drop(damaged)
        return found
