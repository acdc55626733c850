"""kvctl record against a daemon with fixed answers: lines of a trace, salted ids, and an end in order."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import grpc
import pytest
from click.testing import Result

from kvstore.v1 import admin_pb2 as pb

Run = Callable[..., Result]


class Admin(Protocol):
    requests: list[Any]
    answers: dict[str, object]


class Daemon(Protocol):
    admin: Admin


A, B, C = (bytes([fill]) * 32 for fill in b"abc")


def asked(time_us: int, namespace: bytes, *keys: bytes) -> pb.RecordedRequest:
    return pb.RecordedRequest(time_us=time_us, namespace=namespace, block_tokens=16, keys=b"".join(keys))


def replies(daemon: Daemon, *batches: list[pb.RecordedRequest], **last: int) -> None:
    """The daemon answers with these batches, then with empty ones."""

    def answers() -> Iterator[pb.RecordResponse]:
        for batch in batches:
            yield pb.RecordResponse(recording=9, requests=batch)
        while True:
            yield pb.RecordResponse(recording=9, **last)

    daemon.admin.answers["Record"] = answers()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_requests_become_lines(kvctl: Run, daemon: Daemon, tmp_path: Path) -> None:
    replies(daemon, [asked(0, A, A, B), asked(1_500_999, A, A, C)], [asked(2_000_000, B, A)], dropped=4, left_out=2)
    path = tmp_path / "t.jsonl"
    done = kvctl("record", str(path), "--seconds", "0.5")
    assert done.exit_code == 0, done.output
    assert "3 requests for 5 blocks, 4 dropped" in done.stdout
    assert "4 requests were dropped" in done.stderr and "2 groups were left out" in done.stderr
    first, second, third = lines(path)
    assert [list(first), first["output_length"]] == [["timestamp", "input_length", "output_length", "hash_ids"], 0]
    assert [line["timestamp"] for line in (first, second, third)] == [0, 1500, 2000]
    assert [line["input_length"] for line in (first, second, third)] == [32, 32, 16]
    assert first["hash_ids"][0] == second["hash_ids"][0] != third["hash_ids"][0]  # another namespace has other ids
    assert len({*first["hash_ids"], *second["hash_ids"], *third["hash_ids"]}) == 4
    assert path.stat().st_mode & 0o777 == 0o600
    sent = daemon.admin.requests
    assert [(request.recording, request.after) for request in sent[:3]] == [(0, 0), (9, 2), (9, 3)]
    assert [request.stop for request in sent] == [False] * (len(sent) - 1) + [True]


def test_two_recordings_have_no_ids_in_common(kvctl: Run, daemon: Daemon, tmp_path: Path) -> None:
    ids = []
    for name in ("one", "two"):
        replies(daemon, [asked(0, A, A, B)])
        assert kvctl("record", str(tmp_path / name), "--seconds", "0.1").exit_code == 0
        ids.append(set(lines(tmp_path / name)[0]["hash_ids"]))
        assert not any(key.hex() in (tmp_path / name).read_text() for key in (A, B))
    assert not ids[0] & ids[1]


def test_it_ends_with_so_many_requests(kvctl_json: Callable[..., Any], daemon: Daemon, tmp_path: Path) -> None:
    replies(daemon, *[[asked(0, A, A), asked(0, A, B)]] * 3)
    answer = kvctl_json("record", str(tmp_path / "t"), "--max-requests", "3")
    assert (answer["requests"], answer["blocks"], answer["dropped"]) == (3, 3, 0)
    assert len(lines(tmp_path / "t")) == 3
    assert daemon.admin.requests[-1].stop


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As on a terminal: a shell's background job has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_it_in_order(kvctl: Run, daemon: Daemon, tmp_path: Path) -> None:
    def answers() -> Iterator[pb.RecordResponse]:
        yield pb.RecordResponse(recording=9, requests=[asked(0, A, A)])
        os.kill(os.getpid(), signal.SIGINT)
        yield pb.RecordResponse(recording=9, requests=[asked(1, A, B)])
        yield pb.RecordResponse(recording=9, requests=[asked(2, A, C)], waiting=5)

    daemon.admin.answers["Record"] = answers()
    done = kvctl("record", str(tmp_path / "t"))
    assert done.exit_code == 0, done.output
    assert len(lines(tmp_path / "t")) == 3
    assert "5 requests were dropped" in done.stderr
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_came_before_the_daemon_went_is_a_trace(kvctl: Run, daemon: Daemon, tmp_path: Path) -> None:
    def answers() -> Iterator[pb.RecordResponse]:
        yield pb.RecordResponse(recording=9, requests=[asked(0, A, A)])
        daemon.admin.answers["Record"] = grpc.StatusCode.UNAVAILABLE
        yield pb.RecordResponse(recording=9)

    daemon.admin.answers["Record"] = answers()
    done = kvctl("record", str(tmp_path / "t"))
    assert done.exit_code == 3
    assert len(lines(tmp_path / "t")) == 1


def test_a_file_that_exists_is_not_written_over(kvctl: Run, tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text("mine")
    done = kvctl("record", str(path))
    assert (done.exit_code, path.read_text()) == (2, "mine")
    assert "exists; give the name of a new file" in done.stderr
    assert kvctl("record", str(tmp_path / "no" / "t")).exit_code == 2


@pytest.mark.parametrize("code", [grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_a_refused_recording_leaves_no_file(kvctl: Run, daemon: Daemon, tmp_path: Path, code: grpc.StatusCode) -> None:
    daemon.admin.answers["Record"] = code
    assert kvctl("record", str(tmp_path / "t")).exit_code == 1
    assert not (tmp_path / "t").exists()
