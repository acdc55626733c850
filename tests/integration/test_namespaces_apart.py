"""Namespaces that differ in one field never meet: defects 4 and 11 of peers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from daemon_process import DaemonProcess
from derived import BLOCK_NBYTES, BLOCK_TOKENS, chain, contents, fetch, layout_of
from kvstore_client import STORED, Client, KVLayout, Namespace, TensorSpec

BLOCKS = 4
BASE: dict[str, Any] = {
    "model": "org/base",
    "revision": "1",
    "block_tokens": BLOCK_TOKENS,
    "kind": "chain",
    "layout": layout_of(BLOCK_NBYTES),
    "shard": {"tp": (0, 2)},
    "identity": {"weights": "bf16"},
    "salt": "",
}
WIDTH = BLOCK_NBYTES // 64


def one(name: str, shape: tuple[int, ...], axes: str) -> KVLayout:
    """A layout of one tensor."""
    return KVLayout([TensorSpec(name, "bfloat16", shape, axes)])


OTHERS: dict[str, dict[str, Any]] = {
    "model": {"model": "org/other"},
    "revision": {"revision": "2"},
    "block_tokens": {"block_tokens": 2 * BLOCK_TOKENS},
    "kind": {"kind": "set"},
    "dtype of equal size": {"layout": layout_of(BLOCK_NBYTES, "float16")},
    "dtype of other size": {"layout": layout_of(2 * BLOCK_NBYTES, "float32")},
    "name of a tensor": {"layout": one("k", (2, 1, 16, 1, WIDTH), "kv layer token head dim")},
    "order of the axes": {"layout": one("kv", (2, 16, 1, 1, WIDTH), "kv token layer head dim")},
    "names of the axes": {"layout": one("kv", (2, 1, 16, 1, WIDTH), "kv layer token group dim")},
    "shape of equal size": {"layout": one("kv", (2, 2, 16, 1, WIDTH // 2), "kv layer token head dim")},
    "a larger block": {"layout": layout_of(2 * BLOCK_NBYTES)},
    "tensors": {
        "layout": KVLayout(
            [TensorSpec(name, "bfloat16", (1, 16, 1, WIDTH), "layer token head dim") for name in ("k", "v")]
        )
    },
    "rank": {"shard": {"tp": (1, 2)}},
    "size of the group": {"shard": {"tp": (0, 4)}},
    "axis of the shard": {"shard": {"pp": (0, 2)}},
    "all ranks": {"shard": "all"},
    "value of the identity": {"identity": {"weights": "fp8"}},
    "key of the identity": {"identity": {"kv": "bf16"}},
    "more identity": {"identity": {"weights": "bf16", "rope": "yarn"}},
    "salt": {"salt": "tenant-a"},
}


@pytest.fixture(scope="module")
def client(served: DaemonProcess) -> Iterator[Client]:
    with Client(served.address, staging_bytes=16 << 20) as made:
        yield made


@pytest.fixture(scope="module")
def base(client: Client) -> Namespace:
    """A namespace with a stored prefix."""
    space = client.namespace(**BASE)
    keys = chain(space, BLOCKS)
    assert space.put(keys, contents(keys)) == [STORED] * BLOCKS
    return space


@pytest.mark.parametrize("field", OTHERS)
def test_what_differs_in_one_field_never_meets(client: Client, base: Namespace, field: str) -> None:
    mine = chain(base, BLOCKS)
    other = client.namespace(**{**BASE, **OTHERS[field]})
    assert other.digest != base.digest
    theirs = chain(other, BLOCKS)
    assert not set(theirs) & set(mine), "the same tokens must have other keys"
    for keys in (theirs, mine):  # its own keys, and even those of the other namespace
        assert other.match(keys).blocks == 0
        assert not any(other.exists(keys))
        assert fetch(other, keys) == (0, [])
    # The very keys of the other namespace, other bytes: each namespace goes on to serve its own.
    blocks = contents(mine, other.block_nbytes) ^ np.uint8(0xFF)
    assert other.put(mine, blocks) == [STORED] * BLOCKS
    with other.acquire(mine) as lease:
        out = np.zeros_like(blocks)
        assert lease.read_into(out, verify=True) == BLOCKS
    assert (out == blocks).all()
    assert fetch(base, mine) == (BLOCKS, [])
    assert other.clear() == 1
    assert fetch(base, mine) == (BLOCKS, [])


def test_what_is_the_same_meets(served: DaemonProcess, base: Namespace) -> None:
    """Peers' defect 13: keys must not depend on the process, the order of a map, or the type of a sequence."""
    layout = one("kv", (2, 1, 16, 1, WIDTH), "kv layer token head dim")
    with Client(served.address, transport="grpc", staging_bytes=0) as other:
        same = other.namespace(**{**BASE, "layout": layout, "shard": dict(BASE["shard"])})
        assert same.digest == base.digest
        assert fetch(same, chain(same, BLOCKS)) == (BLOCKS, [])


def test_the_order_of_maps_does_not_matter(client: Client) -> None:
    def space(*order: str) -> Namespace:
        values = {"a": "1", "b": "2"}
        shards = {"a": (0, 2), "b": (1, 4)}
        changed = {"identity": {name: values[name] for name in order}, "shard": {name: shards[name] for name in order}}
        return client.namespace(**{**BASE, **changed})

    first, second = space("a", "b"), space("b", "a")
    keys = chain(first, BLOCKS)
    assert first.put(keys, contents(keys)) == [STORED] * BLOCKS
    assert fetch(second, chain(second, BLOCKS)) == (BLOCKS, [])
