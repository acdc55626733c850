"""Blocks whose bytes follow from their key, so that any mix-up is seen: of blocks, namespaces, sessions, restarts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from kvstore_client import Client, Keys, KVLayout, Namespace, TensorSpec

BLOCK_TOKENS = 16
BLOCK_NBYTES = 64 << 10


def layout_of(block_nbytes: int, dtype: str = "bfloat16") -> KVLayout:
    """K and V of one layer with a head as wide as it takes."""
    width = block_nbytes // (2 * BLOCK_TOKENS * TensorSpec("x", dtype, (1,), "x").item_nbytes)
    return KVLayout([TensorSpec("kv", dtype, (2, 1, BLOCK_TOKENS, 1, width), "kv layer token head dim")])


def namespace(client: Client, model: str, block_nbytes: int = BLOCK_NBYTES, **fields: object) -> Namespace:
    """A namespace of blocks of a given size."""
    wanted = {"revision": "1", "block_tokens": BLOCK_TOKENS, "layout": layout_of(block_nbytes), **fields}
    return client.namespace(model=model, **wanted)  # type: ignore[arg-type]


def tokens(blocks: int, seed: int = 0) -> list[int]:
    """Tokens of so many blocks; another seed gives other keys from the first block on."""
    first = (seed + 1) * 1_000_003
    return [(first + 31 * index) % (1 << 32) for index in range(blocks * BLOCK_TOKENS)]


def chain(space: Namespace, blocks: int, seed: int = 0) -> Keys:
    """Keys of a prefix."""
    return space.keys(tokens(blocks, seed))


def content(key: bytes, nbytes: int) -> NDArray[np.uint8]:
    """What belongs under a key: noise for mantissas, a few exponents, as real keys and values have."""
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(key, "little")))
    raw = np.frombuffer(generator.bytes(nbytes), np.uint8).copy()
    raw[1::2] = raw[1::2] & 0x83 | 0x3C
    return raw


def contents(keys: Keys | Iterable[bytes], nbytes: int = BLOCK_NBYTES) -> NDArray[np.uint8]:
    """(n, nbytes): what belongs under each of the keys."""
    rows = [content(key, nbytes) for key in keys]
    return np.stack(rows) if rows else np.empty((0, nbytes), np.uint8)


def wrong(keys: Keys | Iterable[bytes], rows: NDArray[np.uint8]) -> list[int]:
    """Positions at which the bytes are not those that belong under the key."""
    return [at for at, (key, row) in enumerate(zip(keys, rows, strict=False)) if (row != content(key, len(row))).any()]


def fetch(space: Namespace, keys: Keys, timeout_s: float = 30.0) -> tuple[int, list[int]]:
    """Read the stored prefix of some keys: how many blocks came, and at which positions they were wrong."""
    out = np.zeros((len(keys), space.block_nbytes), np.uint8)
    with space.acquire(keys, timeout_s) as lease:
        count = lease.read_into(out[: max(lease.blocks, 1)], timeout_s=timeout_s)
    assert not out[count:].any(), "bytes were written beyond the blocks that were reported"
    return count, wrong(keys, out[:count])
