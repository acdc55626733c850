"""Fixtures around the real daemon, for the conftest.py of the folders that need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from daemon_process import DaemonProcess
from worker_process import WorkerProcess

StartDaemon = Callable[..., DaemonProcess]
StartWorker = Callable[..., WorkerProcess]

TRANSPORTS = ("auto", "grpc")


@pytest.fixture(scope="module")
def served() -> Iterator[DaemonProcess]:
    """A daemon that all tests of a module share: each takes a model's name of its own. 128 MiB warm, no hot tier."""
    with Daemons() as daemons:
        yield daemons.start(warm_bytes="128MiB")


@pytest.fixture
def start_daemon() -> Iterator[StartDaemon]:
    """Starts daemons of the test's own, by keys of the configuration file."""
    with Daemons() as daemons:
        yield daemons.start


@pytest.fixture
def start_worker() -> Iterator[StartWorker]:
    """Starts workers, each in a process of its own."""
    workers: list[WorkerProcess] = []

    def start(daemon: DaemonProcess, **options: Any) -> WorkerProcess:
        workers.append(WorkerProcess(daemon.address, **options))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """Every test that takes it runs over the local RPC and over gRPC."""
    return str(request.param)


class Daemons:
    """Daemons that end with a test."""

    def __init__(self) -> None:
        self._made: list[tuple[TemporaryDirectory[str], DaemonProcess]] = []

    def start(self, **settings: Any) -> DaemonProcess:
        folder = TemporaryDirectory(prefix="kv-")  # pytest's own folders are too long for a socket's path
        daemon = DaemonProcess(Path(folder.name), **settings)
        self._made.append((folder, daemon))
        return daemon.start()

    def __enter__(self) -> Daemons:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            for _, daemon in self._made:
                daemon.close()
        finally:
            for folder, daemon in self._made:
                daemon.abandon()
                folder.cleanup()
