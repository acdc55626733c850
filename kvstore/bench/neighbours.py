"""Starts worker processes that keep a daemon busy while something else is measured, and ends them."""

from __future__ import annotations

import contextlib
import selectors
import subprocess
import sys
from collections.abc import Iterator

_START_TIMEOUT_S = 60.0


class NeighbourFailed(RuntimeError):
    """A process that should keep the daemon busy did not."""


@contextlib.contextmanager
def neighbours(job: str, address: str, count: int, processes: int = 1) -> Iterator[None]:
    """Processes that do `job` of kvstore.bench.neighbour without a pause until the block ends.

    Raises:
        NeighbourFailed: one did not start, or had ended before the block did.
    """
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(_neighbour(job, address, count, seed)) for seed in range(processes)]
        for process in running:
            _wait_for_line(process)
        yield
        ended = [process.args for process in running if process.poll() is not None]
        if ended:
            raise NeighbourFailed(f"ended before the measurement did: {ended}")


@contextlib.contextmanager
def _neighbour(job: str, address: str, count: int, seed: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "kvstore.bench.neighbour", job, address, str(count), str(seed)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def _wait_for_line(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(_START_TIMEOUT_S) or not process.stdout.readline():
            raise NeighbourFailed("a busy neighbour did not start")
