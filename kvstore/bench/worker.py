"""One attached benchmark session: namespaces of a given block size, and waits on the daemon's own counters."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvstore_client import Client, Keys, KVLayout, Namespace, PutStatus, TensorSpec

BLOCK_TOKENS = 16
_SETTLE_TIMEOUT_S = 60.0
_POLL_S = 0.05
_PUT_TRIES = 5

# Layers that give a block of 16 tokens, 8 heads of 128 in bfloat16 the size wanted.
_LAYERS = {2 << 20: 32, 256 << 10: 4, 64 << 10: 1}


class IncompleteTransfer(RuntimeError):
    """The daemon did not take or give every block, so that the time taken means nothing."""


class NotSettled(TimeoutError):
    """The daemon did not come to rest in time, so that there is nothing to measure."""


def namespace(client: Client, block_nbytes: int, name: str, kind: Literal["chain", "set"] = "chain") -> Namespace:
    """A namespace of 16-token blocks of `block_nbytes`."""
    layers = _LAYERS.get(block_nbytes)
    shape = (2, layers, BLOCK_TOKENS, 8, 128) if layers else (2, 1, BLOCK_TOKENS, 1, block_nbytes // 64)
    layout = KVLayout([TensorSpec("kv", "bfloat16", shape, "kv layer token head dim")])
    return client.namespace(
        model=f"bench/{name}",
        revision="1",
        block_tokens=BLOCK_TOKENS,
        kind=kind,
        layout=layout,
        identity={"for": "bench"},
    )


def tokens(blocks: int, seed: int = 0) -> list[int]:
    """Token ids of a prefix of `blocks` blocks; another seed gives another prefix from its first block on."""
    first = (seed + 1) * 7919
    return [(first + 31 * index) % 128_000 for index in range(blocks * BLOCK_TOKENS)]


def put_all(space: Namespace, keys: Keys, blocks: NDArray[np.uint8], timeout_s: float) -> None:
    """Store every block, in as many puts as that takes.

    Raises:
        IncompleteTransfer: several in a row stored nothing; the message has what they said.
    """
    done = tries = 0
    while done < len(keys):
        outcomes = space.put(keys[done:], blocks[done:], timeout_s=timeout_s)
        stored = next((at for at, one in enumerate(outcomes) if one.status is PutStatus.REJECTED), len(outcomes))
        done, tries = done + stored, 0 if stored else tries + 1
        if tries == _PUT_TRIES:
            raise IncompleteTransfer(f"{done} of {len(keys)} blocks were stored, then {outcomes[0]}")


def tier(client: Client, name: str, counter: str) -> int:
    """One counter of a tier."""
    return int(client.stats()["tiers"][name][counter])


def wait_until(is_done: Callable[[], bool], what: str, timeout_s: float = _SETTLE_TIMEOUT_S) -> None:
    """Poll until `is_done`.

    Raises:
        NotSettled: it was not within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not is_done():
        if time.monotonic() > deadline:
            raise NotSettled(f"waited {timeout_s:g} s for {what}")
        time.sleep(_POLL_S)


def wait_steady(read: Callable[[], int], what: str, steady_s: float = 0.5) -> int:
    """Poll until a counter has not moved for `steady_s`; returns it."""
    last, since = read(), time.monotonic()

    def is_steady() -> bool:
        nonlocal last, since
        now = read()
        if now != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since >= steady_s

    wait_until(is_steady, what)
    return last


def wait_populated(client: Client) -> int:
    """Until the warm pool has made and touched all it is going to; returns the bytes."""
    return wait_steady(lambda: tier(client, "warm", "populated_bytes"), "the warm pool to be populated")


def clear_and_wait(client: Client, space: Namespace, used_before: int = 0) -> None:
    """Drop a namespace's blocks and wait until warm holds no more than before and nothing is on its way to cold."""
    space.clear()
    wait_until(lambda: tier(client, "warm", "used_bytes") <= used_before, "the warm pool to let go of what was cleared")
    wait_steady(lambda: tier(client, "cold", "writes"), "the cold tier to come to rest", steady_s=0.2)
