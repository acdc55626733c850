"""The way between the tiers and a worker's device: reads, puts, pages, layers, and what is left behind.

Every transfer stands beside a plain copy of as many bytes between pinned host memory and the device, in the same
rounds. With `--device cpu` the device is host memory: that shows that all of it runs, and says nothing of a GPU.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kvstore.bench import worker
from kvstore.bench.cold import Operators
from kvstore.bench.daemon import SpawnedDaemon, spawned
from kvstore.bench.figures import Result, Value, latency_figures
from kvstore.bench.memory import kv_like_blocks
from kvstore.bench.scale import MIB, Scale
from kvstore.bench.transfers import BIG_BLOCK
from kvstore.bench.worker import BLOCK_TOKENS, IncompleteTransfer
from kvstore.protocol.errors import InvalidRequest
from kvstore.v1 import admin_pb2, types_pb2
from kvstore_client import Client, Keys, KVLayout, Namespace, PagedCache, TensorSpec
from kvstore_client.device import device as client_device

_TIMEOUT_S = 60.0
_SET_BYTES_MAX = 256 * MIB
_LAYERS, _HEADS, _DIM = 32, 8, 128  # a block of 16 tokens in bfloat16 is 2 MiB


@dataclass(frozen=True, slots=True)
class Gpu:
    """Measurements with a worker's memory on `device` ("cuda:N" or "cpu"), each on a daemon of its own."""

    scale: Scale
    operators: Operators
    device: str

    def jobs(self) -> dict[str, Callable[[str], Result]]:
        """What measures each result, by its name."""
        return {
            "gpu_hot_to_worker": self.hot_to_worker,
            "gpu_warm_to_worker": self.warm_to_worker,
            "gpu_worker_to_staging": self.worker_to_staging,
            "gpu_scatter": self.scatter,
            "gpu_one_block_us": self.one_block,
            "gpu_overlap": self.overlap,
            "gpu_memory_held": self.memory_held,
        }

    def warm_to_worker(self, name: str) -> Result:
        """acquire, read_into and release of blocks in warm, into one tensor."""
        with self._rig() as rig:
            rig.settle()
            return rig.transfer(name, rig.read, rig.copy_in, self.scale.rounds)

    def hot_to_worker(self, name: str) -> Result:
        """The same of blocks that only hot has: to warm by its agent, and on to the worker."""
        with self._rig() as rig:
            rig.settle()

            def ready() -> None:
                self._evict_warm(rig)
                found = rig.space.match(rig.keys).by_tier
                if found["hot"] != len(rig.keys):
                    raise IncompleteTransfer(f"hot has {found['hot']} of {len(rig.keys)} blocks")

            worker.wait_until(rig.use_until_hot, "every block to be in hot")
            return rig.transfer(name, rig.read, rig.copy_in, self.scale.rounds, ready)

    def worker_to_staging(self, name: str) -> Result:
        """A put of fresh blocks from a tensor, until the daemon has answered."""
        with self._rig(sets=self.scale.rounds + 2) as rig:
            rig.settle()
            return rig.transfer(name, rig.put_fresh, rig.copy_out, self.scale.rounds)

    def scatter(self, name: str) -> Result:
        """Blocks on the device into the pages of a cache there, against a copy of as many bytes on the device."""
        with self._rig() as rig:
            pages = rig.paged_cache()
            ids = rig.torch.randperm(pages.pages)[: len(rig.keys)].tolist()
            rig.read()
            result = rig.transfer(name, lambda: pages.scatter(rig.rows, ids), rig.copy_on_device, self.scale.rounds)
            rig.rows.zero_()
            pages.gather(ids, rig.rows)
            rig.check()
            return result

    def one_block(self, name: str) -> Result:
        """acquire, read_into and release of one block in warm."""
        with self._rig() as rig:
            rig.settle()
            one, taken_s = rig.keys[:1], []
            for _ in range(min(self.scale.calls, 1000)):
                started = time.perf_counter()
                with rig.space.acquire(one, timeout_s=_TIMEOUT_S) as lease:
                    lease.read_into(rig.rows[:1])
                taken_s.append(time.perf_counter() - started)
        return Result(name, latency_figures(taken_s))

    def overlap(self, name: str) -> Result:
        """How much of the shorter one of copying and computing hides behind the other, layer by layer.

        1: all of it; 0: none; -1: together they take far longer than one after the other.
        """
        with self._rig() as rig:
            rig.settle()
            copy_s = statistics.median(rig.timed(rig.read) for _ in range(self.scale.rounds))
            work = rig.work_of(copy_s / _LAYERS)
            work_s, both_s = [], []
            for _ in range(self.scale.rounds):
                work_s.append(rig.timed(lambda: [work() for _ in range(_LAYERS)]))
                both_s.append(rig.timed(lambda: rig.layers(work)))
            layers_s = statistics.median(rig.timed(lambda: rig.layers(None)) for _ in range(self.scale.rounds))
            rig.check()
        work_median_s, both_median_s = statistics.median(work_s), statistics.median(both_s)
        hidden_s = layers_s + work_median_s - both_median_s
        figures: dict[str, Value] = {
            "overlap": round(max(-1.0, min(1.0, hidden_s / min(layers_s, work_median_s))), 3),
            "copy_s": round(copy_s, 5),
            "layers_s": round(layers_s, 5),
            "work_s": round(work_median_s, 5),
            "both_s": round(both_median_s, 5),
            "layers": _LAYERS,
        }
        return Result(name, figures)

    def memory_held(self, name: str) -> Result:
        """What is not free again on the device, and still pinned here, once client and daemon have gone."""
        before = self._free_bytes()
        with self._rig() as rig:
            rig.settle()
            rig.read()
            during = self._free_bytes()
            pinned_during = self._pinned_bytes()
        del rig  # its tensors are the worker's own
        if self._is_cuda:
            worker.wait_until(lambda: not self._pinned_bytes(), "the worker's slabs to be let go")
        figures: dict[str, Value] = {
            "held_bytes": max(0, before - self._free_bytes()),
            "used_bytes": max(0, before - during),
            "pinned_bytes": pinned_during,
            "pinned_after_bytes": self._pinned_bytes(),
        }
        return Result(name, figures)

    # -- parts ------------------------------------------------------------------------------------------------

    @property
    def _is_cuda(self) -> bool:
        return self.device != "cpu"

    def _torch(self) -> Any:  # noqa: ANN401 - a module
        import torch  # noqa: PLC0415 - seconds, and a worker has it anyway

        if self._is_cuda and not torch.cuda.is_available():
            raise InvalidRequest(f"there is no {self.device} here; --device cpu shows whether it all runs")
        return torch

    @contextlib.contextmanager
    def _rig(self, sets: int = 1) -> Iterator[_Rig]:
        """A daemon and a worker with one prefix stored; room in warm for `sets` of them."""
        torch = self._torch()
        nbytes = min(self.scale.working_set_bytes, _SET_BYTES_MAX)
        settings: dict[str, Any] = {"hot_device": self.device, "hot_bytes": 2 * nbytes, "promote_hits": 1}
        with (
            spawned((sets + 2) * nbytes + 64 * MIB, 0, **settings) as daemon,
            Client(daemon.address, name="bench") as client,
        ):
            yield _Rig(torch, self.device, client, daemon, nbytes // BIG_BLOCK)

    def _evict_warm(self, rig: _Rig) -> None:
        request = admin_pb2.EvictRequest(tier=types_pb2.TIER_WARM, bytes=1 << 40)

        def is_empty() -> bool:
            operator.call("Evict", request, _TIMEOUT_S)
            return worker.tier(rig.client, "warm", "blocks") == 0

        with self.operators(rig.daemon.address) as operator:
            worker.wait_until(is_empty, "warm to be empty")

    def _free_bytes(self) -> int:
        torch = self._torch()
        if not self._is_cuda:
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def _pinned_bytes(self) -> int:
        return client_device(int(self.device.removeprefix("cuda:"))).pins.pinned_bytes() if self._is_cuda else 0


class _Rig:
    """One worker, its memory on the device, and a prefix that the daemon has in warm."""

    def __init__(self, torch: Any, device: str, client: Client, daemon: SpawnedDaemon, blocks: int) -> None:  # noqa: ANN401
        self.torch = torch
        self.client = client
        self.daemon = daemon
        self.layout = KVLayout(
            [TensorSpec("kv", "bfloat16", (2, _LAYERS, BLOCK_TOKENS, _HEADS, _DIM), "kv layer token head dim")]
        )
        self.space: Namespace = client.namespace(
            model="bench/gpu", revision="1", block_tokens=BLOCK_TOKENS, layout=self.layout
        )
        self.keys: Keys = self.space.keys(worker.tokens(blocks))
        self._seed = 0
        self._cuda = device != "cpu"
        self.host = torch.from_numpy(kv_like_blocks(blocks, self.layout.nbytes))
        if self._cuda:
            self.host = self.host.pin_memory()
        self.rows = self.host.to(device, copy=True)
        self._other = self.rows.clone()
        self._back = self.host.clone().pin_memory() if self._cuda else self.host.clone()
        worker.wait_populated(client)
        worker.put_all(self.space, self.keys, self.host.numpy(), _TIMEOUT_S)

    @property
    def nbytes(self) -> int:
        """Bytes of one transfer."""
        return int(self.rows.numel())

    def settle(self) -> None:
        """Read and put once, and wait until the driver has what it pins."""
        self.rows.zero_()
        self.read()
        self.check()
        if self._cuda:
            pins = client_device(self.rows.device.index or 0).pins
            worker.wait_steady(pins.pinned_bytes, "the slabs to be pinned", steady_s=0.3)

    def read(self) -> None:
        """The whole prefix into the device."""
        with self.space.acquire(self.keys, timeout_s=_TIMEOUT_S) as lease:
            if lease.blocks != len(self.keys) or lease.read_into(self.rows, timeout_s=_TIMEOUT_S) != lease.blocks:
                raise IncompleteTransfer(f"{lease.blocks} of {len(self.keys)} blocks")

    def layers(self, work: Callable[[], object] | None) -> None:
        """The whole prefix layer by layer, with some work after each."""
        with self.space.acquire(self.keys, timeout_s=_TIMEOUT_S) as lease:
            for _ in lease.read_layers(self.rows, timeout_s=_TIMEOUT_S):
                if work is not None:
                    work()

    def put_fresh(self) -> None:
        """The tensor under keys that the daemon does not have."""
        self._seed += 1
        keys = self.space.keys(worker.tokens(len(self.keys), self._seed))
        worker.put_all(self.space, keys, self.rows, _TIMEOUT_S)

    def use_until_hot(self) -> bool:
        """Use the prefix; whether every block has come to hot."""
        self.read()
        return self.space.match(self.keys).by_tier["hot"] == len(self.keys)

    def copy_in(self) -> None:
        """As many bytes from pinned host memory to the device, in one plain copy."""
        self._other.copy_(self.host, non_blocking=True)

    def copy_out(self) -> None:
        """The other way."""
        self._back.copy_(self.rows, non_blocking=True)

    def copy_on_device(self) -> None:
        """As many bytes on the device."""
        self._other.copy_(self.rows)

    def paged_cache(self) -> PagedCache:
        """A cache with twice as many pages as blocks, in vLLM's layout for flash attention."""
        shape = (2, 2 * len(self.keys), BLOCK_TOKENS, _HEADS, _DIM)
        tensors = [self.torch.zeros(shape, dtype=self.torch.bfloat16, device=self.rows.device) for _ in range(_LAYERS)]
        return PagedCache(tensors, "kv block token head dim", self.layout)

    def work_of(self, seconds: float) -> Callable[[], object]:
        """Something to compute on the device that takes about so long."""
        size = 512 if self._cuda else 32
        left = self.torch.randn(size, size, device=self.rows.device)
        once_s = statistics.median(self.timed(lambda: left @ left) for _ in range(5))
        times = max(1, round(seconds / once_s))

        def work() -> None:
            for _ in range(times):
                left @ left
            if self._cuda:  # not the whole device: the next layer is being copied
                self.torch.cuda.current_stream().synchronize()

        return work

    def sync(self) -> None:
        """Wait for the device."""
        if self._cuda:
            self.torch.cuda.synchronize()

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds of a call until the device is done."""
        self.sync()
        started = time.perf_counter()
        call()
        self.sync()
        return time.perf_counter() - started

    def transfer(
        self,
        name: str,
        call: Callable[[], object],
        plain: Callable[[], object],
        rounds: int,
        ready: Callable[[], object] = lambda: None,
    ) -> Result:
        """A transfer beside a plain copy, in the same rounds; every byte is compared afterwards."""
        plain_s, taken_s = [], []
        for turn in range(rounds + 1):
            ready()
            pair = self.timed(plain), self.timed(call)
            if turn:  # the first one warms up
                plain_s.append(pair[0])
                taken_s.append(pair[1])
        self.check()
        ratios = [base / taken for base, taken in zip(plain_s, taken_s, strict=True)]
        figures: dict[str, Value] = {
            "ratio_copy": round(statistics.median(ratios), 4),
            "ratio_min": round(min(ratios), 4),
            "ratio_max": round(max(ratios), 4),
            "gb_s": round(self.nbytes / statistics.median(taken_s) / 1e9, 3),
            "copy_gb_s": round(self.nbytes / statistics.median(plain_s) / 1e9, 3),
            "bytes": self.nbytes,
            "rounds": rounds,
            "device": str(self.rows.device),
        }
        return Result(name, figures)

    def check(self) -> None:
        """Every byte on the device.

        Raises:
            ArithmeticError: one is wrong.
        """
        if not self.torch.equal(self.rows.cpu(), self.host.cpu()):
            raise ArithmeticError("bytes on the device are not those that were stored")
