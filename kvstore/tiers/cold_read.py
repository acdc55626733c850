"""Reading from the cold tier, on the callers' own threads.

Each block is a short transaction that decodes from the map straight into slab memory. Before that its record is looked
up: it says whether the stored copy is the one that is asked for, and at which page of the file its payload lies. So
the disk can be told what comes next, and the pages can be taken before anything touches them: LMDB's get() reads every
page of a value, one fault at a time, before it returns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import lmdb
import numpy as np
from numpy.typing import NDArray

from kvstore.tiers.base import Outcome, SlabMemory, StoredRecord, TierItem
from kvstore.tiers.checksums import block_checksum
from kvstore.tiers.cold_env import ColdStore
from kvstore.tiers.cold_jobs import Drop
from kvstore.tiers.cold_map import CutFileError, UnreadablePagesError, ValueMap
from kvstore.tiers.cold_records import entry_key, entry_ref, payload_bytes, unpack_record
from kvstore.tiers.cold_writer import ColdWriter
from kvstore.tiers.tally import Tally

_log = logging.getLogger(__name__)

_AHEAD = 16  # blocks that the disk is told of before they are needed
READ_COUNTERS = (
    "corrupt",  # copies dropped, and writes refused, because the bytes failed their checksum
    "missing",
    "other_copy",  # reads of a content that is not the stored one
    "read_failures",  # errors of LMDB or of the disk while reading
    "unmapped",
    "unsupported",  # copies that another build wrote
)


class Found(NamedTuple):
    """A record as it is stored and parsed (None: damaged), and the pages of its payload."""

    data: bytes
    record: StoredRecord | None
    page: int
    page_bytes: int


class ColdReader:
    """Serves reads of one store. `values` must be renewed when the payloads' environment is opened anew."""

    def __init__(
        self,
        store: ColdStore,
        writer: ColdWriter,
        decode: Callable[[memoryview, TierItem, NDArray[np.uint8]], None],
        memory: SlabMemory,
        tally: Tally,
        patience_s: float,
    ) -> None:
        """`tally` has READ_COUNTERS; `patience_s` is for the writer that drops a bad copy."""
        self._store = store
        self._writer = writer
        self._decode_frame = decode
        self._memory = memory
        self._tally = tally
        self._patience_s = patience_s
        self.values = ValueMap(store.payload)
        self.pages_known = store.pages_are_known()

    def read(self, items: Sequence[TierItem]) -> list[Outcome]:
        """Outcomes in order; the disk is told of the blocks ahead as it goes."""
        outcomes: list[Outcome] = []
        found = self.look_up([entry_key(item.ref) for item in items])
        told = self._advise(found, 0, _AHEAD) if len(items) > 1 else 0
        for position, item in enumerate(items):
            if 0 < told < len(items):
                told = self._advise(found, told, position + _AHEAD)
            outcomes.append(self._read(item, found[position]))
        return outcomes

    def prefetch(self, items: Sequence[TierItem]) -> None:
        """Have the disk read what read() will be asked for."""
        self._advise(self.look_up([entry_key(item.ref) for item in items]), 0, len(items))

    def look_up(self, entries: Sequence[bytes]) -> list[Found | None]:
        """The records of some blocks; none where there is none, or the store cannot be used.

        Pages that a compaction may have moved are left out. Whether it may have is asked before the records are read:
        those that were read until the new pages had been noted still have the old ones.
        """
        known = self.pages_known
        nothing: list[Found | None] = [None] * len(entries)
        if self._writer.failure:
            return nothing
        for file in (self._store.records, self._store.payload):
            if file.is_cut():
                self._cut(f"{file.path} was truncated")
                return nothing
        try:
            with self._store.records.env.begin() as txn:
                found = [_parse(entry, txn.get(entry)) for entry in entries]
        except lmdb.Error as error:
            self._writer.note(error, "read_failures")
            return nothing
        return found if known else [one and one._replace(page=0) for one in found]

    def fetch(self, item: TierItem, found: Found, out: NDArray[np.uint8]) -> Outcome:
        """Decode a block into `out`; nothing is dropped or counted. BUSY: LMDB has no reader to spare."""
        payload = self._store.payload
        try:
            self._take_pages(found)
            with payload.env.begin(db=payload.main, buffers=True) as txn:
                frame = txn.get(entry_key(item.ref))
                if frame is None:
                    return Outcome.MISSING
                self.values.learn(np.frombuffer(frame, dtype=np.uint8))
                return self._decode(frame, item, out)
        except UnreadablePagesError as error:
            self._tally.add("read_failures")
            _log.warning("cold tier: block %s cannot be read: %s", item.ref.key.hex(), error)
            return Outcome.CORRUPT
        except CutFileError as error:
            self._cut(str(error))
        except lmdb.ReadersFullError:
            return Outcome.BUSY
        except lmdb.Error as error:
            self._writer.note(error, "read_failures")
        return Outcome.MISSING

    def has_payload(self, entry: bytes) -> bool:
        """Whether there is a payload, of whatever format.

        Raises:
            OSError: the store cannot be used any more.
        """
        payload = self._store.payload
        try:
            if not self._writer.failure:
                with payload.env.begin(db=payload.main) as txn, txn.cursor() as cursor:
                    return bool(cursor.set_key(entry))
        except lmdb.Error as error:
            self._writer.note(error, "read_failures")
        raise OSError(f"the cold tier cannot be read. {self._writer.failure}")

    def drop(self, entry: bytes, found: Found) -> Outcome:
        """Have a bad copy forgotten: OK, BUSY if that is not sure, or MISSING if another has taken its place."""
        command = Drop(entry, found.data)
        return self._writer.submit([command], self._patience_s).wait(self._patience_s)[0].outcome

    def _advise(self, found: Sequence[Found | None], start: int, stop: int) -> int:
        """Tell the disk of some payloads; up to which one it has been told."""
        for one in islice(found, start, stop):
            if one is not None and one.page:
                self.values.advise(one.page, one.page_bytes)
        return min(stop, len(found))

    def _read(self, item: TierItem, found: Found | None) -> Outcome:
        try:
            out = self._memory.view(item.range)
        except KeyError:
            self._tally.add("unmapped")
            return Outcome.BUSY
        if found is None:
            self._tally.add("missing")
            return Outcome.MISSING
        if found.record is not None and not _is_asked_for(found.record, item):
            self._tally.add("other_copy")
            return Outcome.MISSING
        outcome = Outcome.CORRUPT if found.record is None else self.fetch(item, found, out)
        if outcome is Outcome.MISSING:
            self._tally.add("missing")
        if outcome is not Outcome.CORRUPT:
            return outcome
        # Only this very copy goes: one that was written meanwhile has another record, and this read came too late.
        if self.drop(entry_key(item.ref), found) is Outcome.MISSING:
            self._tally.add("other_copy")
            return Outcome.MISSING
        self._tally.add("corrupt")
        return Outcome.CORRUPT

    def _take_pages(self, found: Found) -> None:
        if found.page:
            self.values.populate(found.page, found.page_bytes)

    def _decode(self, frame: memoryview, item: TierItem, out: NDArray[np.uint8]) -> Outcome:
        try:
            self._decode_frame(frame, item, out)
            if block_checksum(out) == item.checksum:
                return Outcome.OK
            reason = "the checksum of its bytes is wrong"
        except LookupError as error:
            self._tally.add("unsupported")
            _log.info("cold tier: block %s is not readable by this build: %s", item.ref.key.hex(), error)
            return Outcome.MISSING
        except ValueError as error:
            reason = str(error)
        _log.warning("cold tier: block %s is damaged: %s", item.ref.key.hex(), reason)
        return Outcome.CORRUPT

    def _cut(self, reason: str) -> None:
        self._tally.add("read_failures")
        self._writer.damaged(reason)


def _parse(entry: bytes, data: bytes | None) -> Found | None:
    if data is None:
        return None
    try:
        record, page = unpack_record(entry, data)
    except ValueError as error:
        _log.warning("cold tier: record of block %s: %s", entry_ref(entry).key.hex(), error)
        return Found(data, None, 0, 0)
    return Found(data, record, page, payload_bytes(record.stored_bytes))


def _is_asked_for(record: StoredRecord, item: TierItem) -> bool:
    return (record.checksum, record.nbytes) == (item.checksum, item.range.nbytes)
