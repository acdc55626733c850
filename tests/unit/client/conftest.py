"""A fake daemon, a client of it, and blocks whose bytes follow from their key."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from derived import namespace
from kvstore_client import Client, Namespace
from kvstore_client.testing import FakeDaemon

BLOCK_NBYTES = 16 << 10


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    """A fake daemon with small slabs: 15 blocks of 16 KiB each."""
    with FakeDaemon(warm_bytes=64 << 20, slab_bytes=256 << 10) as running:
        yield running


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Client]:
    """A client that raises."""
    with Client(daemon.address, staging_bytes=4 << 20) as attached:
        yield attached


@pytest.fixture
def ns(client: Client) -> Namespace:
    """A namespace of kind "chain" with blocks of 16 KiB."""
    return namespace(client, "model", BLOCK_NBYTES)


@pytest.fixture
def new_client(daemon: FakeDaemon) -> Iterator[Callable[..., Client]]:
    """More clients of the daemon, with arguments of one's own; closed at the end."""
    made: list[Client] = []

    def make(**arguments: object) -> Client:
        made.append(Client(daemon.address, **{"staging_bytes": 1 << 20, **arguments}))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for client in made:
        client.close()
