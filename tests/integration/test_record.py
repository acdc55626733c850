"""A recording of a real daemon's traffic, and its replay."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon_fixtures import StartDaemon
from daemon_process import DaemonProcess
from derived import BLOCK_TOKENS, chain, contents, namespace
from kvstore.protocol.errors import QuotaExceeded
from kvstore.replay.trace import load
from kvstore.v1.admin_pb2 import RecordRequest
from kvstore_client import Client, Keys, Namespace
from polling import eventually

WAIT_S = 30.0
CALL = "admin call Record"


@pytest.fixture
def client(served: DaemonProcess, transport: str) -> Iterator[Client]:
    with Client(served.address, transport=transport, staging_bytes=16 << 20) as made:  # type: ignore[arg-type]
        yield made


def serve(space: Namespace, keys: Keys) -> int:
    """What a worker does with a prompt: take what is there, compute and store the rest."""
    with space.acquire(keys, WAIT_S) as lease:
        found = lease.blocks
        if found < len(keys):
            space.put(keys[found:], contents(keys[found:], space.block_nbytes), timeout_s=WAIT_S)
    return found


def kvctl(*arguments: object) -> Any:
    command = [sys.executable, "-m", "kvstore.cli.kvctl", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_recording_replays_as_the_daemon_served(
    served: DaemonProcess, client: Client, tmp_path: Path, transport: str
) -> None:
    """Two namespaces, prompts that share beginnings: a replay with room for all finds what the daemon found."""
    spaces = [namespace(client, f"record-{name}-{transport}") for name in ("one", "two")]
    path = tmp_path / "t.jsonl"
    calls = served.log().count(CALL)
    command = [sys.executable, "-m", "kvstore.cli.kvctl", "--address", served.address, "record", str(path), "--json"]
    recorder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        eventually(lambda: served.log().count(CALL) > calls, "the recording to begin")
        found, blocks = 0, 0
        for space, count, seed in [(0, 6, 1), (1, 6, 1), (0, 9, 1), (0, 4, 2), (1, 3, 1), (0, 9, 1)]:
            keys = chain(spaces[space], count, seed)
            found += serve(spaces[space], keys)
            blocks += count
        recorder.send_signal(signal.SIGINT)
        out, err = recorder.communicate(timeout=WAIT_S)
    finally:
        recorder.kill()
        recorder.wait()
    assert recorder.returncode == 0, err
    said = json.loads(out)
    assert (said["requests"], said["blocks"], said["dropped"]) == (6, blocks, 0)
    assert served.log().count(CALL) == calls + 2  # its beginning and its end

    trace = load(path)
    assert [len(request.keys) for request in trace.requests] == [6, 6, 9, 4, 3, 9]
    assert [request.tokens for request in trace.requests] == [count * BLOCK_TOKENS for count in (6, 6, 9, 4, 3, 9)]
    assert trace.unique == 9 + 6 + 4
    assert [request.time_s for request in trace.requests] == sorted(request.time_s for request in trace.requests)
    for key in chain(spaces[0], 9, 1):
        assert bytes(key).hex() not in path.read_text()

    replayed = kvctl("replay", path, "--tiers", "warm=100")
    assert replayed["references"] == blocks
    assert round(replayed["block_hit_ratio"] * blocks) == found == 6 + 3 + 9


def test_a_recorder_that_died_is_forgotten_and_costs_nothing(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(warm_bytes="64MiB")
    number = daemon.ask("Record", RecordRequest()).recording
    with Client(daemon.address, staging_bytes=8 << 20) as client:
        space = namespace(client, "dead")
        assert serve(space, chain(space, 3)) == 0
        assert len(daemon.ask("Record", RecordRequest(recording=number)).requests) == 1

        def ended() -> bool:
            """Asking for another one does not keep the first alive."""
            try:
                return bool(daemon.ask("Record", RecordRequest()).recording != number)
            except QuotaExceeded:
                return False

        eventually(ended, "the recording to be given up")
        assert serve(space, chain(space, 3)) == 3
