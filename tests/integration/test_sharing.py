"""Worker processes that share blocks, leases and a daemon."""

from __future__ import annotations

import os

import pytest

from daemon_fixtures import StartDaemon, StartWorker
from daemon_process import DaemonProcess
from polling import eventually
from worker_process import WorkerFailed

BLOCKS = 24
OTHER_UID = 54321


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


def test_one_worker_stores_and_others_read(
    served: DaemonProcess, start_worker: StartWorker, transport: str, model: str
) -> None:
    writer = start_worker(served, transport=transport, staging_bytes=8 << 20)
    readers = [start_worker(served, transport=transport, staging_bytes=0) for _ in range(2)]
    assert set(writer.ask("put", model=model, blocks=BLOCKS)) == {"STORED"}
    for reader in readers:
        assert reader.ask("get", model=model, blocks=BLOCKS) == [BLOCKS, []]
    writer.kill()
    for reader in readers:
        assert reader.ask("get", model=model, blocks=BLOCKS) == [BLOCKS, []], "its blocks outlive a worker"


def test_a_lease_goes_from_process_to_process(
    served: DaemonProcess, start_worker: StartWorker, transport: str, model: str
) -> None:
    scheduler, worker, late = (start_worker(served, transport=transport, staging_bytes=4 << 20) for _ in range(3))
    scheduler.ask("put", model=model, blocks=BLOCKS)
    scheduler.ask("hold", model=model, blocks=BLOCKS)
    token = scheduler.ask("handoff")
    assert worker.ask("adopt", token=token, model=model, blocks=BLOCKS) == [BLOCKS, []]
    with pytest.raises(WorkerFailed, match="NotFound"):
        late.ask("adopt", token=token, model=model, blocks=BLOCKS)
    scheduler.kill()
    eventually(lambda: len(served.sessions()) == 2, "the scheduler's session to end")
    assert worker.ask("read_held") == [BLOCKS, []], "the lease is the worker's now"
    assert {session.pid: session.pinned_blocks for session in served.sessions()} == {worker.pid: BLOCKS, late.pid: 0}
    worker.ask("release")
    eventually(lambda: served.stats().leases == 0, "the lease to end")


def test_a_lease_in_handoff_survives_the_scheduler(
    served: DaemonProcess, start_worker: StartWorker, model: str
) -> None:
    scheduler, worker = start_worker(served, staging_bytes=4 << 20), start_worker(served, staging_bytes=0)
    scheduler.ask("put", model=model, blocks=BLOCKS)
    scheduler.ask("hold", model=model, blocks=BLOCKS)
    token = scheduler.ask("handoff")
    scheduler.kill()
    eventually(lambda: len(served.sessions()) == 1, "the scheduler's session to end")
    assert worker.ask("adopt", token=token, model=model, blocks=BLOCKS) == [BLOCKS, []]


def test_two_that_store_the_same_both_succeed(served: DaemonProcess, start_worker: StartWorker, model: str) -> None:
    workers = [start_worker(served, staging_bytes=8 << 20) for _ in range(3)]
    for worker in workers:
        worker.tell("put", model=model, blocks=3 * BLOCKS)
    outcomes = [worker.take() for worker in workers]
    for seen in zip(*outcomes, strict=True):
        assert sorted(seen) == ["EXISTS", "EXISTS", "STORED"]
    assert workers[0].ask("get", model=model, blocks=3 * BLOCKS) == [3 * BLOCKS, []]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a worker as another user")
def test_tenants_never_meet(start_daemon: StartDaemon, start_worker: StartWorker) -> None:
    """Two users, the same model and tokens: neither finds, adopts or deletes anything of the other's."""
    daemon = start_daemon(
        socket_mode="0666", tenants={"here": {"uids": [os.geteuid()]}, "there": {"uids": [OTHER_UID]}}
    )
    daemon.folder.chmod(0o711)
    here = start_worker(daemon, staging_bytes=4 << 20)
    there = start_worker(daemon, uid=OTHER_UID, staging_bytes=4 << 20)
    here.ask("put", model="m", blocks=BLOCKS)
    here.ask("hold", model="m", blocks=BLOCKS)
    token = here.ask("handoff")
    assert there.ask("get", model="m", blocks=BLOCKS) == [0, []]
    with pytest.raises(WorkerFailed, match=r"PermissionDenied: .* belongs to another tenant"):
        there.ask("adopt", token=token, model="m", blocks=BLOCKS)
    assert set(there.ask("put", model="m", blocks=BLOCKS)) == {"STORED"}, "nothing of the other's exists for it"
    assert there.ask("get", model="m", blocks=BLOCKS) == [BLOCKS, []]
    there.ask("clear", model="m")
    assert there.ask("get", model="m", blocks=BLOCKS) == [0, []]
    assert here.ask("get", model="m", blocks=BLOCKS) == [BLOCKS, []]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a worker as another user")
def test_a_user_of_no_tenant_may_not_attach(start_daemon: StartDaemon, start_worker: StartWorker) -> None:
    daemon = start_daemon(socket_mode="0666")
    daemon.folder.chmod(0o711)
    with pytest.raises(WorkerFailed, match=rf"PermissionDenied: uid {OTHER_UID} .* belongs to no tenant"):
        start_worker(daemon, uid=OTHER_UID)
    assert daemon.client(staging_bytes=0).ping() > 0
