"""What the cold tier does beside its calls: dead readers, payloads without records, and pages that are not known.

One thread, in steps of bounded size: each holds one read transaction for some milliseconds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from itertools import islice

import lmdb

from kvstore.tiers.cold_env import BLOCKS, ColdStore
from kvstore.tiers.cold_file import DAMAGE, EnvironmentFile
from kvstore.tiers.cold_jobs import Command, Locate, Run, Settle
from kvstore.tiers.cold_pages import DamagedPagesError, Node, read_metas, subtree, walk
from kvstore.tiers.cold_read import ColdReader
from kvstore.tiers.cold_records import ENTRY_BYTES
from kvstore.tiers.cold_store import Transactions
from kvstore.tiers.cold_writer import ColdWriter
from kvstore.tiers.gate import Gate

_log = logging.getLogger(__name__)

_STEP_ENTRIES = 2000
_JOB_COMMANDS = 256
_ATTEMPTS = 20  # to see the meta page of a snapshot before the writer has gone two commits further
_PAUSE_S = 0.005  # between two steps, for the writer's other jobs


class Keeper:
    """Owns the thread. It ends with the gate."""

    def __init__(
        self,
        store: ColdStore,
        gate: Gate,
        writer: ColdWriter,
        transactions: Transactions,
        reader: ColdReader,
        reader_check_s: float,
    ) -> None:
        self._store = store
        self._gate = gate
        self._writer = writer
        self._transactions = transactions
        self._reader = reader
        self._reader_check_s = reader_check_s
        self._wake, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="cold-keeper", daemon=True)

    def start(self) -> None:
        """Begin; what does not agree after the start is looked for at once."""
        self._transactions.unsettled = not self._store.agrees()
        self._thread.start()

    def wake(self) -> None:
        """There is something to do."""
        self._wake.set()

    def close(self, timeout_s: float) -> bool:
        """End the thread after the step that it is at; whether it ended in time."""
        self._ended.set()
        self._wake.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                if not self._reader.pages_known:
                    self._locate()
                if self._transactions.unsettled:
                    self._transactions.unsettled = False
                    self._sweep()
                self._check_readers()
            except (DamagedPagesError, *DAMAGE) as error:
                self._writer.damaged(str(error))
                return
            except (lmdb.Error, OSError) as error:
                _log.warning("cold tier: housekeeping: %s", error)
            self._wake.wait(self._reader_check_s)
            self._wake.clear()

    def _check_readers(self) -> None:
        """Slots of readers that died keep old pages from being reused, and the file growing."""
        with self._gate.inside() as entered:
            if entered:
                self._store.payload.env.reader_check()
                self._store.records.env.reader_check()

    def _sweep(self) -> None:
        """Payloads and records that lack the other half: the writer looks again, and forgets them."""

        def suspects(nodes: list[Node], after: bytes, last: bytes) -> list[Command]:
            records = self._record_keys(after, last)
            return [Settle(entry) for entry in sorted(records ^ {node.key for node in nodes})]

        self._each_step(suspects)

    def _locate(self) -> None:
        """Note where the payloads lie, after a compaction or the import of an older format moved or never noted it."""

        def pages(nodes: list[Node], _after: bytes, _last: bytes) -> list[Command]:
            return [Locate(node.key, node.page) for node in nodes if node.page]

        if self._each_step(pages):
            self._submit([Run(self._confirm)])

    def _confirm(self) -> None:
        try:
            self._store.confirm_layout()
        except lmdb.Error as error:
            self._writer.note(error, "write_failures")
            return
        self._reader.pages_known = True

    def _each_step(self, commands_for: Callable[[list[Node], bytes, bytes], list[Command]]) -> bool:
        """Walk all payloads in steps; whether it came to the end and every command was carried out."""
        after = b""
        while True:
            if self._ended.wait(_PAUSE_S) or self._writer.failure:
                return False
            with self._gate.inside() as entered:
                if not entered:
                    return False
                nodes = self._step(after)
                last = nodes[-1].key if len(nodes) == _STEP_ENTRIES else b"\xff" * ENTRY_BYTES
                commands = commands_for(nodes, after, last)
            if not self._submit(commands):
                return False
            if len(nodes) < _STEP_ENTRIES:
                return True
            after = last

    def _step(self, after: bytes) -> list[Node]:
        """Some payloads behind an entry, from the pages of one snapshot; values are not touched."""
        payload = self._store.payload
        for _ in range(_ATTEMPTS):
            with payload.env.begin() as txn:  # which keeps the snapshot's pages from being reused
                found = _nodes(payload, txn.id(), after)
                if found is not None:
                    return list(islice(found, _STEP_ENTRIES))
        raise OSError(f"no snapshot of {payload.path} lasted long enough to be walked")

    def _record_keys(self, after: bytes, last: bytes) -> set[bytes]:
        keys = set()
        with self._store.records.env.begin() as txn, txn.cursor() as cursor:
            if cursor.set_range(after + b"\x00" if after else b""):
                for key in cursor.iternext(keys=True, values=False):
                    if key > last:
                        break
                    if len(key) == ENTRY_BYTES:
                        keys.add(key)
        return keys

    def _submit(self, commands: list[Command]) -> bool:
        for first in range(0, len(commands), _JOB_COMMANDS):
            job = self._writer.submit(commands[first : first + _JOB_COMMANDS], self._reader_check_s)
            while not job.is_done(_PAUSE_S * 10):
                if self._ended.is_set():
                    return False
            if job.turned_away:
                return False
        return True


def _nodes(file: EnvironmentFile, transaction: int, after: bytes) -> Iterator[Node] | None:
    for meta in read_metas(file.fd):
        if meta.transaction == transaction:
            tree = subtree(file.fd, meta.main, BLOCKS)
            return iter(()) if tree is None else walk(file.fd, tree, after)
    return None
