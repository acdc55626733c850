"""Work for a daemon that dies, or whose agents do: what is read is checked, what fails for want of it is not."""

from __future__ import annotations

import contextlib
import random
import threading

import numpy as np

from daemon_process import DaemonProcess
from derived import BLOCK_NBYTES, chain, contents, fetch, namespace, wrong
from kvstore.v1 import admin_pb2, types_pb2
from kvstore_client import STORED, Client, DeadlineExceeded, Keys, KVStoreError, LeaseExpired, Namespace
from polling import eventually

BLOCKS = 24
CALL_S = 20.0
# A small pool, so that blocks have to move; a kernel that has to be compiled is no matter of these tests.
SETTINGS = {"warm_bytes": "32MiB", "cold_bytes": "128MiB", "codec_kernels": "numpy", "staging_max_bytes": "4MiB"}


class Load:
    """A worker that puts, reads and deletes until it is stopped; it notes what it read that was wrong."""

    def __init__(self, address: str, seed: int) -> None:
        self._address = address
        self._dice = random.Random(seed)
        self._stop = threading.Event()
        self.failures: list[str] = []
        self.read_blocks = 0
        self._thread = threading.Thread(target=self._run, name="load")

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(KVStoreError):  # the daemon may be away
                self._work()

    def _work(self) -> None:
        with Client(self._address, staging_bytes=4 << 20) as client:
            space = namespace(client, "load")
            while not self._stop.is_set():
                keys = chain(space, BLOCKS, self._dice.randrange(1, 40))
                space.put(keys, contents(keys), timeout_s=CALL_S)
                self._read(space, chain(space, BLOCKS, self._dice.randrange(1, 40)))
                self._read(namespace(client, "kept"), chain(space, BLOCKS))
                if self._dice.random() < 0.1:
                    space.delete(chain(space, BLOCKS, self._dice.randrange(1, 40))[BLOCKS // 2])

    def _read(self, space: Namespace, keys: Keys) -> None:
        out = np.zeros((len(keys), BLOCK_NBYTES), np.uint8)
        with contextlib.suppress(LeaseExpired, DeadlineExceeded), space.acquire(keys, timeout_s=CALL_S) as lease:
            count = lease.read_into(out, timeout_s=CALL_S) if lease.blocks else 0
            self.read_blocks += count
            if bad := wrong(keys, out[:count]):
                self.failures.append(f"blocks {bad} of {count}")


class Evictor:
    """Drops warm copies over and over, so that reads come from cold."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon = daemon
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="evictor")

    def __enter__(self) -> Evictor:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            with contextlib.suppress(KVStoreError):
                evict(self._daemon)


def keep(daemon: DaemonProcess) -> Keys:
    """Store a prefix and have it saved, durably, before anything is killed."""
    with Client(daemon.address, staging_bytes=4 << 20) as client:
        space = namespace(client, "kept")
        keys = chain(space, BLOCKS)
        assert space.put(keys, contents(keys), timeout_s=CALL_S) == [STORED] * BLOCKS
    assert daemon.ask("Flush", admin_pb2.FlushRequest(timeout_ms=30_000)).unsaved == 0
    return keys


def evict(daemon: DaemonProcess) -> None:
    daemon.ask("Evict", admin_pb2.EvictRequest(tier=types_pb2.TIER_WARM, bytes=1 << 40))


def check_all_is_well(daemon: DaemonProcess, kept: Keys) -> None:
    """What was saved is there, new blocks go to cold and come back, and nothing is left half filled."""
    with Client(daemon.address, staging_bytes=4 << 20) as client:
        space = namespace(client, "kept")
        evict(daemon)
        assert fetch(space, kept) == (BLOCKS, [])
        keys = chain(space, BLOCKS, seed=99)
        assert space.put(keys, contents(keys), timeout_s=CALL_S) == [STORED] * BLOCKS
        assert daemon.ask("Flush", admin_pb2.FlushRequest(timeout_ms=30_000)).unsaved == 0
        evict(daemon)
        assert fetch(space, keys) == (BLOCKS, [])
    eventually(lambda: daemon.stats().counters["slots_filling"] == 0, "no slot to be left half filled")
    eventually(lambda: daemon.stats().leases == 0, "the leases to end")
    assert daemon.tier("cold").corrupt == 0
