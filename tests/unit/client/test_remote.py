"""The client's side of TCP: addresses, arguments, and a daemon that sends what makes no sense."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from kvstore.protocol.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    KVStoreError,
    LeaseExpired,
    QuotaExceeded,
    Unavailable,
)
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client import TLS, Client
from kvstore_client.address import Address, resolve
from kvstore_client.buffers import BlockBuffers
from kvstore_client.claim import Claim
from kvstore_client.fetching import RemotePlacement, fetch_into
from kvstore_client.targets import HostTarget

NBYTES = 10
TOKEN = "t" * 32


@pytest.mark.parametrize(
    ("given", "target", "loops"),
    [
        ("tcp://127.0.0.1:7400", "127.0.0.1:7400", True),
        ("tcp://localhost:1", "localhost:1", True),
        ("tcp://[::1]:65535", "[::1]:65535", True),
        ("tcp://10.0.0.1:7400", "10.0.0.1:7400", False),
        ("tcp://kv.example:7400", "kv.example:7400", False),
        ("tcp://127.0.0.1.example:7400", "127.0.0.1.example:7400", False),
        ("tcp://127.example:7400", "127.example:7400", False),
    ],
)
def test_addresses_over_tcp(given: str, target: str, loops: bool) -> None:
    address = resolve(given)
    assert address == Address("", target)
    assert (str(address), address.is_tcp, address.is_loopback) == (given, True, loops)


def test_a_socket_of_this_machine_is_no_tcp() -> None:
    address = resolve("unix:/run/k.sock")
    assert (address.is_tcp, address.is_loopback) == (False, True)


@pytest.mark.parametrize(
    "given", ["tcp://", "tcp://host", "tcp://host:0", "tcp://host:65536", "tcp://::1:1", "tcp:h:1"]
)
def test_what_is_no_address(given: str) -> None:
    with pytest.raises(InvalidRequest, match="tcp://host:port"):
        resolve(given)


@pytest.mark.parametrize(
    ("address", "options", "message"),
    [
        ("unix:/run/k.sock", {"token": TOKEN}, "are for tcp://host:port"),
        ("unix:/run/k.sock", {"tls": TLS()}, "are for tcp://host:port"),
        ("tcp://127.0.0.1:1", {"token": TOKEN, "transport": "local"}, "needs a socket of this machine"),
        ("tcp://127.0.0.1:1", {}, "the daemon must know who calls"),
        ("tcp://127.0.0.1:1", {"tls": TLS(ca="ca")}, "the daemon must know who calls"),
        ("tcp://127.0.0.1:1", {"token": "t" * 31}, "token has 31 bytes; it must have 32"),
        ("tcp://10.0.0.1:1", {"token": TOKEN}, "in the clear"),
        ("tcp://10.0.0.1:1", {"token": TOKEN, "tls": TLS(ca="/nonexistent")}, "tls.ca: /nonexistent cannot be read"),
    ],
)
def test_arguments_that_cannot_be(address: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Client(address, **options)


def test_a_token_does_not_show(tmp_path: Path) -> None:
    with Client("tcp://127.0.0.1:1", token=TOKEN, fail_open=True) as client:
        assert TOKEN not in repr(client)
        assert TOKEN not in repr(client._connection.options)


def test_pieces_of_a_block_find_their_place() -> None:
    whole = np.zeros((2, NBYTES), np.uint8)
    HostTarget(BlockBuffers(whole=whole), NBYTES, 5).write(6, 3, memoryview(b"abc"))
    assert bytes(whole[1]) == bytes(3) + b"abc" + bytes(4)
    assert not whole[0].any()
    pieces = [np.zeros(size, np.uint8) for size in (1, 4, 0, 5)]
    target = HostTarget(BlockBuffers(pieces=[pieces]), NBYTES, 0)
    for at in range(0, NBYTES, 4):
        target.write(0, at, memoryview(b"0123456789")[at : at + 4])
    assert b"".join(piece.tobytes() for piece in pieces) == b"0123456789"


class Session:
    """Answers Fetch with what a test gives it."""

    is_fail_open = False
    is_lost = False

    def __init__(self, *answers: list[pb.FetchChunk | KVStoreError]) -> None:
        self.answers = list(answers)
        self.requests: list[pb.FetchRequest] = []

    def placement(self, group: pb.LeaseGroup, index: int, ready: int) -> RemotePlacement:
        return RemotePlacement(group, index, ready, self.fetch)

    def fetch(self, request: pb.FetchRequest, deadline_s: float) -> Iterator[bytes]:
        self.requests.append(request)
        for answer in self.answers.pop(0):
            if isinstance(answer, KVStoreError):
                raise answer
            yield answer.SerializeToString()

    def forget(self, lease_id: int) -> None:
        pass

    def release_later(self, lease_id: int) -> None:
        pass

    @property
    def copies(self) -> Any:
        return self

    def note(self, nbytes: int, seconds: float) -> None:
        self.noted = nbytes


def block(i: int) -> bytes:
    return bytes([i]) * NBYTES


def chunks(i: int, cut: int = 4) -> list[pb.FetchChunk]:
    made = [pb.FetchChunk(block=i, offset=at, data=block(i)[at : at + cut]) for at in range(0, NBYTES, cut)]
    made[0].checksum = xxhash.xxh3_128(block(i)).digest()
    return made


def read(session: Session, blocks: int = 3, ready: int = 3) -> tuple[int, bytes]:
    group = pb.LeaseGroup(
        slab_ids=bytes(4 * blocks), slots=bytes(4 * blocks), generations=bytes(8 * blocks), block_nbytes=NBYTES
    )
    claim = Claim(session, pb.LeaseReply(lease_id=9, groups=[group], ready=ready))  # type: ignore[arg-type]
    (placement,) = claim.placements
    assert isinstance(placement, RemotePlacement)
    out = np.zeros((blocks, NBYTES), np.uint8)
    count = fetch_into(claim, placement, range(blocks), HostTarget(BlockBuffers(whole=out), NBYTES, 0), 0.2)
    return count, out.tobytes()


def test_blocks_come_in_pieces() -> None:
    session = Session([*chunks(0), *chunks(1, 10), *chunks(2, 1)])
    assert read(session) == (3, block(0) + block(1) + block(2))
    assert session.noted == 3 * NBYTES
    assert (session.requests[0].start, session.requests[0].stop) == (0, 3)


def test_a_block_that_is_lost_ends_the_lease_there() -> None:
    session = Session([*chunks(0), pb.FetchChunk(lost=2)])
    assert read(session, ready=0) == (1, block(0) + bytes(2 * NBYTES))
    assert not hasattr(session, "noted"), "waiting for loads says nothing of the network"


def test_what_was_busy_is_asked_for_again_from_the_first_missing_block() -> None:
    session = Session([*chunks(0), chunks(1)[0], QuotaExceeded("busy")], [*chunks(1), *chunks(2)])
    assert read(session) == (3, block(0) + block(1) + block(2))
    assert session.requests[1].start == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([*chunks(1)], "out of turn"),
        ([chunks(0)[1]], "out of turn"),
        ([chunks(0)[0], chunks(0)[0]], "out of turn"),
        ([pb.FetchChunk(block=0)], "out of turn"),
        ([pb.FetchChunk(block=0, data=bytes(11))], "more than the 10 bytes"),
        ([*chunks(0)], "ended before block 1"),
        ([], "ended before block 0"),
        ([*chunks(0), *chunks(1), *chunks(2), *chunks(3)], "out of turn"),
        ([pb.FetchChunk(block=0, data=bytes(10), checksum=b"x" * 16)], "block 0 differs from its checksum"),
    ],
)
def test_what_makes_no_sense_is_not_taken(answer: list[pb.FetchChunk | KVStoreError], message: str) -> None:
    with pytest.raises(InternalError, match=message):
        read(Session(answer))


@pytest.mark.parametrize(
    ("error", "lost", "raised"),
    [
        (LeaseExpired("gone"), False, LeaseExpired),
        (Unavailable("down"), True, LeaseExpired),
        (Unavailable("down"), False, Unavailable),
        (DeadlineExceeded("late"), False, DeadlineExceeded),
        (QuotaExceeded("busy"), False, QuotaExceeded),
    ],
)
def test_what_a_failed_fetch_means(error: KVStoreError, lost: bool, raised: type[KVStoreError]) -> None:
    session = Session(*[[error]] * 100)
    session.is_lost = lost
    with pytest.raises(raised):
        read(session)


def test_a_fail_open_client_takes_what_came_in_time() -> None:
    session = Session([*chunks(0), DeadlineExceeded("late")])
    session.is_fail_open = True
    assert read(session)[0] == 1


def test_a_placement_knows_what_the_daemon_has_said() -> None:
    group = pb.LeaseGroup(
        first_block=3, slab_ids=bytes(16), slots=bytes(16), generations=bytes(32), block_nbytes=NBYTES
    )
    placement = RemotePlacement(group, 0, 1, lambda request, deadline_s: iter(()))
    assert (placement.ready_from(0), placement.readable_to(5, 7)) == (4, 5)
    placement.note_ready(6)
    placement.note_ready(5)
    assert (placement.ready_from(0), placement.readable_to(3, 5), placement.is_reused(3)) == (6, 5, False)
    with pytest.raises(InternalError, match="blocks of 10 bytes, this namespace 11"):
        placement.find_slabs(None, 11, 0.0)  # type: ignore[arg-type]
