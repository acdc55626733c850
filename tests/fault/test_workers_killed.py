"""Workers that are killed, stopped, or do as they please: nothing of theirs is left, nobody else notices."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from daemon_fixtures import StartDaemon, StartWorker
from daemon_process import DaemonProcess
from derived import BLOCK_NBYTES, chain, contents, fetch, namespace
from kvstore.protocol.frames import HEADER, Method
from kvstore.v1 import admin_pb2, types_pb2
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client import STORED, Client, Namespace
from polling import eventually
from raw_session import RawSession

BLOCKS = 32
NBYTES = 256 << 10
STAGING_BYTES = 16 << 20


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    return start_daemon(warm_bytes="64MiB", cold_bytes="128MiB", staging_max_bytes="16MiB")


@pytest.fixture
def client(daemon: DaemonProcess) -> Client:
    """A worker that goes on."""
    return daemon.client(name="survivor", staging_bytes=4 << 20)


def is_tidy(daemon: DaemonProcess) -> bool:
    """Whether nothing of a dead worker is left: session, leases, pins, staging, half-filled slots."""
    stats = daemon.stats()
    survivors = daemon.sessions()
    return (
        [session.client_name for session in survivors] == ["survivor"]
        and stats.leases == 0
        and stats.staging_bytes == sum(session.staging_bytes for session in survivors)
        and stats.counters["slots_filling"] == 0
        and stats.quarantined_bytes == 0
    )


def check_every_copy(daemon: DaemonProcess) -> int:
    """Verify all checksums; how many blocks there are."""
    checked = 0
    for tier in (types_pb2.TIER_WARM, types_pb2.TIER_COLD):
        answer = daemon.ask("Verify", admin_pb2.VerifyRequest(tier=tier))
        assert answer.corrupt == 0
        checked += answer.checked
    return checked


def evict_all(daemon: DaemonProcess) -> None:
    """Nothing is pinned: all of warm can go."""
    daemon.ask("Evict", admin_pb2.EvictRequest(tier=types_pb2.TIER_WARM, bytes=1 << 40))
    assert daemon.tier("warm").blocks == 0


# -- mid-put


def test_defect_1_a_writer_that_vanishes_before_its_put_publishes_nothing(
    daemon: DaemonProcess, client: Client, start_worker: StartWorker
) -> None:
    """LMCache published the slots that a dead writer had been given and never written."""
    worker = start_worker(daemon, staging_bytes=STAGING_BYTES)
    assert worker.ask("stage_half", model="m", blocks=BLOCKS, block_nbytes=NBYTES) == BLOCKS
    worker.kill()
    eventually(lambda: is_tidy(daemon), "the worker's session to be gone")
    space = namespace(client, "m", NBYTES)
    assert not any(space.exists(chain(space, BLOCKS)))
    assert daemon.stats().put_stored == 0
    assert daemon.tier("warm").used_bytes == 0


@pytest.mark.parametrize("transport", ["auto", "grpc"])
def test_defect_1_a_writer_killed_mid_put_leaves_whole_blocks_or_none(
    daemon: DaemonProcess, client: Client, start_worker: StartWorker, transport: str
) -> None:
    """Six times, a few milliseconds further into its puts each time."""
    space = namespace(client, "m", NBYTES)
    for kill in range(6):
        worker = start_worker(daemon, transport=transport, staging_bytes=STAGING_BYTES)
        worker.ask("put_for_ever", model="m", blocks=BLOCKS, block_nbytes=NBYTES)
        before = daemon.stats().put_stored
        eventually(lambda before=before: daemon.stats().put_stored > before, "the puts to begin")  # type: ignore[misc]
        time.sleep(0.003 * kill)  # not a wait for anything: another moment each time
        worker.kill()
        eventually(lambda: is_tidy(daemon), "the worker's session to be gone")
        for seed in range(4):
            assert fetch(space, chain(space, BLOCKS, seed))[1] == []
        check_every_copy(daemon)
    keys = chain(space, 8, seed=99)
    assert space.put(keys, contents(keys, NBYTES)) == [STORED] * 8


def test_defect_1_half_a_put_frame_publishes_nothing(daemon: DaemonProcess, client: Client) -> None:
    space = namespace(client, "m", NBYTES)
    keys = chain(space, 8)
    request = pb.PutRequest(namespace=space.digest, keys=bytes(keys), block_nbytes=NBYTES).SerializeToString()
    with RawSession(daemon.address, staging_bytes=STAGING_BYTES) as raw:
        raw.frames.sock.sendall(HEADER.pack(len(request), 7, Method.PUT, 0, 1000) + request[: len(request) // 2])
    eventually(lambda: is_tidy(daemon), "the session to be gone")
    assert not any(space.exists(keys))


def test_defect_1_a_put_whose_sender_is_gone_is_whole_or_absent(daemon: DaemonProcess, client: Client) -> None:
    """The connection ends with the frame: staging must live as long as the copy from it."""
    space = namespace(client, "m", NBYTES)
    for seed in range(20):
        keys = chain(space, BLOCKS, seed)
        with RawSession(daemon.address, staging_bytes=STAGING_BYTES) as raw:
            request = pb.PutRequest(namespace=space.digest, keys=bytes(keys), block_nbytes=NBYTES)
            raw.send(Method.PUT, request)
    eventually(lambda: is_tidy(daemon), "the sessions to be gone")
    zeros = check_every_copy(daemon)
    stored = daemon.stats().put_stored
    assert zeros >= min(stored, 1)


def test_a_scribbler_changes_nothing_that_was_published(
    daemon: DaemonProcess, client: Client, start_worker: StartWorker
) -> None:
    """A worker that writes to its staging while the daemon copies: what was taken is what is served, for ever."""
    worker = start_worker(daemon, staging_bytes=STAGING_BYTES)
    for seed in range(4):
        assert set(worker.ask("scribble", model="m", blocks=BLOCKS, seed=seed, block_nbytes=NBYTES)) == {"STORED"}
    space = namespace(client, "m", NBYTES)
    out = contents(chain(space, BLOCKS), NBYTES)
    again = out.copy()
    with space.acquire(chain(space, BLOCKS)) as lease:
        assert lease.read_into(out, verify=True) == BLOCKS
        assert lease.read_into(again, verify=True) == BLOCKS
    assert (out == again).all()
    assert check_every_copy(daemon) >= 4 * BLOCKS


# -- mid-get, and holding


@pytest.mark.parametrize("transport", ["auto", "grpc"])
def test_defect_5_a_reader_killed_mid_get_leaves_no_pins(
    daemon: DaemonProcess, client: Client, start_worker: StartWorker, transport: str
) -> None:
    space = namespace(client, "m", NBYTES)
    keys = chain(space, BLOCKS)
    assert space.put(keys, contents(keys, NBYTES)) == [STORED] * BLOCKS
    for _ in range(4):
        worker = start_worker(daemon, transport=transport, staging_bytes=0)
        assert worker.ask("get_for_ever", model="m", blocks=BLOCKS, block_nbytes=NBYTES) == [BLOCKS, []]
        worker.kill()
        eventually(lambda: is_tidy(daemon), "its pins to go")
    assert fetch(space, keys) == (BLOCKS, [])
    eventually(lambda: is_tidy(daemon), "the last lease to end")
    evict_all(daemon)


@pytest.mark.parametrize("transport", ["auto", "grpc"])
def test_defect_5_a_worker_killed_with_leases_gives_everything_back(
    daemon: DaemonProcess, client: Client, start_worker: StartWorker, transport: str
) -> None:
    del client
    workers = [start_worker(daemon, transport=transport, staging_bytes=8 << 20) for _ in range(3)]
    for seed, worker in enumerate(workers):
        worker.ask("put", model="m", blocks=BLOCKS, seed=seed, block_nbytes=NBYTES)
        for _ in range(4):
            worker.ask("hold", model="m", blocks=BLOCKS, seed=seed, block_nbytes=NBYTES)
    assert daemon.stats().leases == 12
    for worker in workers:
        worker.kill()
    eventually(lambda: is_tidy(daemon), "twelve leases and three segments to go")
    evict_all(daemon)


def test_defect_5_a_worker_killed_while_its_blocks_load(
    daemon: DaemonProcess, client: Client, start_worker: StartWorker
) -> None:
    """The slots that are being filled for it are filled to the end, and then they are anybody's."""
    space = namespace(client, "m", NBYTES)
    keys = chain(space, 128)
    for first in range(0, 128, BLOCKS):
        part = keys[first : first + BLOCKS]
        assert space.put(part, contents(part, NBYTES)) == [STORED] * BLOCKS
    assert daemon.ask("Flush", admin_pb2.FlushRequest(timeout_ms=30_000)).unsaved == 0
    for _ in range(4):
        evict_all(daemon)
        worker = start_worker(daemon, staging_bytes=0)
        assert worker.ask("hold", model="m", blocks=128, block_nbytes=NBYTES) == 128
        worker.kill()
        eventually(lambda: is_tidy(daemon), "its lease and its loads to end")
        assert fetch(space, keys) == (128, [])
        eventually(lambda: is_tidy(daemon), "the last lease to end")


def test_a_dead_worker_is_noticed_though_its_child_holds_the_socket(
    daemon: DaemonProcess, client: Client, start_worker: StartWorker
) -> None:
    """EOF would come when the child ends; the pidfd tells at once."""
    del client
    worker = start_worker(daemon, staging_bytes=8 << 20)
    worker.ask("put", model="m", blocks=BLOCKS)
    worker.ask("hold", model="m", blocks=BLOCKS)
    child = psutil.Process(worker.ask("fork_holder"))
    try:
        worker.kill()
        eventually(lambda: is_tidy(daemon), "the dead worker's session to end")
        assert child.is_running(), "and it is not the child's end that was noticed"
    finally:
        os.kill(child.pid, signal.SIGKILL)


# -- stopped, not dead


def test_defect_6_a_stopped_worker_holds_up_nobody(
    daemon: DaemonProcess, client: Client, start_worker: StartWorker
) -> None:
    """A worker is stopped in the middle of its puts; all others are served, also when it is killed at last."""
    stopped = start_worker(daemon, staging_bytes=STAGING_BYTES)
    stopped.ask("put_for_ever", model="m", blocks=BLOCKS, block_nbytes=NBYTES)
    stopped.pause()
    space = namespace(client, "other")
    keys = chain(space, BLOCKS)
    assert space.put(keys, contents(keys)) == [STORED] * BLOCKS
    assert fetch(space, keys) == (BLOCKS, [])
    stopped.kill()
    eventually(lambda: is_tidy(daemon), "its session to be gone")
    assert fetch(space, keys) == (BLOCKS, [])


def test_a_worker_that_takes_no_replies_is_ended_alone(daemon: DaemonProcess, client: Client) -> None:
    """It sends calls and never reads: the daemon must neither wait for it for ever nor keep its replies."""
    space = namespace(client, "m")
    keys = bytes(chain(space, 2048))
    with RawSession(daemon.address) as raw:
        raw.frames.sock.settimeout(0.2)
        request = pb.ExistsRequest(namespace=space.digest, keys=keys).SerializeToString()
        frame = HEADER.pack(len(request), 1, Method.EXISTS, 0, 0) + request
        with pytest.raises(OSError, match=r"timed out|Broken pipe|reset"):
            for _ in range(2000):
                raw.frames.sock.sendall(frame)
        assert client.ping(timeout_s=30) > 0
        eventually(lambda: len(daemon.sessions()) == 1, "its session to be ended")


# -- coming and going


def test_defect_5_nothing_piles_up_when_workers_come_and_go(daemon: DaemonProcess, client: Client) -> None:
    """Sessions that end in the middle of everything leave no descriptor, thread or mapping behind."""
    space: Namespace = namespace(client, "m")
    keys = chain(space, 8)
    assert space.put(keys, contents(keys)) == [STORED] * 8
    process = psutil.Process(daemon.pid)

    def attach_and_vanish() -> None:
        raw = RawSession(daemon.address, staging_bytes=4 << 20)
        group = pb.AcquireGroup(namespace=space.digest, keys=bytes(keys), mode=pb.ACQUIRE_MODE_PREFIX)
        raw.call("Acquire", pb.AcquireRequest(groups=[group]))
        raw.call("MapSlabs", pb.MapSlabsRequest(slab_ids=[0]))
        raw.send(Method.PUT, pb.PutRequest(namespace=space.digest, keys=bytes(keys), block_nbytes=BLOCK_NBYTES))
        raw.close()

    def held() -> tuple[int, int, int]:
        eventually(lambda: is_tidy(daemon), "the sessions to end")
        return process.num_fds(), process.num_threads(), len(process.memory_maps(grouped=False))

    for _ in range(5):
        attach_and_vanish()
    before = held()
    for _ in range(40):
        attach_and_vanish()

    def is_as_before() -> bool:
        now = held()
        return now[0] <= before[0] + 4 and now[1] <= before[1] + 8 and now[2] <= before[2] + 24

    eventually(is_as_before, "descriptors, threads and mappings to be as before")
    assert fetch(space, keys) == (8, [])
