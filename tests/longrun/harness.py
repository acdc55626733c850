"""What chaos and soak share: a daemon, its storm of workers, and a count of everything."""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from daemon_process import DaemonProcess
from kvstore.v1 import admin_pb2
from polling import eventually
from storm import StormWorker

SETTINGS = {
    "warm_bytes": "48MiB",
    "cold_bytes": "128MiB",
    "hot_bytes": "8MiB",
    "hot_device": "cpu",
    "staging_max_bytes": "4MiB",
    "lease_ttl_s": 2,
    "codec_kernels": "numpy",  # what has to be compiled first is no matter of these runs
}


class Storm:
    """Workers that come and go."""

    def __init__(self, daemon: DaemonProcess, workers: int, dice: random.Random) -> None:
        self.daemon = daemon
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._dice = dice
        self.workers = [self._made() for _ in range(workers)]

    def _made(self) -> StormWorker:
        transport = self._dice.choice(["auto", "auto", "grpc"])
        return StormWorker(self.daemon.address, self._dice.randrange(1 << 31), transport=transport)

    def collect(self) -> None:
        """Take what the workers have reported."""
        for worker in self.workers:
            worker.collect()
            self._take(worker)

    def _take(self, worker: StormWorker) -> None:
        self.counts += worker.counts
        self.wrong += worker.wrong
        worker.counts, worker.wrong = Counter(), []

    def replace(self, at: int) -> None:
        """SIGKILL a worker; another one takes its place."""
        self.workers[at].kill()
        self._take(self.workers[at])
        self.workers[at] = self._made()

    def end(self) -> None:
        """Have all of them end in order."""
        for worker in self.workers:
            worker.end()
            self._take(worker)

    @property
    def operations(self) -> int:
        """Calls that were answered."""
        return sum(
            count for what, count in self.counts.items() if what.isidentifier() and what not in ("miss", "expired")
        )


@contextlib.contextmanager
def daemon_for_a_while(**settings: object) -> Iterator[DaemonProcess]:
    """A daemon in a folder that is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="kv-"))
    daemon = DaemonProcess(folder, **{**SETTINGS, **settings})
    try:
        daemon.start()
        yield daemon
        daemon.close()
    finally:
        daemon.abandon()
        shutil.rmtree(folder, ignore_errors=True)


def check_nothing_is_held(daemon: DaemonProcess) -> None:
    """All workers have gone: nothing of theirs may be left, and every copy that is left is good."""
    eventually(lambda: not daemon.sessions(), "the sessions to end")
    eventually(lambda: daemon.stats().leases == 0, "the leases to end")
    eventually(lambda: daemon.stats().counters["slots_filling"] == 0, "no slot to be left half filled")
    found = daemon.stats()
    assert (found.staging_bytes, found.quarantined_bytes) == (0, 0)
    for tier in (1, 2, 3):
        after, pages = b"", 0
        while pages == 0 or after:
            page = daemon.ask("Verify", admin_pb2.VerifyRequest(tier=tier, after=after))  # type: ignore[arg-type]
            assert (page.corrupt, page.missing) == (0, 0), f"tier {tier}: {page}"
            after, pages = page.last, pages + 1
    assert sum(tier.corrupt for tier in daemon.stats().tiers) == 0
