"""Leases that end while somebody reads: an error, never foreign bytes. Defect 15 of peers."""

from __future__ import annotations

import numpy as np
import pytest

from daemon_fixtures import StartDaemon, StartWorker
from daemon_process import DaemonProcess
from derived import BLOCK_NBYTES, chain, contents, fetch, namespace
from kvstore.v1 import admin_pb2, types_pb2
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client import STORED, LeaseExpired, Namespace, NotFound
from polling import eventually
from raw_session import RawSession
from worker_process import WorkerFailed

BLOCKS = 64
NBYTES = 256 << 10
WAIT_S = 30.0


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    """Leases end after a second of silence; 32 MiB warm are about 120 blocks, and there is nothing below."""
    return start_daemon(lease_ttl_s=1, warm_bytes="32MiB", cold_bytes=0, staging_max_bytes="16MiB")


@pytest.fixture
def space(daemon: DaemonProcess) -> Namespace:
    return namespace(daemon.client(staging_bytes=16 << 20), "m", NBYTES)


def overwrite(daemon: DaemonProcess, space: Namespace, seed: int) -> None:
    """Give every slot another block, twice over."""
    daemon.ask("Evict", admin_pb2.EvictRequest(tier=types_pb2.TIER_WARM, bytes=1 << 40))
    for at in range(4):
        keys = chain(space, BLOCKS, seed=1000 + 4 * seed + at)
        assert space.put(keys, contents(keys, NBYTES), timeout_s=WAIT_S) == [STORED] * BLOCKS


@pytest.mark.parametrize("transport", ["auto", "grpc"])
def test_defect_15_a_lease_that_expired_is_an_error_and_never_foreign_bytes(
    daemon: DaemonProcess, space: Namespace, start_worker: StartWorker, transport: str
) -> None:
    """A worker is stopped while it reads; its lease ends, its slots are given to others; it goes on reading."""
    worker = start_worker(daemon, transport=transport, staging_bytes=16 << 20)
    for round_ in range(2):
        worker.ask("put", model="m", blocks=BLOCKS, seed=round_, block_nbytes=NBYTES)
        assert worker.ask("hold", model="m", blocks=BLOCKS, seed=round_, block_nbytes=NBYTES) == BLOCKS
        assert worker.ask("read_held_for_ever") == [BLOCKS, []]
        worker.pause()
        eventually(lambda: daemon.stats().leases == 0, "the lease to expire")
        overwrite(daemon, space, round_)
        worker.resume()
        with pytest.raises(WorkerFailed, match="LeaseExpired"):
            raise AssertionError(f"blocks that are not its own: {worker.take()}")
        worker.ask("release")


def test_defect_15_a_view_of_a_lease_that_expired_does_not_pass_its_check(
    daemon: DaemonProcess, space: Namespace, start_worker: StartWorker
) -> None:
    worker = start_worker(daemon, staging_bytes=16 << 20)
    worker.ask("put", model="m", blocks=BLOCKS, block_nbytes=NBYTES)
    worker.ask("hold", model="m", blocks=BLOCKS, block_nbytes=NBYTES)
    assert worker.ask("view_held") == BLOCKS
    assert worker.ask("check_views") == BLOCKS
    worker.pause()
    eventually(lambda: daemon.stats().leases == 0, "the lease to expire")
    overwrite(daemon, space, 0)
    worker.resume()
    with pytest.raises(WorkerFailed, match="LeaseExpired"):
        worker.ask("check_views")
    assert worker.ask("get", model="m", blocks=BLOCKS, seed=1003, block_nbytes=NBYTES) == [BLOCKS, []]


def test_an_idle_worker_keeps_its_lease(daemon: DaemonProcess, start_worker: StartWorker) -> None:
    """It renews by itself: three times the lease's time pass and nothing of it can be evicted."""
    worker = start_worker(daemon, staging_bytes=16 << 20)
    worker.ask("put", model="m", blocks=BLOCKS, block_nbytes=NBYTES)
    worker.ask("hold", model="m", blocks=BLOCKS, block_nbytes=NBYTES)

    def calls() -> int:
        return daemon.sessions()[0].calls

    wanted = calls() + 18  # six renewals in the time of a lease
    eventually(lambda: calls() >= wanted, "eighteen renewals")
    assert daemon.stats().leases == 1
    assert daemon.ask("Evict", admin_pb2.EvictRequest(tier=types_pb2.TIER_WARM, bytes=1 << 40)).blocks == 0
    assert worker.ask("read_held") == [BLOCKS, []]


def test_a_session_that_says_nothing_loses_its_lease_and_nothing_else(
    daemon: DaemonProcess, space: Namespace, transport: str
) -> None:
    keys = chain(space, 4)
    assert space.put(keys, contents(keys, NBYTES)) == [STORED] * 4
    with RawSession(daemon.address, transport) as raw:
        assert (raw.opened.lease_ttl_ms, raw.opened.renew_every_ms) == (1000, 167)
        group = pb.AcquireGroup(namespace=space.digest, keys=bytes(keys), mode=pb.ACQUIRE_MODE_PREFIX)
        lease = raw.call("Acquire", pb.AcquireRequest(groups=[group])).lease_id
        offered = raw.call("Acquire", pb.AcquireRequest(groups=[group])).lease_id
        token = raw.call("Handoff", pb.HandoffRequest(lease_id=offered)).token
        eventually(lambda: daemon.stats().leases == 0, "the leases to expire")
        with pytest.raises(LeaseExpired, match=f"lease {lease} has ended; acquire again"):
            raw.call("Wait", pb.WaitRequest(lease_id=lease, stop=4))
        with pytest.raises(LeaseExpired):
            raw.call("Handoff", pb.HandoffRequest(lease_id=lease))
        raw.call("Release", pb.ReleaseRequest(lease_id=lease))
        with pytest.raises(NotFound, match="ends with its lease"):
            raw.call("Adopt", pb.AdoptRequest(token=token))
        assert raw.call("Acquire", pb.AcquireRequest(groups=[group])).tokens == 4 * 16
    assert fetch(space, keys) == (4, [])


def test_cleared_and_deleted_blocks_stay_readable_under_their_lease(daemon: DaemonProcess, space: Namespace) -> None:
    keys = chain(space, BLOCKS)
    assert space.put(keys, contents(keys, NBYTES), timeout_s=WAIT_S) == [STORED] * BLOCKS
    lease = space.acquire(keys)
    space.clear()
    for seed in range(4):
        others = chain(space, 40, seed=50 + seed)
        space.put(others, contents(others, NBYTES), timeout_s=WAIT_S)
    out = np.zeros((BLOCKS, NBYTES), np.uint8)
    assert lease.read_into(out, verify=True) == BLOCKS
    assert (out == contents(keys, NBYTES)).all()
    lease.release()
    eventually(lambda: daemon.stats().leases == 0, "the lease to end")
    assert BLOCK_NBYTES != NBYTES
