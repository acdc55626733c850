"""The connection that a kvctl verb runs in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvstore.cli.admin_client import AdminClient
from kvstore.cli.options import Options
from kvstore.config import default_addresses
from kvstore.protocol.errors import Unavailable


@contextmanager
def connected(options: Options, timeout_s: float = 10.0) -> Iterator[AdminClient]:
    """Attach to the daemon that was asked for, or to the first of the usual places where one answers.

    Raises:
        Unavailable: nobody answers there, or anywhere.
    """
    with _attach([options.address] if options.address else default_addresses(), timeout_s) as client:
        yield client


def _attach(addresses: list[str], timeout_s: float) -> AdminClient:
    tried: list[Unavailable] = []
    for address in addresses:
        try:
            return AdminClient(address, timeout_s)
        except Unavailable as error:
            tried.append(error)
    raise tried[0] if len(tried) == 1 else Unavailable("\n  ".join(map(str, ["nobody answers:", *tried])))
