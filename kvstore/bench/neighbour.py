"""A worker process that keeps a daemon busy until it is killed: python -m kvstore.bench.neighbour ADDRESS KEYS SEED."""

from __future__ import annotations

import itertools
import sys

import click

from kvstore.bench import worker
from kvstore.bench.memory import kv_like_blocks
from kvstore_client import Client

_TIMEOUT_S = 30.0
_PUT_BLOCKS = 64
BLOCK_NBYTES = 16 << 10


def neighbour_name(seed: int) -> str:
    """Name of a neighbour's namespace."""
    return f"neighbour-{seed}"


def keep_busy(address: str, batch_keys: int, seed: int) -> None:
    """Store a prefix, say so on stdout, then match it, acquire it and put others without a pause."""
    with Client(address) as client:
        space = worker.namespace(client, BLOCK_NBYTES, neighbour_name(seed))
        keys = space.keys(worker.tokens(batch_keys, seed))
        blocks = kv_like_blocks(min(batch_keys, 1024), BLOCK_NBYTES)
        for start in range(0, batch_keys, len(blocks)):
            part = keys[start : start + len(blocks)]
            space.put(part, blocks[: len(part)], timeout_s=_TIMEOUT_S)
        click.echo("busy")
        sys.stdout.flush()
        for turn in itertools.count(1):
            space.match(keys, timeout_s=_TIMEOUT_S)
            space.acquire(keys, timeout_s=_TIMEOUT_S).release()
            fresh = space.keys(worker.tokens(_PUT_BLOCKS, seed + 10 * turn))
            space.put(fresh, blocks[: len(fresh)], timeout_s=_TIMEOUT_S)


if __name__ == "__main__":
    keep_busy(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
