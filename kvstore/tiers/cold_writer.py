"""The cold tier's writer: one thread that owns every write transaction (an LMDB write transaction lives on one thread).

Others hand it jobs, each a few blocks to put or to drop, and wait for the outcomes. A job is one transaction; where
that fails for want of room its commands are tried one by one, so that one block too many does not cost the rest.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Sequence
from typing import NamedTuple

import lmdb
import numpy as np
from numpy.typing import NDArray

from kvstore.tiers.base import Outcome
from kvstore.tiers.cold_env import DAMAGE, ColdEnvironment
from kvstore.tiers.cold_records import Totals, footprint_bytes, unpack_record
from kvstore.tiers.tally import Tally

_log = logging.getLogger(__name__)


class Put(NamedTuple):
    """Store a frame and its record under an entry key, in place of what is there."""

    entry: bytes
    frame: NDArray[np.uint8]
    record: bytes
    raw_bytes: int
    stored_bytes: int


class Drop(NamedTuple):
    """Forget an entry; if `head` is not empty, only while its frame still begins with these bytes."""

    entry: bytes
    head: bytes = b""


Command = Put | Drop


class Job:
    """Commands on their way; wait() gives an outcome for each."""

    def __init__(self, commands: Sequence[Command]) -> None:
        self.commands = commands
        self.turned_away = False
        self._done = threading.Event()
        self._outcomes = [Outcome.BUSY] * len(commands)

    def finish(self, outcomes: list[Outcome] | None = None) -> None:
        """Let the waiter go; without outcomes it is told BUSY."""
        self.turned_away = outcomes is None
        self._outcomes = outcomes or self._outcomes
        self.commands = ()  # they hold the frames, and a caller may hold many jobs
        self._done.set()

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Outcomes in order; all BUSY if they did not come in time (the commands may still be carried out)."""
        if not self._done.wait(timeout_s):
            return [Outcome.BUSY] * len(self._outcomes)
        return self._outcomes


class ColdWriter:
    """Owns the writer thread. Any thread may submit.

    `failure` is empty until the environment can no longer be used (damage, or a failed write of a meta page); it
    then says why, and everything answers BUSY.
    """

    def __init__(self, cold: ColdEnvironment, budget_bytes: int, queue_jobs: int, tally: Tally) -> None:
        """`budget_bytes` bounds the sum of stored bytes; `tally` has write_failures, map_full and full."""
        self._cold = cold
        self._budget_bytes = budget_bytes
        self._tally = tally
        self._queue: queue.Queue[Job | None] = queue.Queue(queue_jobs)
        self._closed = False
        self._commits_since_tick = 0
        self.failure = ""
        self.totals = cold.totals()
        self._thread = threading.Thread(target=self._run, name="cold-writer", daemon=True)
        self._thread.start()

    def submit(self, commands: Sequence[Command], timeout_s: float) -> Job:
        """Queue commands as one job, waiting for a place in the queue; without one in time, the job is BUSY."""
        job = Job(commands)
        if self._closed or self.failure:
            job.finish()
            return job
        try:
            self._queue.put(job, timeout=timeout_s)
        except queue.Full:
            job.finish()
        return job

    def note(self, error: lmdb.Error, counter: str) -> None:
        """Count an error that somebody met, and stop for good where it means damage. Any thread."""
        self._tally.add(counter)
        _log.warning("cold tier: %s: %s", counter, error)
        if isinstance(error, DAMAGE):
            self._cold.condemn(str(error))
        if isinstance(error, (*DAMAGE, lmdb.PanicError)):
            self.failure = str(error)

    def close(self, timeout_s: float) -> bool:
        """Carry out what is queued and end the thread; whether it ended in time."""
        self._closed = True
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            outcomes = None
            try:
                outcomes = self._serve(job.commands)
            finally:
                job.finish(outcomes)
                if outcomes is None:
                    self._turn_away()

    def _turn_away(self) -> None:
        """Nobody will serve what is queued."""
        self.failure = self.failure or "the writer thread met an error that it does not know; the log has it"
        with contextlib.suppress(queue.Empty):
            while (job := self._queue.get_nowait()) is not None:
                job.finish()

    def _serve(self, commands: Sequence[Command]) -> list[Outcome]:
        if not commands:
            return []
        try:
            return self._commit(commands)
        except lmdb.MapFullError:
            self._tally.add("map_full")
            if self._tick():
                return self._serve(commands)
        except lmdb.Error as error:
            self.note(error, "write_failures")
        if self.failure:
            return [Outcome.BUSY] * len(commands)
        if len(commands) == 1:
            return [Outcome.FULL]
        return [outcome for command in commands for outcome in self._serve([command])]

    def _tick(self) -> bool:
        """Commit twice without effect, if anything was committed since the last time; whether that was done.

        Pages that a transaction freed can be used two transactions later. A transaction that fails is aborted and
        does not count: without these two, the first put after a delete would find the map full for ever.
        """
        if not self._commits_since_tick:
            return False
        self._commits_since_tick = 0
        try:
            for turn in (b"0", b"1"):
                with self._cold.env.begin(write=True) as txn:
                    txn.put(b"tick", turn, db=self._cold.meta)
        except lmdb.MapFullError:
            return False
        except lmdb.Error as error:
            self.note(error, "write_failures")
            return False
        return True

    def _commit(self, commands: Sequence[Command]) -> list[Outcome]:
        """All commands in one transaction, which an exception aborts."""
        with self._cold.env.begin(write=True, buffers=True) as txn:
            totals = self.totals
            outcomes = []
            for command in commands:
                if isinstance(command, Put):
                    outcome, totals = self._put(txn, command, totals)
                else:
                    outcome, totals = Outcome.OK, self._drop(txn, command, totals)
                outcomes.append(outcome)
            if totals != self.totals:
                txn.put(b"totals", totals.pack(), db=self._cold.meta)
        self.totals = totals
        self._commits_since_tick += 1
        self._cold.cover()
        return outcomes

    def _put(self, txn: lmdb.Transaction, put: Put, totals: Totals) -> tuple[Outcome, Totals]:
        after = self._without(txn, put.entry, totals).plus(put.raw_bytes, put.stored_bytes)
        if after.stored_bytes > self._budget_bytes:
            self._tally.add("full")
            return Outcome.FULL, totals
        txn.put(put.entry, put.frame.data, db=self._cold.blocks)
        txn.put(put.entry, put.record, db=self._cold.records)
        return Outcome.OK, after

    def _drop(self, txn: lmdb.Transaction, drop: Drop, totals: Totals) -> Totals:
        if drop.head and bytes(txn.get(drop.entry, b"", db=self._cold.blocks)[: len(drop.head)]) != drop.head:
            return totals  # a newer copy has taken its place
        after = self._without(txn, drop.entry, totals)
        txn.delete(drop.entry, db=self._cold.blocks)
        txn.delete(drop.entry, db=self._cold.records)
        return after

    def _without(self, txn: lmdb.Transaction, entry: bytes, totals: Totals) -> Totals:
        """Totals once the entry is gone."""
        record = txn.get(entry, db=self._cold.records)
        if record is None:
            return totals
        try:
            old = unpack_record(entry, bytes(record))
        except ValueError:  # its raw size is lost, its stored size is not
            return totals.minus(0, footprint_bytes(len(txn.get(entry, b"", db=self._cold.blocks))))
        return totals.minus(old.nbytes, old.stored_bytes)
