"""Runs the chosen measurements, each group on a daemon that suits it, and makes the report."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from kvstore.bench import footprint, remote, worker
from kvstore.bench.calls import Calls
from kvstore.bench.cold_codec import NoSample
from kvstore.bench.daemon import DaemonFailed, SpawnedDaemon, spawned
from kvstore.bench.figures import Result, chosen
from kvstore.bench.neighbours import NeighbourFailed
from kvstore.bench.scale import Scale
from kvstore.bench.transfers import BIG_BLOCK, SMALL_BLOCK, Transfers
from kvstore.bench.worker import IncompleteTransfer
from kvstore.machine import Machine
from kvstore.protocol.errors import KVStoreError
from kvstore_client import Client

_COLD_FACTOR = 4  # cold tier of a spawned daemon, in warm pools
_SPILL_POOL_MIN = 128 << 20  # blocks on their way to disk cannot make room: a pool must hold many times as many
_NEEDS_OWN_DAEMON = {"put_spill", "idle", "remote_get"}  # they fill a pool to the brim, or want nobody else there
_PACKAGES = ("kvtier", "grpcio", "protobuf", "numpy", "lmdb", "zstandard", "xxhash", "torch", "cuda-bindings")
_BATCHES = {"256": 256, "64": 64, "8": 8, "1": 1}

FAILURES = (
    KVStoreError,
    DaemonFailed,
    NeighbourFailed,
    IncompleteTransfer,
    worker.NotSettled,
    NoSample,
    remote.NoOpenssl,
    ArithmeticError,
    OSError,
    subprocess.SubprocessError,
)

Progress = Callable[[str], None]


class Bench:
    """One run.

    Attributes:
        results: what has been measured so far.
        failures: why each of the other results could not be, by name.
    """

    def __init__(
        self,
        names: Sequence[str],
        scale: Scale,
        progress: Progress,
        address: str | None = None,
        cold: Mapping[str, Callable[[str], Result]] | None = None,
    ) -> None:
        """Measure `names` (of suites or results; none: all but cold) on daemons of its own, or on the one at `address`.

        Raises:
            ValueError: there is no such suite, or it needs a daemon of its own.
        """
        self._wanted = chosen(names)
        self._scale = scale
        self._progress = progress
        self._address = address
        self._cold = cold or {}
        self._memcpy: list[tuple[int, list[float]]] = []
        self._own_daemon: SpawnedDaemon | None = None
        self.results: list[Result] = []
        self.failures: dict[str, str] = {}
        own_only = {name for name in self._wanted if name in _NEEDS_OWN_DAEMON or name.startswith(("cold_", "gpu_"))}
        if address and names and own_only:
            raise ValueError(f"{', '.join(sorted(own_only))}: needs a daemon of its own; give --spawn")
        if address:
            self._wanted = [name for name in self._wanted if name not in own_only]

    def run(self) -> dict[str, object]:
        """Measure everything; returns the report as JSON can hold it. What fails leaves the rest alone."""
        shared = self._names("get_", "put_256", "call_", "match_", "keys_")
        self._attempt(shared, self._on_shared_daemon)
        self._attempt(self._names("put_spill"), self._spill)
        self._attempt(self._names("remote_get"), self._remote)
        self._attempt(self._names("idle"), self._idle)
        for name, measure in (("import_ratio", footprint.import_ratio), ("kvctl_help_s", footprint.kvctl_help)):
            self._attempt(self._names(name), partial(self._measure, name, partial(measure, scale=self._scale)))
        for name, job in self._cold.items():
            self._attempt(self._names(name), partial(self._measure, name, job))
        return self.report()

    def report(self) -> dict[str, object]:
        """The results so far with what they were measured on."""
        memcpy = [nbytes / seconds / 1e9 for nbytes, taken in self._memcpy for seconds in taken]
        return {
            "memcpy_gb_s": round(statistics.median(memcpy), 3) if memcpy else None,
            "results": [result.document() for result in self.results],
            "failures": self.failures,
            "environment": environment(self._scale),
        }

    def _attempt(self, names: Sequence[str], measure: Callable[[], None]) -> None:
        """Measure; where that ends early, what `names` still lack has failed for the same reason."""
        if not names:
            return
        try:
            measure()
        except FAILURES as error:
            if isinstance(error, KVStoreError) and self._own_daemon is not None:
                with contextlib.suppress(OSError):  # its folder may be gone already
                    self._progress(f"the daemon's log ends:\n{self._own_daemon.log_tail()}")
            done = {result.name for result in self.results}
            missing = [name for name in names if name not in done and name not in self.failures]
            self.failures |= dict.fromkeys(missing, f"{type(error).__name__}: {error}")
            self._progress(f"failed: {error}")

    def _spill(self) -> None:
        pool = max(2 * self._scale.working_set_bytes, _SPILL_POOL_MIN)
        with self._daemon(pool) as address, _client(address) as client:
            transfers = self._transfers(client, BIG_BLOCK)
            self._attempt(["put_spill"], partial(self._measure, "put_spill", transfers.put_spill))

    def _remote(self) -> None:
        with TemporaryDirectory(prefix="kvbench-") as folder:
            self._measure("remote_get", lambda name: remote.get(name, self._scale, Path(folder)))

    def _idle(self) -> None:
        with spawned(self._scale.warm_bytes, self._scale.warm_bytes) as daemon:
            with _client(daemon.address) as client:
                worker.wait_populated(client)
            self._measure("idle", lambda name: footprint.idle(name, daemon.pid, self._scale))

    def _on_shared_daemon(self) -> None:
        with self._daemon(self._scale.warm_bytes) as address, _client(address) as client:
            for prefix, block_nbytes in (("get_", BIG_BLOCK), ("get_256k_", SMALL_BLOCK)):
                names = [prefix + batch for batch in _BATCHES if prefix + batch in self._wanted]
                self._attempt(names, partial(self._gets, client, block_nbytes, names))
            self._attempt(self._names("put_256"), partial(self._put, client))
            self._attempt(self._names("call_", "match_", "keys_"), partial(self._calls, address, client))

    def _put(self, client: Client) -> None:
        self._measure("put_256", self._transfers(client, BIG_BLOCK).put)

    def _gets(self, client: Client, block_nbytes: int, names: list[str]) -> None:
        transfers = self._transfers(client, block_nbytes)
        transfers.store()
        for name in names:
            batch = _BATCHES[name.rpartition("_")[2]]
            self._measure(name, partial(transfers.get, batch=batch))
        transfers.clear()

    def _calls(self, address: str, client: Client) -> None:
        calls = Calls(address, self._scale)
        space, keys = calls.store(client)
        self._measure("call_local_us", lambda name: calls.one_key(name, space, keys))
        self._measure("match_8192_us", lambda name: calls.many_keys(name, space, keys))
        self._measure("keys_131072_ms", lambda name: calls.hashing(name, space))
        self._measure("call_busy_p99_us", lambda name: calls.beside_neighbours(name, space, keys))
        if "call_grpc_us" in self._wanted:
            with _client(address, transport="grpc") as remote:
                same = worker.namespace(remote, space.block_nbytes, "calls")
                self._measure("call_grpc_us", lambda name: calls.one_key(name, same, keys))
        calls.clear(client)

    def _transfers(self, client: Client, block_nbytes: int) -> Transfers:
        self._progress(
            f"working set of {self._scale.working_set_bytes >> 20} MiB in blocks of {block_nbytes >> 10} KiB"
        )
        transfers = Transfers(client, block_nbytes, self._scale)
        self._memcpy.append((transfers.nbytes, transfers.memcpy_s))
        return transfers

    def _measure(self, name: str, measure: Callable[[str], Result]) -> None:
        if name in self._wanted:
            self._progress(name)
            self.results.append(measure(name))

    def _names(self, *prefixes: str) -> list[str]:
        return [name for name in self._wanted if name.startswith(prefixes)]

    @contextlib.contextmanager
    def _daemon(self, warm_bytes: int) -> Iterator[str]:
        if self._address:
            yield self._address
            return
        self._progress(f"starting a daemon with {warm_bytes >> 20} MiB of warm memory")
        with spawned(warm_bytes, _COLD_FACTOR * warm_bytes) as daemon:
            self._own_daemon = daemon
            yield daemon.address


def environment(scale: Scale) -> dict[str, Any]:
    """What the figures were measured on, so that two reports can be compared."""
    machine = Machine()
    return {
        "cpu": machine.cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": machine.memory_bytes(),
        "available_bytes": machine.available_bytes(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "working_set_bytes": scale.working_set_bytes,
        "rounds": scale.rounds,
        "full_scale": scale.is_full,
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _client(address: str, transport: Literal["local", "grpc"] = "local") -> Client:
    return Client(address, transport=transport, name="bench")
