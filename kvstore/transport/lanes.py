"""Where calls run that may block: puts in order on a lane of their session, waits on one bounded pool.

Jobs are callables that answer their caller themselves and raise nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from queue import SimpleQueue
from typing import TypeAlias

from kvstore.protocol.errors import Unavailable

Job: TypeAlias = Callable[[], None]

_IDLE_S = 10.0  # after which a thread of the pool ends


class Lane:
    """Runs jobs one after the other in order of arrival, on a thread that is started by the first job.

    The queue is bounded by its users: a session has at most MAX_CALLS_IN_FLIGHT calls, gRPC its own limit.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._started = False
        self._closed = False

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            Unavailable: the lane is closed, or there is no thread to be had.
        """
        with self._lock:
            if self._closed:
                raise Unavailable("the session has ended")
            if not self._started:
                _start(self._run, self._name)
                self._started = True
            self._jobs.put(job)

    def close(self) -> None:
        """Take no more jobs; those queued still run. Does not wait for them."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


class WaitPool:
    """Threads for calls that wait, started as they are needed and ended when idle.

    At most `owner_max` jobs of one owner run at a time; its others wait their turn, so that one session's 64
    waits cannot take every thread from the rest.
    """

    def __init__(self, threads_max: int, owner_max: int) -> None:
        self._threads_max = threads_max
        self._owner_max = owner_max
        self._cond = threading.Condition()
        self._ready: deque[tuple[Hashable, Job]] = deque()
        self._parked: dict[Hashable, deque[Job]] = {}
        self._running: dict[Hashable, int] = {}  # jobs of an owner that run or are in _ready
        self._threads = 0
        self._idle = 0
        self._closed = False

    def submit(self, owner: Hashable, job: Job) -> None:
        """Queue a job.

        Raises:
            Unavailable: the pool is closed, or there is no thread to be had.
        """
        with self._cond:
            if self._closed:
                raise Unavailable("the daemon is shutting down")
            running = self._running.get(owner, 0)
            if running >= self._owner_max:
                self._parked.setdefault(owner, deque()).append(job)
                return
            if self._idle <= len(self._ready) and self._threads < self._threads_max:
                self._grow()
            self._running[owner] = running + 1
            self._ready.append((owner, job))
            self._cond.notify()

    def close(self) -> None:
        """Take no more jobs and end the threads once those queued have run. Does not wait for them."""
        with self._cond:
            self._closed = True
            self._cond.notify_all()

    def _grow(self) -> None:
        try:
            _start(self._run, f"wait-{self._threads}")
        except Unavailable:
            if not self._threads:
                raise
        else:
            self._threads += 1

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            owner, job = taken
            try:
                job()
            finally:
                self._done(owner)

    def _take(self) -> tuple[Hashable, Job] | None:
        """The next job, or None when this thread should end."""
        with self._cond:
            while not self._ready:
                self._idle += 1
                notified = not self._closed and self._cond.wait(_IDLE_S)
                self._idle -= 1
                if not notified and not self._ready:
                    self._threads -= 1
                    return None
            return self._ready.popleft()

    def _done(self, owner: Hashable) -> None:
        with self._cond:
            parked = self._parked.get(owner)
            if parked:
                self._ready.append((owner, parked.popleft()))  # this thread comes back for one job at least
                if not parked:
                    del self._parked[owner]
            elif self._running[owner] > 1:
                self._running[owner] -= 1
            else:
                del self._running[owner]


def _start(target: Callable[[], None], name: str) -> None:
    try:
        threading.Thread(target=target, name=name, daemon=True).start()
    except RuntimeError as error:  # out of threads or memory: that costs one call, not the session
        raise Unavailable(f"the daemon has no thread for this call: {error}") from error
