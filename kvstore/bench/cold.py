"""The cold tier end to end: reads from the page cache and from the disk, spilling, small calls meanwhile, a restart."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import psutil

from kvstore.bench import worker
from kvstore.bench.daemon import SpawnedDaemon, spawned
from kvstore.bench.figures import Result, Value, latency_figures, transfer_result
from kvstore.bench.files import PlainFile, drop_from_page_cache
from kvstore.bench.memory import WorkingSet, kv_like_blocks
from kvstore.bench.neighbours import neighbours
from kvstore.bench.scale import MIB, Scale
from kvstore.bench.transfers import BIG_BLOCK
from kvstore.bench.worker import IncompleteTransfer
from kvstore.v1 import admin_pb2, types_pb2
from kvstore_client import Client, Keys, Namespace

_CALL_TIMEOUT_S = 60.0
_FLUSH_TIMEOUT_S = 120.0
_POOL_SHARE = 3  # warm pool of a daemon that is read from, in working sets
_BUSY_SPAN_S = 6.0
_BUSY_BLOCKS = 64
_RESTART_BLOCK_BYTES = 16 << 10
_RESTART_BATCH = 4096
_DISK_ROUNDS = 5


class Operator(Protocol):
    """An operator's connection, as kvctl has one."""

    def call(self, method: str, request: object, timeout_s: float | None = None) -> Any:  # noqa: ANN401 (by method)
        """One call of the Admin service."""

    def __enter__(self) -> Self:
        """Attached."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detach."""


Operators = Callable[[str], Operator]


@dataclass(frozen=True, slots=True)
class Cold:
    """Measurements of the cold tier, each on a daemon of its own."""

    scale: Scale
    operators: Operators

    def get(self, name: str, readers: int, kernels: str) -> Result:
        """acquire, read_into, release of blocks that only the cold tier has; its file is in the page cache.

        `cpu_bound` is the ratio that this machine's cores give at best, by the processor time that agent, daemon and
        worker take together: other work on the machine does not count in it.
        """
        with self._daemon(reader_threads=readers, codec_kernels=kernels) as daemon, Client(daemon.address) as client:
            stored = self._store(client, daemon)
            memcpy_s, taken_s, bounds = [], [], []
            for _ in range(self.scale.rounds):
                self._evict(client, daemon)
                copying_s = time.thread_time()
                memcpy_s.append(stored.blocks.memcpy_seconds())
                copying_s, before_s = time.thread_time() - copying_s, _cpu_seconds(daemon.pid)
                taken_s.append(stored.read(client))
                bounds.append(copying_s * len(os.sched_getaffinity(0)) / (_cpu_seconds(daemon.pid) - before_s))
            stored.blocks.check()
            base = transfer_result(name, memcpy_s, taken_s, stored.blocks.nbytes)
            bound = round(statistics.median(bounds), 4)
            return Result(name, {**base.figures, "cpu_bound": bound, "agent_mb": _agent_anonymous_mb(daemon.pid)})

    def get_from_disk(self, name: str, *, in_order: bool) -> Result:
        """The same with the file dropped from the page cache, against pread of the raw bytes from a plain file."""
        ratios, rates = [], []
        with tempfile.TemporaryDirectory(prefix="kvbench-") as folder:
            with self._daemon(Path(folder)) as daemon, Client(daemon.address) as client:
                stored = self._store(client, daemon, in_order=in_order)
                plain = PlainFile(Path(folder) / "plain", stored.blocks.source)
            for _ in range(_DISK_ROUNDS):
                # Pages that a process maps are not dropped, so the daemon must be down.
                drop_from_page_cache(Path(folder))
                plain_s = plain.read_seconds(stored.order)
                with self._daemon(Path(folder)) as daemon, Client(daemon.address) as client:
                    stored.open(client)
                    worker.wait_populated(client)
                    taken_s = stored.read(client)
                ratios.append(plain_s / taken_s)
                rates.append(stored.blocks.nbytes / taken_s / 1e9)
        stored.check()
        figures = {"ratio_pread": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        return Result(name, _rounded(figures) | {"gb_s": round(statistics.median(rates), 3), "rounds": len(ratios)})

    def spill(self, name: str) -> Result:
        """Saving what is in warm until it is durable, against a write and fsync of as many bytes as were stored."""
        ratios = []
        with self._daemon() as daemon, Client(daemon.address) as client:
            stored = self._store(client, daemon, flush=False)
            for turn in range(self.scale.rounds):
                stored.put_again(client, turn + 1)
                before = worker.tier(client, "cold", "stored_bytes")
                started = time.perf_counter()
                self._flush(daemon)
                taken_s = time.perf_counter() - started
                nbytes = worker.tier(client, "cold", "stored_bytes") - before
                plain_s = PlainFile.write_seconds(daemon.folder / "plain", stored.blocks.source, nbytes)
                ratios.append(plain_s / taken_s)
                stored.clear(client)
        figures = {"ratio_fsync": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        return Result(name, _rounded(figures) | {"stored_mb": round(nbytes / 1e6, 1), "seconds": round(taken_s, 3)})

    def calls_beside(self, name: str) -> Result:
        """A match of one key while another process keeps the cold tier reading and writing."""
        pool = max(4 * _BUSY_BLOCKS * BIG_BLOCK, 128 * MIB)
        with spawned(pool, 8 * pool) as daemon, Client(daemon.address) as client:
            space = worker.namespace(client, _RESTART_BLOCK_BYTES, "calls")
            keys = space.keys(worker.tokens(8))
            space.put(keys, kv_like_blocks(8, _RESTART_BLOCK_BYTES), timeout_s=_CALL_TIMEOUT_S)
            before = worker.tier(client, "cold", "hits"), worker.tier(client, "cold", "writes")
            taken_s = []
            with neighbours("spill", daemon.address, _BUSY_BLOCKS):
                ends = time.monotonic() + (_BUSY_SPAN_S if self.scale.is_full else 1.0)
                while time.monotonic() < ends:
                    started = time.perf_counter()
                    space.match(keys[:1], timeout_s=_CALL_TIMEOUT_S)
                    taken_s.append(time.perf_counter() - started)
                    time.sleep(0.001)
            loads = worker.tier(client, "cold", "hits") - before[0]
            saves = worker.tier(client, "cold", "writes") - before[1]
        return Result(name, {**latency_figures(taken_s), "blocks_loaded": loads, "blocks_saved": saves})

    def restart(self, name: str) -> Result:
        """From the start of the process to the first block served, with many small blocks in the cold tier."""
        blocks = self.scale.cold_blocks
        pool = max(2 * _RESTART_BATCH * _RESTART_BLOCK_BYTES, 128 * MIB)
        cold = 3 * blocks * _RESTART_BLOCK_BYTES + 64 * MIB
        with tempfile.TemporaryDirectory(prefix="kvbench-") as folder:
            with spawned(pool, cold, Path(folder)) as daemon, Client(daemon.address) as client:
                space = worker.namespace(client, _RESTART_BLOCK_BYTES, "restart")
                keys = space.keys(worker.tokens(blocks))
                self._fill(client, daemon, space, keys)
            taken_s = []
            for _ in range(3):
                started = time.perf_counter()
                with spawned(pool, cold, Path(folder)) as daemon, Client(daemon.address) as client:
                    space = worker.namespace(client, _RESTART_BLOCK_BYTES, "restart")
                    with space.acquire(keys[:1], timeout_s=_CALL_TIMEOUT_S) as lease:
                        lease.read_into(kv_like_blocks(1, _RESTART_BLOCK_BYTES), timeout_s=_CALL_TIMEOUT_S)
                    taken_s.append(time.perf_counter() - started)
                    parts = (keys[at : at + _RESTART_BATCH] for at in range(0, blocks, _RESTART_BATCH))
                    found = sum(space.match(part, timeout_s=_CALL_TIMEOUT_S).blocks for part in parts)
                if found != blocks:
                    raise IncompleteTransfer(f"{found} of {blocks} blocks after the restart")
        return Result(name, {"seconds": round(statistics.median(taken_s), 3), "blocks": blocks})

    def jobs(self) -> dict[str, Callable[[str], Result]]:
        """What measures each result, by its name."""
        return {
            "cold_get_2_numba": partial(self.get, readers=2, kernels="numba"),
            "cold_get_2_numpy": partial(self.get, readers=2, kernels="numpy"),
            "cold_get_1_numba": partial(self.get, readers=1, kernels="numba"),
            "cold_get_1_numpy": partial(self.get, readers=1, kernels="numpy"),
            "cold_disk_sequential": partial(self.get_from_disk, in_order=True),
            "cold_disk_random": partial(self.get_from_disk, in_order=False),
            "cold_spill": self.spill,
            "cold_call_us": self.calls_beside,
            "cold_restart_s": self.restart,
        }

    # -- parts ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _daemon(self, folder: Path | None = None, **settings: object) -> Iterator[SpawnedDaemon]:
        pool = _POOL_SHARE * self.scale.working_set_bytes
        with spawned(pool, 4 * pool, folder, **settings) as daemon:
            yield daemon

    def _store(self, client: Client, daemon: SpawnedDaemon, *, in_order: bool = True, flush: bool = True) -> _Stored:
        worker_blocks = max(1, self.scale.working_set_bytes // BIG_BLOCK)
        stored = _Stored(client, WorkingSet(worker_blocks, BIG_BLOCK), in_order)
        worker.wait_populated(client)
        if flush:
            stored.put(client)
            self._flush(daemon)
        return stored

    def _fill(self, client: Client, daemon: SpawnedDaemon, space: Namespace, keys: Keys) -> None:
        """Put a long prefix piece by piece, each saved before the next, so that none is dropped unsaved."""
        for start in range(0, len(keys), _RESTART_BATCH):
            part = keys[start : start + _RESTART_BATCH]
            worker.put_all(space, part, kv_like_blocks(len(part), _RESTART_BLOCK_BYTES), _CALL_TIMEOUT_S)
            self._flush(daemon)

    def _flush(self, daemon: SpawnedDaemon) -> None:
        with self.operators(daemon.address) as operator:
            request = admin_pb2.FlushRequest(timeout_ms=round(_FLUSH_TIMEOUT_S * 1000))
            reply = operator.call("Flush", request, _FLUSH_TIMEOUT_S)
        if reply.unsaved:
            raise IncompleteTransfer(f"{reply.unsaved} blocks could not be saved")

    def _evict(self, client: Client, daemon: SpawnedDaemon) -> None:
        """Empty warm; a lease that has just been released may still be on its way to the daemon."""
        request = admin_pb2.EvictRequest(tier=types_pb2.TIER_WARM, bytes=1 << 40)

        def is_empty() -> bool:
            operator.call("Evict", request, _CALL_TIMEOUT_S)
            return worker.tier(client, "warm", "blocks") == 0

        with self.operators(daemon.address) as operator:
            worker.wait_until(is_empty, "warm to be empty")


class _Stored:
    """A working set and its keys: one prefix, or blocks that hang together in no way."""

    def __init__(self, client: Client, blocks: WorkingSet, in_order: bool) -> None:
        self.blocks = blocks
        self._in_order = in_order
        count = len(blocks.source)
        self.order: Sequence[int] = range(count) if in_order else np.random.default_rng(3).permutation(count).tolist()
        self._keys = self._space(client).keys(worker.tokens(count))

    def open(self, client: Client) -> None:
        """Have the daemon make slabs for it."""
        self._space(client)

    def put(self, client: Client) -> None:
        """Store the working set."""
        worker.put_all(self._space(client), self._keys, self.blocks.source, _CALL_TIMEOUT_S)

    def put_again(self, client: Client, seed: int) -> None:
        """Store it under other keys."""
        space = self._space(client)
        worker.put_all(space, space.keys(worker.tokens(len(self.order), seed)), self.blocks.source, _CALL_TIMEOUT_S)

    def clear(self, client: Client) -> None:
        """Leave nothing behind."""
        worker.clear_and_wait(client, self._space(client))

    def read(self, client: Client) -> float:
        """Seconds to read all of it, in order."""
        space, keys = self._space(client), self._keys
        if not self._in_order:
            keys = Keys.from_bytes(b"".join(self._keys[index] for index in self.order))
        started = time.perf_counter()
        with space.acquire(keys, timeout_s=_CALL_TIMEOUT_S) as lease:
            if lease.blocks != len(keys):
                raise IncompleteTransfer(f"{lease.blocks} of {len(keys)} blocks are stored")
            lease.read_into(self.blocks.out, timeout_s=_CALL_TIMEOUT_S)
        return time.perf_counter() - started

    def check(self) -> None:
        """Every byte of the last read."""
        wrong = [i for at, i in enumerate(self.order) if (self.blocks.out[at] != self.blocks.source[i]).any()]
        if wrong:
            raise ArithmeticError(f"blocks {wrong[:8]} came back wrong")

    def _space(self, client: Client) -> Namespace:
        if self._in_order:
            return worker.namespace(client, BIG_BLOCK, "cold-chain")
        return worker.namespace(client, BIG_BLOCK, "cold-set", "set")


def _cpu_seconds(daemon_pid: int) -> float:
    """Processor time of this process, the daemon and its agent so far."""
    pids = (os.getpid(), daemon_pid, *(child.pid for child in psutil.Process(daemon_pid).children()))
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)  # clock_getcpuclockid(3), which Python does not have


def _agent_anonymous_mb(daemon_pid: int) -> float:
    """Anonymous resident memory of the daemon's agent, in MB."""
    children = psutil.Process(daemon_pid).children()
    if len(children) != 1:
        raise OSError(f"the daemon has {len(children)} agents; this needs one")
    status = Path(f"/proc/{children[0].pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return round(int(fields["RssAnon"].split()[0]) * 1024 / 1e6, 1)


def _rounded(figures: dict[str, float]) -> dict[str, Value]:
    return {name: round(value, 4) for name, value in figures.items()}
