"""The cold tier's transactions: what each command of the writer does to the two environments, and in which order.

Payload first, then the record; a delete is the other way round. So whatever moment the process dies at, every record
that is there was committed after its payload.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lmdb
import numpy as np

from kvstore.tiers.base import Outcome, StoredRecord, WriteResult
from kvstore.tiers.cold_env import ColdStore
from kvstore.tiers.cold_jobs import Command, Drop, Locate, Put, Run, Settle
from kvstore.tiers.cold_map import page_of
from kvstore.tiers.cold_records import Totals, entry_ref, pack_record, unpack_record
from kvstore.tiers.tally import Tally

_log = logging.getLogger(__name__)
_OK = WriteResult(Outcome.OK)
_FULL = WriteResult(Outcome.FULL)
_MISSING = WriteResult(Outcome.MISSING)


class Transactions:
    """Carries commands out, on the writer's thread. `totals` are those of the last commit; any thread may read them.

    `unsettled` is set once a payload may be there without a record: the keeper then looks for it.
    """

    def __init__(self, store: ColdStore, budget_bytes: int, tally: Tally) -> None:
        """`budget_bytes` bounds the sum of stored bytes; `tally` has full, swept and written_bytes."""
        self._store = store
        self._budget_bytes = budget_bytes
        self._tally = tally
        self._turn = 0
        self.totals = store.totals
        self.unsettled = False
        self.stored: list[tuple[int, int]] = []  # page and size of each payload of the last puts

    def carry_out(self, commands: Sequence[Command]) -> list[WriteResult]:
        """Commands of one kind, in as few transactions as their order allows.

        Raises:
            lmdb.Error: nothing of it was done, as far as any reader can tell.
        """
        match commands[0]:
            case Put():
                return self._store_all([command for command in commands if isinstance(command, Put)])
            case Run():
                for command in commands:
                    if isinstance(command, Run):
                        command.function()
            case Locate():
                self._locate([command for command in commands if isinstance(command, Locate)])
            case _:
                return self._forget([command for command in commands if isinstance(command, Drop | Settle)])
        return [_OK] * len(commands)

    def tick(self) -> None:
        """Two commits without effect in each environment, so that freed pages can be used again."""
        for _ in range(2):
            self._turn += 1
            for file in (self._store.payload, self._store.records):
                file.put(b"tick", b"%d" % (self._turn % 2))
                file.cover()

    def _store_all(self, puts: Sequence[Put]) -> list[WriteResult]:
        totals, results = self._plan(puts)
        kept = [(put, result) for put, result in zip(puts, results, strict=True) if result is _OK]
        if kept:
            pages = self._put_payloads([put for put, _ in kept])
            try:
                self._put_records([put for put, _ in kept], pages, totals)
            except lmdb.Error:
                self._take_back([put.entry for put, _ in kept])
                raise
            self.totals = totals
            self.stored = [(page, put.frame.nbytes) for page, (put, _) in zip(pages, kept, strict=True)]
            self._tally.add("written_bytes", sum(put.frame.nbytes for put, _ in kept))
        return [_result(put) if result is _OK else result for put, result in zip(puts, results, strict=True)]

    def _plan(self, puts: Sequence[Put]) -> tuple[Totals, list[WriteResult]]:
        """What each put will come to, and the totals after all of them."""
        totals = self.totals
        results: list[WriteResult] = []
        mine: dict[bytes, StoredRecord] = {}
        with self._store.records.env.begin() as txn:
            for put in puts:
                old = mine.get(put.entry) or _record_of(txn.get(put.entry), put.entry)
                if put.record.lossy and isinstance(old, StoredRecord) and _is_better(old, put.record):
                    results.append(_kept(old))
                    continue
                without = totals if old is None else totals.minus(old.nbytes, old.stored_bytes)
                after = without.plus(put.record.nbytes, put.record.stored_bytes)
                if after.stored_bytes > self._budget_bytes:
                    self._tally.add("full")
                    results.append(_FULL)
                    continue
                totals = after
                mine[put.entry] = put.record
                results.append(_OK)
        return totals, results

    def _put_payloads(self, puts: Sequence[Put]) -> list[int]:
        """The first page of each payload; 0 where it has no pages of its own."""
        payload = self._store.payload
        pages = []
        with payload.env.begin(db=payload.main, write=True, buffers=True) as txn:
            for put in puts:
                txn.put(put.entry, put.frame.data)
                pages.append(page_of(np.frombuffer(txn.get(put.entry, b""), dtype=np.uint8)))
        payload.cover()
        return pages

    def _put_records(self, puts: Sequence[Put], pages: Sequence[int], totals: Totals) -> None:
        with self._store.records.env.begin(write=True) as txn:
            for put, page in zip(puts, pages, strict=True):
                txn.put(put.entry, pack_record(put.record, page))
            txn.put(b"totals", totals.pack())
        self._store.records.cover()

    def _take_back(self, entries: Sequence[bytes]) -> None:
        """Payloads whose records could not be written: gone at once, or swept later."""
        self.unsettled = True
        try:
            self._delete_payloads(entries)
        except lmdb.Error as error:
            _log.warning("cold tier: %d payloads without a record are left to be swept: %s", len(entries), error)

    def _forget(self, commands: Sequence[Drop | Settle]) -> list[WriteResult]:
        """Records first: from then on the blocks are misses. MISSING for what was not as the command wants it."""
        totals, lost_size = self.totals, False
        gone: list[bytes] = []
        results = []
        with (
            self._store.payload.env.begin(db=self._store.payload.main) as payloads,
            self._store.records.env.begin(write=True) as txn,
        ):
            for command in commands:
                data = txn.get(command.entry)
                if isinstance(command, Drop):
                    chosen = not command.record or data == command.record
                else:
                    chosen = (data is None) == _has(payloads, command.entry)
                    self._tally.add("swept", int(chosen))
                results.append(_OK if chosen else _MISSING)
                if not chosen:
                    continue
                gone.append(command.entry)
                old = _record_of(data, command.entry)
                if old is not None:
                    lost_size |= old.nbytes == 0
                    totals = totals.minus(old.nbytes, old.stored_bytes)
                    txn.delete(command.entry)
            if totals != self.totals:
                txn.put(b"totals", totals.pack())
        self._store.records.cover()
        self.totals = self._store.rebuild_totals() if lost_size else totals
        try:
            self._delete_payloads(gone)
        except lmdb.Error:
            self.unsettled = True
            raise
        return results

    def _delete_payloads(self, entries: Sequence[bytes]) -> None:
        payload = self._store.payload
        if entries:
            with payload.env.begin(db=payload.main, write=True) as txn:
                for entry in entries:
                    txn.delete(entry)
            payload.cover()

    def _locate(self, commands: Sequence[Locate]) -> None:
        with self._store.records.env.begin(write=True) as txn:
            for command in commands:
                data = txn.get(command.entry)
                try:
                    record, page = unpack_record(command.entry, data or b"")
                except ValueError:  # gone meanwhile, or damaged: whoever reads it sees to that
                    continue
                if page != command.page:
                    txn.put(command.entry, pack_record(record, command.page))
        self._store.records.cover()


def _result(put: Put) -> WriteResult:
    record = put.record
    return WriteResult(Outcome.OK, record.stored_bytes, record.codec, record.lossy, record.checksum)


def _kept(old: StoredRecord) -> WriteResult:
    return WriteResult(Outcome.OK, old.stored_bytes, old.codec, old.lossy, old.checksum)


def _is_better(old: StoredRecord, new: StoredRecord) -> bool:
    """Whether a lossy copy must not replace what there is: an exact copy of the same epoch."""
    return not old.lossy and (old.epoch, old.nbytes) == (new.epoch, new.nbytes)


def _record_of(data: bytes | None, entry: bytes) -> StoredRecord | None:
    """The record, if there is one; one that is damaged counts with nothing, as its sizes are lost."""
    if data is None:
        return None
    try:
        return unpack_record(entry, data).record
    except ValueError:
        return StoredRecord(entry_ref(entry), b"", b"", 0, 0, 0)


def _has(txn: lmdb.Transaction, entry: bytes) -> bool:
    """Whether there is a payload, without reading all of it as get() would."""
    cursor: Any
    with txn.cursor() as cursor:
        return bool(cursor.set_key(entry))
