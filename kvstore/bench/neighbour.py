"""A worker process that keeps a daemon busy until it is killed.

python -m kvstore.bench.neighbour calls|spill ADDRESS COUNT SEED
"""

from __future__ import annotations

import itertools
import sys

import click

from kvstore.bench import worker
from kvstore.bench.memory import kv_like_blocks
from kvstore_client import Client

_TIMEOUT_S = 30.0
_PUT_BLOCKS = 64
_FRESH_BLOCKS = 8
_SPILL_SETS = 8  # working sets that one after the other come back from the cold tier
BLOCK_NBYTES = 16 << 10
SPILL_BLOCK_NBYTES = 2 << 20


def neighbour_name(seed: int) -> str:
    """Name of a neighbour's namespace."""
    return f"neighbour-{seed}"


def keep_calling(address: str, batch_keys: int, seed: int) -> None:
    """Store a prefix, say so on stdout, then match it, acquire it and put others without a pause."""
    with Client(address) as client:
        space = worker.namespace(client, BLOCK_NBYTES, neighbour_name(seed))
        keys = space.keys(worker.tokens(batch_keys, seed))
        blocks = kv_like_blocks(min(batch_keys, 1024), BLOCK_NBYTES)
        for start in range(0, batch_keys, len(blocks)):
            part = keys[start : start + len(blocks)]
            space.put(part, blocks[: len(part)], timeout_s=_TIMEOUT_S)
        _say_ready()
        for turn in itertools.count(1):
            space.match(keys, timeout_s=_TIMEOUT_S)
            space.acquire(keys, timeout_s=_TIMEOUT_S).release()
            fresh = space.keys(worker.tokens(_PUT_BLOCKS, seed + 10 * turn))
            space.put(fresh, blocks[: len(fresh)], timeout_s=_TIMEOUT_S)


def keep_spilling(address: str, blocks: int, seed: int) -> None:
    """Store prefixes that warm cannot hold together, then read them in turn and put new blocks, without a pause."""
    with Client(address) as client:
        space = worker.namespace(client, SPILL_BLOCK_NBYTES, neighbour_name(seed))
        content = kv_like_blocks(blocks, SPILL_BLOCK_NBYTES)
        out = content.copy()
        sets = [space.keys(worker.tokens(blocks, seed + number)) for number in range(_SPILL_SETS)]
        for keys in sets:
            space.put(keys, content, timeout_s=_TIMEOUT_S)
            worker.wait_steady(lambda: worker.tier(client, "cold", "writes"), "what was put to be saved")
        _say_ready()
        for turn in itertools.count():
            with space.acquire(sets[turn % _SPILL_SETS], timeout_s=_TIMEOUT_S) as lease:
                lease.read_into(out[: lease.blocks])
            fresh = space.keys(worker.tokens(_FRESH_BLOCKS, seed + _SPILL_SETS + turn))
            space.put(fresh, content[:_FRESH_BLOCKS], timeout_s=_TIMEOUT_S)


def _say_ready() -> None:
    click.echo("busy")
    sys.stdout.flush()


if __name__ == "__main__":
    _jobs = {"calls": keep_calling, "spill": keep_spilling}
    _jobs[sys.argv[1]](sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
