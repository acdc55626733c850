"""Bytes in and out, as ratios to memcpy of the same bytes in the same round: get_*, put_256, put_spill."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

from kvstore.bench import worker
from kvstore.bench.figures import Result, Value, transfer_result
from kvstore.bench.memory import WorkingSet
from kvstore.bench.scale import Scale
from kvstore.bench.worker import IncompleteTransfer
from kvstore_client import STORED, Client, Keys

BIG_BLOCK = 2 << 20
SMALL_BLOCK = 256 << 10
_CALL_TIMEOUT_S = 30.0  # a benchmark measures how long it takes; it does not give up at a worker's deadline


class Transfers:
    """Transfers of one session with one block size. `memcpy_s` collects every memcpy round."""

    def __init__(self, client: Client, block_nbytes: int, scale: Scale) -> None:
        self._client = client
        self._scale = scale
        self._blocks = max(1, scale.working_set_bytes // block_nbytes)
        self._set = WorkingSet(self._blocks, block_nbytes)
        self._space = worker.namespace(client, block_nbytes, f"block-{block_nbytes}")
        self._keys = self._space.keys(worker.tokens(self._blocks))
        self._used_before = worker.tier(client, "warm", "used_bytes")
        self.memcpy_s: list[float] = []

    @property
    def nbytes(self) -> int:
        """Bytes of one round."""
        return self._set.nbytes

    def store(self) -> None:
        """Put the working set, so that it can be read; not measured."""
        worker.wait_populated(self._client)
        self._put(self._keys)

    def clear(self) -> None:
        """Leave nothing behind."""
        worker.clear_and_wait(self._client, self._space, self._used_before)

    def get(self, name: str, batch: int) -> Result:
        """acquire, read_into, release, `batch` blocks at a time, into memory touched before."""
        batch = min(batch, self._blocks)
        spans = [(start, min(start + batch, self._blocks)) for start in range(0, self._blocks, batch)]
        batches = [(self._keys[start:stop], self._set.out[start:stop]) for start, stop in spans]

        def read_all() -> None:
            for keys, out in batches:
                with self._space.acquire(keys, timeout_s=_CALL_TIMEOUT_S) as lease:
                    if lease.blocks != len(keys):
                        raise IncompleteTransfer(f"{name}: {lease.blocks} of {len(keys)} blocks are stored")
                    lease.read_into(out)

        self._set.out[:] = 0
        read_all()  # maps the slabs; and every byte of it is checked
        self._set.check()
        memcpy_s, taken_s = self._rounds(read_all)
        return transfer_result(name, memcpy_s, taken_s, self.nbytes)

    def put(self, name: str) -> Result:
        """Into an empty pool, until the last block is published."""
        put_all = partial(self._put, self._keys)
        put_all()  # makes the staging segment and the slabs
        self.clear()
        memcpy_s, taken_s = self._rounds(put_all, after=self.clear)
        return transfer_result(name, memcpy_s, taken_s, self.nbytes)

    def put_spill(self, name: str) -> Result:
        """Into a full pool whose blocks have to make room, against an empty pool, in turn."""
        seeds = itertools.count(1)
        memcpy_s, empty_s, full_s = [], [], []
        before = self._spill_counters()
        for _ in range(self._scale.rounds):
            self.clear()
            memcpy_s.append(self._memcpy())
            empty_s.append(_seconds(partial(self._put, self._keys)))
            for keys in self._prefixes(seeds):
                self._space.put(keys, self._set.source, timeout_s=_CALL_TIMEOUT_S)  # the last may find no room: full
                if self._is_full():
                    break
            keys = next(self._prefixes(seeds))
            full_s.append(_seconds(partial(self._put, keys)))
        base = transfer_result(name, memcpy_s, full_s, self.nbytes)
        against_empty = statistics.median(empty / full for empty, full in zip(empty_s, full_s, strict=True))
        after = self._spill_counters()
        figures: dict[str, Value] = {**base.figures, "ratio_empty": round(against_empty, 4)}
        figures |= {key: after[key] - before[key] for key in before}
        return Result(name, figures)

    def _rounds(
        self, measured: Callable[[], None], after: Callable[[], None] = lambda: None
    ) -> tuple[list[float], list[float]]:
        memcpy_s, taken_s = [], []
        for _ in range(self._scale.rounds):
            memcpy_s.append(self._memcpy())
            taken_s.append(_seconds(measured))
            after()
        return memcpy_s, taken_s

    def _memcpy(self) -> float:
        taken_s = self._set.memcpy_seconds()
        self.memcpy_s.append(taken_s)
        return taken_s

    def _put(self, keys: Keys) -> None:
        outcomes = self._space.put(keys, self._set.source, timeout_s=_CALL_TIMEOUT_S)
        wrong = [outcome for outcome in outcomes if outcome != STORED]
        if wrong:
            raise IncompleteTransfer(f"{len(wrong)} of {len(outcomes)} blocks were not stored: {wrong[0]!r}")

    def _prefixes(self, seeds: Iterator[int]) -> Iterator[Keys]:
        return (self._space.keys(worker.tokens(self._blocks, seed)) for seed in seeds)

    def _is_full(self) -> bool:
        warm = self._client.stats()["tiers"]["warm"]
        return bool(warm["used_bytes"] + self.nbytes > warm["capacity_bytes"])

    def _spill_counters(self) -> dict[str, int]:
        stats = self._client.stats()
        return {"spilled_blocks": stats["tiers"]["cold"]["writes"], "dropped_unsaved": stats["dropped_unsaved"]}


def _seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
