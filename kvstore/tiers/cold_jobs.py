"""What the cold tier's writer is asked to do, and how it answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.tiers.base import Outcome, StoredRecord, WriteResult


class Put(NamedTuple):
    """Store a frame and its record, in place of what is there. `buffer` is what the frame lies in."""

    entry: bytes
    frame: NDArray[np.uint8]
    record: StoredRecord
    buffer: NDArray[np.uint8]


class Drop(NamedTuple):
    """Forget an entry; if `record` is not empty, only while this very record is stored."""

    entry: bytes
    record: bytes = b""


class Settle(NamedTuple):
    """Forget an entry that has a payload and no record, or a record and no payload."""

    entry: bytes


class Locate(NamedTuple):
    """Note in a record at which page its payload lies."""

    entry: bytes
    page: int


class Run(NamedTuple):
    """Call a function on the writer's thread, between two transactions."""

    function: Callable[[], None]


Command = Put | Drop | Settle | Locate | Run
_SMALL_BLOCKS = 8  # times as many small blocks: 64 of 16 KiB write a fifth less to the device than 8 at a time
_BUSY = WriteResult(Outcome.BUSY)


class CommitLimits(NamedTuple):
    """What makes a transaction of puts full: `blocks` that have `least_bytes` of frames, or `most_bytes`."""

    blocks: int
    least_bytes: int
    most_bytes: int

    def are_reached(self, blocks: int, nbytes: int) -> bool:
        """Whether so many blocks with so many bytes of frames fill a transaction."""
        enough = blocks >= self.blocks and nbytes >= self.least_bytes
        return enough or blocks >= _SMALL_BLOCKS * self.blocks or nbytes >= self.most_bytes


class Job:
    """Commands of one kind on their way; wait() gives a result for each."""

    def __init__(self, commands: Sequence[Command], release: Callable[[Sequence[Command]], None]) -> None:
        """`release` is told the commands once, when nobody needs what they hold any more."""
        self.commands = commands
        self.turned_away = False
        self._release = release
        self._done = threading.Event()
        self._results = [_BUSY] * len(commands)

    @property
    def stores(self) -> bool:
        """Whether it is a job of puts."""
        return isinstance(self.commands[0], Put)

    @property
    def frame_bytes(self) -> int:
        """Bytes of all frames."""
        return sum(command.frame.nbytes for command in self.commands if isinstance(command, Put))

    def finish(self, results: Sequence[WriteResult] | None = None) -> None:
        """Let the waiter go; without results it is told BUSY."""
        self.turned_away = results is None
        self._results = self._results if results is None else list(results)
        commands, self.commands = self.commands, ()  # a caller may hold many jobs
        self._release(commands)
        self._done.set()

    def is_done(self, timeout_s: float) -> bool:
        """Whether it is done by then."""
        return self._done.wait(timeout_s)

    def wait(self, timeout_s: float) -> list[WriteResult]:
        """Results in order; all BUSY if they did not come in time (the commands may still be carried out)."""
        if not self._done.wait(timeout_s):
            return [_BUSY] * len(self._results)
        return self._results
