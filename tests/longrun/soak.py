"""Soak: workers come, work, leave and die for a long while, and nothing grows.

    python tests/longrun/soak.py --minutes 30

Samples descriptors, threads, anonymous memory, memfd bytes and LMDB readers of the daemon and its agents. What grows
with time has a slope: Theil and Sen's, the median of the slopes between all pairs of samples, over the last two thirds
of the run (before that tiers and tables fill). It must be no more than the noise of the samples themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from harness import Storm, check_nothing_is_held, daemon_for_a_while

from daemon_process import DaemonProcess
from derived import chain, namespace
from kvstore_client import Client, KVStoreError

SAMPLES = 120
_MIB = 1 << 20
_CONNECTS_PER_S = 8.0
_DEATH_EVERY_S = 5.0

# What a figure may have grown by at the end and still be noise: allocators keep, and load comes and goes.
FLOORS = {"descriptors": 8, "threads": 4, "anonymous": 8 * _MIB, "memfd": 8 * _MIB, "lmdb readers": 4}


class Trend(NamedTuple):
    """How a figure moved over a run."""

    name: str
    first: float
    last: float
    growth: float  # slope times duration
    noise: float

    @property
    def is_flat(self) -> bool:
        """Whether it has not grown by more than its noise."""
        return self.growth <= self.noise


def trend(name: str, floor: float, samples: list[tuple[float, float]]) -> Trend:
    """Of (seconds, value) pairs, at least three."""
    samples = samples[len(samples) // 3 :]
    slope = statistics.median((y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in combinations(samples, 2))
    values = [y for _, y in samples]
    middle = statistics.median(values)
    noise = 3 * statistics.median(abs(y - middle) for y in values)
    return Trend(name, values[0], values[-1], slope * (samples[-1][0] - samples[0][0]), max(floor, noise))


class Sampler:
    """Reads what a daemon and its agents hold."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon = daemon
        self._began_s = time.monotonic()
        self.figures: dict[str, list[tuple[float, float]]] = {}

    def take(self) -> None:
        """One sample of everything."""
        at_s = time.monotonic() - self._began_s
        for process in (psutil.Process(self._daemon.pid), *self._daemon.agents()):
            who = "daemon" if process.pid == self._daemon.pid else "agents"
            self._add(f"{who} descriptors", at_s, process.num_fds())
            self._add(f"{who} threads", at_s, process.num_threads())
            self._add(f"{who} anonymous", at_s, _anonymous_bytes(process.pid))
        self._add("daemon memfd", at_s, sum(_memfd_bytes(self._daemon.pid)))
        self._add("agents lmdb readers", at_s, _readers(self._daemon.state_dir))

    def _add(self, name: str, at_s: float, value: float) -> None:
        series = self.figures.setdefault(name, [])
        if series and series[-1][0] == at_s:  # the agents together
            series[-1] = (at_s, series[-1][1] + value)
        else:
            series.append((at_s, value))

    def trends(self) -> list[Trend]:
        """How all of them moved."""
        return [trend(name, FLOORS[name.split(" ", 1)[1]], series) for name, series in self.figures.items()]


def _anonymous_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon:")).split()[1])


def _memfd_bytes(pid: int) -> Iterator[int]:
    """Pages that back the memfds a process has open, each once."""
    seen = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if str(entry.readlink()).startswith("/memfd:"):
                found = entry.stat()
                if found.st_ino not in seen:
                    seen.add(found.st_ino)
                    yield 512 * found.st_blocks


def _readers(state_dir: Path) -> int:
    """Slots of LMDB's reader tables that are taken: 64 bytes each behind the header, the process's number first.

    Read from the lock files, as mdb_stat does: to open an environment here would take a slot itself.
    """
    count = 0
    for path in state_dir.rglob("lock.mdb"):
        table = path.read_bytes()[128:]
        count += sum(any(table[at + 8 : at + 12]) for at in range(0, len(table) - 63, 64))
    return count


class Visitors:
    """Clients that attach, ask something and leave, one after the other."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._stop = threading.Event()
        self.connects = 0
        self._thread = threading.Thread(target=self._run, name="visitors")
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(1 / _CONNECTS_PER_S):
            with contextlib.suppress(KVStoreError), Client(self._address, staging_bytes=0) as client:
                space = namespace(client, "visited")
                space.match(chain(space, 4), timeout_s=5.0)
                self.connects += 1

    def end(self) -> None:
        """No more of them."""
        self._stop.set()
        self._thread.join()


def run(minutes: float, workers: int, seed: int) -> tuple[list[Trend], Storm, int, int]:
    """A whole run; the trends, the storm with its counts, connects and deaths."""
    dice = random.Random(seed)
    with daemon_for_a_while(lease_ttl_s=10) as daemon:
        sampler, storm, visitors, deaths = Sampler(daemon), Storm(daemon, workers, dice), Visitors(daemon.address), 0
        try:
            began_s = time.monotonic()
            next_death_s = began_s + _DEATH_EVERY_S
            while (now_s := time.monotonic()) < began_s + 60 * minutes:
                time.sleep(60 * minutes / SAMPLES)
                storm.collect()
                assert not storm.wrong, storm.wrong
                if now_s >= next_death_s:
                    storm.replace(dice.randrange(workers))
                    deaths, next_death_s = deaths + 1, now_s + _DEATH_EVERY_S
                sampler.take()
        finally:
            visitors.end()
            storm.end()
        assert not storm.wrong, storm.wrong
        assert not storm.counts["hung"], f"{storm.counts['hung']} workers hung"
        check_nothing_is_held(daemon)
        daemon.check_log()
        return sampler.trends(), storm, visitors.connects, deaths


def main() -> int:
    """For `make soak`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)  # noqa: T201
    trends, storm, connects, deaths = run(given.minutes, given.workers, given.seed)
    print(  # noqa: T201
        f"{storm.operations} operations, {storm.counts['blocks read']} blocks read and compared, "
        f"{len(storm.wrong)} wrong, {connects} connects, {deaths} workers killed"
    )
    for found in trends:
        verdict = "flat" if found.is_flat else "GROWS"
        print(  # noqa: T201
            f"{found.name:22} {found.first:14,.0f} -> {found.last:14,.0f}   "
            f"growth {found.growth:12,.0f}   noise {found.noise:12,.0f}   {verdict}"
        )
    return 0 if all(found.is_flat for found in trends) else 1


if __name__ == "__main__":
    sys.exit(main())
