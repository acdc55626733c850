"""One pool, block sizes that come and go: memory moves between size classes and never turns to stone."""

from __future__ import annotations

import pytest

from daemon_fixtures import StartDaemon
from daemon_process import DaemonProcess
from derived import chain, contents, fetch, namespace
from kvstore_client import Namespace

MIB = 1 << 20
WAIT_S = 30.0
POOL_BYTES = 128 * MIB
# size of a block, blocks of one chain, chains: about 100 MiB of each size
PHASES = {16 << 10: (256, 25), 2 * MIB: (10, 5), 33 * MIB: (1, 3)}


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    return start_daemon(warm_bytes=POOL_BYTES, cold_bytes=0, staging_max_bytes="40MiB")


def fill(space: Namespace, round_: int) -> int:
    """Store about 100 MiB; the blocks that were stored, each of which was read back right after."""
    blocks, chains = PHASES[space.block_nbytes]
    stored = 0
    for number in range(chains):
        keys = chain(space, blocks, seed=100 * round_ + number)
        outcomes = space.put(keys, contents(keys, space.block_nbytes), timeout_s=WAIT_S)
        kept = sum(outcome.is_stored for outcome in outcomes)
        assert [outcome.is_stored for outcome in outcomes] == [True] * kept + [False] * (blocks - kept)
        assert fetch(space, keys) == (kept, [])
        stored += kept
    return stored


def test_a_workload_that_changes_its_block_size_gets_the_memory(daemon: DaemonProcess) -> None:
    client = daemon.client(staging_bytes=40 * MIB)
    spaces = [namespace(client, f"of-{size}", size) for size in PHASES]
    for round_, space in enumerate((*spaces, *reversed(spaces))):
        blocks, chains = PHASES[space.block_nbytes]
        stored = fill(space, round_)
        assert stored >= blocks * chains // 2, f"{stored} of {blocks * chains} of {space.block_nbytes} bytes"
    warm = daemon.tier("warm")
    assert warm.used_bytes <= warm.capacity_bytes == POOL_BYTES
    assert warm.populated_bytes <= POOL_BYTES


def test_two_sizes_at_once_share_the_pool(daemon: DaemonProcess) -> None:
    client = daemon.client(staging_bytes=40 * MIB)
    small, large = (namespace(client, f"both-{size}", size) for size in (16 << 10, 2 * MIB))
    for round_ in range(3):
        assert fill(small, 50 + round_) > 0
        assert fill(large, 50 + round_) > 0


def test_leased_blocks_keep_their_slab_from_another_size(daemon: DaemonProcess) -> None:
    client = daemon.client(staging_bytes=40 * MIB)
    small, large = (namespace(client, f"leased-{size}", size) for size in (16 << 10, 33 * MIB))
    keys = chain(small, 64)
    assert all(outcome.is_stored for outcome in small.put(keys, contents(keys, 16 << 10), timeout_s=WAIT_S))
    with small.acquire(keys) as lease:
        fill(large, 1)
        for at, key in enumerate(keys):
            assert (lease.view(at) == contents([key], 16 << 10)[0]).all()
        lease.check()
    assert fetch(small, keys)[1] == []
