"""The cold tier's writer: one thread that owns every write transaction (an LMDB write transaction lives on one thread).

Others hand it jobs, each a few commands of one kind, and wait for the results. A job of puts is one transaction in
each environment, payloads first; small jobs that wait together are stored together. Where a transaction fails for want
of room its puts are tried one by one, so that one block too many does not cost the rest.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import lmdb

from kvstore.tiers.base import Outcome, WriteResult
from kvstore.tiers.cold_env import ColdStore
from kvstore.tiers.cold_file import DAMAGE
from kvstore.tiers.cold_jobs import Command, CommitLimits, Drop, Job, Put, Run, Settle
from kvstore.tiers.cold_room import Room
from kvstore.tiers.cold_store import Transactions
from kvstore.tiers.tally import Tally

_log = logging.getLogger(__name__)

_QUEUE_JOBS = 2  # that wait; what is encoded ahead is bounded by its buffers
_IDLE_S = 0.05  # without a job, before pages that deletes freed are made usable


class ColdWriter:
    """Owns the writer thread. Any thread may submit.

    `failure` is empty until the store can no longer be used (damage, or a failed write of a meta page); it then says
    why, and everything answers BUSY. `paused` answers BUSY to all but Run.
    """

    def __init__(
        self,
        store: ColdStore,
        transactions: Transactions,
        room: Room,
        tally: Tally,
        committed: Callable[[float, Sequence[tuple[int, int]]], None],
        limits: CommitLimits,
    ) -> None:
        """`tally` has write_failures, map_full and full; `committed` is told how each commit went."""
        self._store = store
        self._transactions = transactions
        self._room = room
        self._tally = tally
        self._queue: queue.Queue[Job | None] = queue.Queue(_QUEUE_JOBS)
        self._next: Job | None = None
        self._closed = self._ended = False
        self._commits_since_tick = 0
        self._freed = False  # by a delete, and not usable yet
        self._limits = limits
        self._committed = committed
        self._device_bytes = 0
        self.paused = False
        self.failure = ""
        self._thread = threading.Thread(target=self._run, name="cold-writer", daemon=True)

    def device_bytes(self) -> int:
        """Bytes that the writer's thread gave the kernel to write: LMDB's pages, each commit's own included.

        An estimate of what the device gets: the kernel may write a page once that two commits changed.
        """
        with contextlib.suppress(OSError, StopIteration, ValueError):  # the thread has ended, or no /proc
            lines = Path(f"/proc/self/task/{self._thread.native_id}/io").read_text().splitlines()
            self._device_bytes = int(next(line for line in lines if line.startswith("wchar:")).split()[1])
        return self._device_bytes

    def start(self) -> None:
        """Serve."""
        self._thread.start()

    def submit(
        self,
        commands: Sequence[Command],
        timeout_s: float,
        release: Callable[[Sequence[Command]], None] = lambda _commands: None,
    ) -> Job:
        """Queue commands as one job, waiting for a place in the queue; without one in time, the job is BUSY."""
        job = Job(commands, release)
        refused = self._closed or self.failure or (self.paused and not isinstance(commands[0], Run))
        if not commands or refused:
            job.finish(None if commands else [])
            return job
        try:
            self._queue.put(job, timeout=timeout_s)
        except queue.Full:
            job.finish()
        return job

    def note(self, error: Exception, counter: str) -> None:
        """Count an error that somebody met, and stop for good where it means damage. Any thread."""
        self._tally.add(counter)
        _log.warning("cold tier: %s: %s", counter, error)
        if isinstance(error, DAMAGE):
            self._store.history.condemn(str(error))
        if isinstance(error, (*DAMAGE, lmdb.PanicError)):
            self.failure = str(error)

    def damaged(self, reason: str) -> None:
        """Stop for good: what lies on the medium cannot be trusted. Any thread."""
        self._store.history.condemn(reason)
        self.failure = reason

    def close(self, timeout_s: float) -> bool:
        """Carry out what is queued and end the thread; whether it ended in time."""
        self._closed = True
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._take()) is not None:
            jobs = self._gather(job)
            results = None
            try:
                results = self._serve([command for each in jobs for command in each.commands])
            finally:
                self._answer(jobs, results)
                if results is None:
                    self._turn_away()

    def _take(self) -> Job | None:
        """The next job; while there is none, what deletes freed is made usable."""
        job, self._next = self._next, None
        if job is not None or self._ended:
            return job
        try:
            return self._queue.get(timeout=_IDLE_S if self._freed else None)
        except queue.Empty:
            self._freed = False
            self._tick()
            return self._queue.get()

    def _gather(self, first: Job) -> list[Job]:
        """The job, and others like it that wait already, as long as they fit one transaction."""
        jobs = [first]
        blocks, nbytes = len(first.commands), first.frame_bytes
        while first.stores and not self._limits.are_reached(blocks, nbytes):
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                break
            self._ended = job is None
            if job is None or not job.stores or nbytes + job.frame_bytes > self._limits.most_bytes:
                self._next = job
                break
            jobs.append(job)
            blocks, nbytes = blocks + len(job.commands), nbytes + job.frame_bytes
        return jobs

    def _answer(self, jobs: Sequence[Job], results: Sequence[WriteResult] | None) -> None:
        first = 0
        for job in jobs:
            size = len(job.commands)
            job.finish(None if results is None else results[first : first + size])
            first += size

    def _turn_away(self) -> None:
        """Nobody will serve what is queued."""
        self.failure = self.failure or "the writer thread met an error that it does not know; the log has it"
        with contextlib.suppress(queue.Empty):
            while (job := self._queue.get_nowait()) is not None:
                job.finish()

    def _serve(self, commands: Sequence[Command]) -> list[WriteResult]:
        stores = isinstance(commands[0], Put)
        if self.failure:
            return [WriteResult(Outcome.BUSY)] * len(commands)
        if stores and not self._room.allows(sum(c.frame.nbytes for c in commands if isinstance(c, Put))):
            return self._no_room(commands)
        try:
            return self._commit(commands)
        except lmdb.MapFullError:
            self._tally.add("map_full")
            if self._tick():
                return self._serve(commands)
        except lmdb.Error as error:
            self.note(error, "write_failures")
            if stores and len(commands) == 1:
                self._room.disk_failed()
        if self.failure or not stores:
            return [WriteResult(Outcome.BUSY)] * len(commands)
        if len(commands) == 1:
            return [WriteResult(Outcome.FULL)]
        return [result for command in commands for result in self._serve([command])]

    def _no_room(self, commands: Sequence[Command]) -> list[WriteResult]:
        if len(commands) > 1 and not self._room.is_closed():  # some may fit
            return [result for command in commands for result in self._serve([command])]
        self._room.close()
        self._tally.add("full", len(commands))
        return [WriteResult(Outcome.FULL)] * len(commands)

    def _commit(self, commands: Sequence[Command]) -> list[WriteResult]:
        start_s = time.perf_counter()
        results = self._transactions.carry_out(commands)
        self._commits_since_tick += 1
        self._freed |= isinstance(commands[0], Drop | Settle)
        if not isinstance(commands[0], Run):
            stored, self._transactions.stored = self._transactions.stored, []
            self._committed(time.perf_counter() - start_s, stored)
        return results

    def _tick(self) -> bool:
        """Commit twice without effect, if anything was committed since the last time; whether that was done.

        Pages that a transaction freed can be used two transactions later. A transaction that fails is aborted and
        does not count: without these two, the first put after a delete would find the map full for ever.
        """
        if not self._commits_since_tick or self.failure:
            return False
        self._commits_since_tick = 0
        try:
            self._transactions.tick()
        except lmdb.MapFullError:
            return False
        except lmdb.Error as error:
            self.note(error, "write_failures")
            return False
        return True
