"""Blocks on their way between the tiers: spilled, evicted, loaded, promoted; every byte is the key's own."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from daemon_fixtures import StartDaemon
from daemon_process import DaemonProcess
from derived import chain, contents, fetch, namespace, wrong
from kvstore.v1 import admin_pb2, types_pb2
from kvstore_client import STORED, Client, Keys, Namespace
from polling import eventually

NBYTES = 256 << 10
BLOCKS = 32
WAIT_S = 30.0
EVERYTHING = 1 << 40


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    """64 MiB warm: about 250 of these blocks."""
    return start_daemon(warm_bytes="64MiB", cold_bytes="512MiB")


@pytest.fixture
def client(daemon: DaemonProcess, transport: str) -> Iterator[Client]:
    with Client(daemon.address, transport=transport, staging_bytes=16 << 20) as made:  # type: ignore[arg-type]
        yield made


def store(space: Namespace, keys: Keys) -> Keys:
    assert space.put(keys, contents(keys, space.block_nbytes), timeout_s=WAIT_S) == [STORED] * len(keys)
    return keys


def flush(daemon: DaemonProcess) -> None:
    """Everything is in the cold tier, durably."""
    answer = daemon.ask("Flush", admin_pb2.FlushRequest(timeout_ms=30_000))
    assert answer.unsaved == 0


def evict(daemon: DaemonProcess, tier: int = types_pb2.TIER_WARM) -> int:
    """Drop all that may go from a tier; how many blocks went."""
    blocks: int = daemon.ask("Evict", admin_pb2.EvictRequest(tier=tier, bytes=EVERYTHING)).blocks
    return blocks


def test_what_warm_cannot_hold_comes_back_from_cold(daemon: DaemonProcess, client: Client) -> None:
    """Twice what warm holds, saved before the next comes: nothing at all may be lost."""
    space = namespace(client, "spill", NBYTES)
    prefixes = [chain(space, BLOCKS, seed) for seed in range(16)]
    for keys in prefixes:
        store(space, keys)
        flush(daemon)
    assert daemon.stats().dropped_unsaved == 0
    assert daemon.tier("warm").evictions > 0
    for keys in prefixes:
        assert fetch(space, keys) == (BLOCKS, [])
    cold = daemon.tier("cold")
    assert cold.hits > 0
    assert cold.blocks == 16 * BLOCKS
    assert cold.stored_bytes < cold.raw_bytes == 16 * BLOCKS * NBYTES, "the exponents compress"
    assert daemon.tier("cold").corrupt == 0


def test_what_outruns_the_disk_is_dropped_and_counted(daemon: DaemonProcess, client: Client) -> None:
    """Puts never wait for the SSD. What had to be dropped is a miss, and said in the counters; nothing else is lost."""
    space = namespace(client, "burst", NBYTES)
    prefixes = [chain(space, BLOCKS, seed) for seed in range(24)]
    for keys in prefixes:
        store(space, keys)
    found = 0
    for keys in prefixes:
        count, bad = fetch(space, keys)
        assert not bad
        found += count
    assert found >= len(prefixes) * BLOCKS - daemon.stats().dropped_unsaved
    assert daemon.tier("warm").evictions > 0


def test_a_cold_prefix_is_loaded_while_it_is_read(daemon: DaemonProcess, client: Client) -> None:
    space = namespace(client, "load", NBYTES)
    keys = store(space, chain(space, BLOCKS))
    flush(daemon)
    assert evict(daemon) == BLOCKS
    assert space.match(keys).by_tier == {"hot": 0, "warm": 0, "cold": BLOCKS}
    assert space.exists(keys) == [True] * BLOCKS
    out = np.zeros((BLOCKS, NBYTES), np.uint8)
    with space.acquire(keys) as lease:
        assert lease.blocks == BLOCKS
        assert lease.wait(4, timeout_s=WAIT_S) >= 4
        assert lease.read_into(out, verify=True, timeout_s=WAIT_S) == BLOCKS
        assert lease.ready == BLOCKS
    assert not wrong(keys, out)
    assert space.match(keys).by_tier == {"hot": 0, "warm": BLOCKS, "cold": 0}
    assert daemon.tier("cold").hits == BLOCKS


def test_a_prefetched_prefix_is_there_when_it_is_acquired(daemon: DaemonProcess, client: Client) -> None:
    space = namespace(client, "prefetch", NBYTES)
    keys = store(space, chain(space, BLOCKS))
    flush(daemon)
    evict(daemon)
    assert space.prefetch(keys) == BLOCKS
    eventually(lambda: space.match(keys).by_tier["warm"] == BLOCKS, "the blocks to be loaded")
    assert space.prefetch(keys) == 0
    with space.acquire(keys) as lease:
        assert lease.ready == BLOCKS
        out = np.zeros((BLOCKS, NBYTES), np.uint8)
        assert lease.read_into(out) == BLOCKS
    assert not wrong(keys, out)
    assert daemon.stats().counters["slots_filling"] == 0


def test_many_waiters_share_one_load(daemon: DaemonProcess, client: Client) -> None:
    space = namespace(client, "waiters", NBYTES)
    keys = store(space, chain(space, BLOCKS))
    flush(daemon)
    evict(daemon)
    leases = [space.acquire(keys) for _ in range(5)]
    for lease in leases:
        assert lease.wait(timeout_s=WAIT_S) == BLOCKS
        out = np.zeros((BLOCKS, NBYTES), np.uint8)
        lease.read_into(out, verify=True)
        assert not wrong(keys, out)
        lease.release()
    assert daemon.tier("cold").hits == BLOCKS, "each block was read once"


def test_a_prefix_larger_than_warm_streams_through_it(daemon: DaemonProcess, client: Client) -> None:
    """The promise is cut to what was reserved, and the rest follows in a second lease."""
    space = namespace(client, "stream", NBYTES)
    keys = chain(space, 400)
    for first in range(0, 400, 40):
        store(space, keys[first : first + 40])
        flush(daemon)
        evict(daemon)
    assert space.match(keys).blocks == 400
    done = 0
    while done < 400:
        with space.acquire(keys[done:], timeout_s=WAIT_S) as lease:
            assert 0 < lease.blocks <= 256
            step = min(lease.blocks, 64)
            out = np.zeros((step, NBYTES), np.uint8)
            assert lease.read_into(out, 0, step, timeout_s=WAIT_S) == step
            lease.release_to(step)
        assert not wrong(keys[done : done + step], out)
        done += step
    eventually(lambda: daemon.stats().leases == 0, "the leases to end")


def test_pinned_blocks_stay_whatever_comes(daemon: DaemonProcess, client: Client) -> None:
    space = namespace(client, "pinned", NBYTES)
    keys = store(space, chain(space, BLOCKS))
    with space.acquire(keys) as lease:
        flush(daemon)
        for seed in range(1, 20):
            others = chain(space, BLOCKS, seed)
            space.put(others, contents(others, NBYTES), timeout_s=WAIT_S)
        evict(daemon)
        out = np.zeros((BLOCKS, NBYTES), np.uint8)
        assert lease.read_into(out, verify=True) == BLOCKS
        assert not wrong(keys, out)
        lease.check()


def test_a_parent_never_leaves_before_its_children(daemon: DaemonProcess, client: Client) -> None:
    """Whatever is evicted, from warm and then from cold, what is left is a prefix without a hole."""
    space = namespace(client, "leaf-first", NBYTES)
    keys = store(space, chain(space, BLOCKS))
    flush(daemon)
    evict(daemon)
    for left in range(BLOCKS - 1, 20, -1):
        assert daemon.ask("Evict", admin_pb2.EvictRequest(tier=types_pb2.TIER_COLD, bytes=1)).blocks == 1
        assert space.exists(keys) == [True] * left + [False] * (BLOCKS - left)
        assert space.match(keys).blocks == left
    assert fetch(space, keys) == (space.match(keys).blocks, [])


def test_reading_cold_blocks_does_not_push_out_what_was_never_saved(daemon: DaemonProcess) -> None:
    """Regression: what reads brought into warm counted as room, so the saver slept while older blocks were lost."""
    client = daemon.client(staging_bytes=16 << 20)
    space = namespace(client, "read-burst", NBYTES, kind="set")  # no chains: what was put first leaves first
    saved = [store(space, chain(space, BLOCKS, seed)) for seed in range(6)]
    flush(daemon)
    evict(daemon)
    fresh = [store(space, chain(space, BLOCKS, seed)) for seed in range(10, 16)]
    for keys in saved:
        assert fetch(space, keys) == (BLOCKS, [])
        eventually(lambda: saver_is_idle(daemon), "the saver to catch up")
    assert daemon.stats().dropped_unsaved == 0
    for keys in fresh:
        assert fetch(space, keys) == (BLOCKS, [])


def saver_is_idle(daemon: DaemonProcess) -> bool:
    """Whether nothing was saved for a moment."""
    before = daemon.tier("cold").writes
    time.sleep(0.1)
    return daemon.tier("cold").writes == before


@pytest.fixture
def hot(start_daemon: StartDaemon) -> DaemonProcess:
    """A daemon with the host-memory stand-in."""
    return start_daemon(warm_bytes="64MiB", cold_bytes="256MiB", hot_device="cpu", hot_bytes="16MiB")


def test_blocks_are_promoted_to_hot_and_read_from_there(hot: DaemonProcess, transport: str) -> None:
    with Client(hot.address, transport=transport, staging_bytes=16 << 20) as client:  # type: ignore[arg-type]
        space = namespace(client, "hot", NBYTES)
        keys = store(space, chain(space, BLOCKS))
        for _ in range(3):
            assert fetch(space, keys) == (BLOCKS, [])
        eventually(lambda: hot.tier("hot").blocks == BLOCKS, "every block to be in hot")
        assert space.match(keys).by_tier == {"hot": BLOCKS, "warm": 0, "cold": 0}
        evict(hot)
        assert hot.tier("warm").blocks == 0
        assert fetch(space, keys) == (BLOCKS, [])
        assert hot.tier("hot").hits == BLOCKS
        assert hot.tier("cold").hits == 0
        assert hot.tier("hot").device == "cpu"


def test_hot_holds_no_more_than_it_may(hot: DaemonProcess) -> None:
    """16 MiB are 64 blocks: what comes later takes the place of what was used less."""
    client = hot.client(staging_bytes=16 << 20)
    space = namespace(client, "hot-room", NBYTES)
    for seed in range(4):
        keys = store(space, chain(space, BLOCKS, seed))
        flush(hot)
        for _ in range(3):
            assert fetch(space, keys) == (BLOCKS, [])
        expected = min(seed + 1, 2) * BLOCKS
        eventually(lambda wanted=expected: hot.tier("hot").blocks >= wanted - 1, "the blocks to be promoted")  # type: ignore[misc]
        assert hot.tier("hot").used_bytes <= 16 << 20
    eventually(lambda: hot.tier("hot").evictions > 0, "hot to evict")
    evict(hot)
    for seed in range(4):
        assert fetch(space, chain(space, BLOCKS, seed)) == (BLOCKS, [])
