"""A daemon whose agents answer garbage: they are replaced, what is read is right, and in the end all is well."""

from __future__ import annotations

import contextlib
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from daemon_process import DaemonProcess
from derived import chain, contents, fetch, namespace, wrong
from garbling_agents import GarblingAgents
from kvstore.protocol.errors import KVStoreError
from kvstore.v1 import admin_pb2, types_pb2
from kvstore_client import STORED, Keys, Namespace
from polling import eventually

BLOCKS = 16
ROUNDS_MAX = 60
GARBAGE = 10
WAIT_S = 5.0


def read_what_comes(space: Namespace, keys: Keys) -> int:
    """How many blocks came; every one of them right."""
    out = np.zeros((len(keys), space.block_nbytes), np.uint8)
    try:
        with space.acquire(keys, timeout_s=WAIT_S) as lease:
            count = lease.read_into(out[: max(lease.blocks, 1)], timeout_s=WAIT_S)
    except KVStoreError:  # the blocks went with their agent
        return 0
    assert not wrong(keys, out[:count])
    return count


def test_garbage_from_agents_is_never_a_wrong_byte(tmp_path: Path) -> None:
    agents = GarblingAgents(tmp_path)
    with TemporaryDirectory(prefix="kv-") as folder:
        settings = {"hot_device": "cpu", "hot_bytes": "16MiB", "agent_timeout_s": 1}
        daemon = DaemonProcess(Path(folder), agents.environment, **settings)
        daemon.start()
        try:
            space = namespace(daemon.client(staging_bytes=4 << 20), "garbled")
            work(daemon, space, agents)
            agents.cure()
            check_well(daemon, space)
            daemon.close()
        finally:
            daemon.abandon()


def work(daemon: DaemonProcess, space: Namespace, agents: GarblingAgents) -> None:
    """Put, save, drop and read, until there was enough garbage."""
    came = 0
    for number in range(ROUNDS_MAX):
        eventually(lambda: daemon.tier("cold").state == "ok", "the next cold agent")
        keys = chain(space, BLOCKS, number)
        assert space.put(keys, contents(keys), timeout_s=WAIT_S) == [STORED] * BLOCKS, "puts do not need an agent"
        for method, request in verbs():
            with contextlib.suppress(KVStoreError):
                daemon.ask(method, request)
        for seed in (number, number // 2):
            came += read_what_comes(space, chain(space, BLOCKS, seed))
        if agents.garbled() >= GARBAGE:
            break
    assert agents.garbled() >= GARBAGE, "too little garbage for this to say anything"
    assert came, "not one block came through"
    assert sum(tier.restarts for tier in daemon.stats().tiers), "no agent was replaced"


def check_well(daemon: DaemonProcess, space: Namespace) -> None:
    """Everything works again, and nothing was left half done."""
    keys = chain(space, BLOCKS, ROUNDS_MAX)
    assert space.put(keys, contents(keys), timeout_s=WAIT_S) == [STORED] * BLOCKS

    def all_verbs_work() -> bool:
        try:
            return all(daemon.ask(method, request) for method, request in verbs())
        except KVStoreError:  # of an agent that has said its last garbage, and is being replaced
            return False

    eventually(all_verbs_work, "sane agents")
    assert fetch(space, keys) == (BLOCKS, [])
    eventually(lambda: daemon.stats().counters["slots_filling"] == 0, "no slot to be left half filled")
    eventually(lambda: daemon.stats().leases == 0, "no lease to be left")
    assert {tier.state for tier in daemon.stats().tiers} == {"ok"}
    assert daemon.ask("Verify", admin_pb2.VerifyRequest(tier=types_pb2.TIER_COLD)).corrupt == 0


def verbs() -> list[tuple[str, object]]:
    """What an operator does to have blocks saved and read back."""
    return [
        ("Flush", admin_pb2.FlushRequest(timeout_ms=3_000)),
        ("Evict", admin_pb2.EvictRequest(tier=types_pb2.TIER_WARM, bytes=1 << 40)),
        ("Verify", admin_pb2.VerifyRequest(tier=types_pb2.TIER_COLD, limit=4)),
    ]
