"""Every method of the client against the real daemon, over the local RPC and over gRPC."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from daemon_process import DaemonProcess
from derived import BLOCK_NBYTES, BLOCK_TOKENS, chain, content, contents, fetch, namespace, tokens, wrong
from kvstore_client import (
    EXISTS,
    REJECTED,
    STORED,
    Client,
    InvalidRequest,
    Keys,
    KVLayout,
    LeaseExpired,
    Namespace,
    NotFound,
    RejectReason,
    TensorSpec,
)
from polling import eventually

BLOCKS = 12
WAIT_S = 30.0
STAGING_BYTES = 16 << 20


@pytest.fixture
def client(served: DaemonProcess, transport: str) -> Iterator[Client]:
    with Client(served.address, transport=transport, staging_bytes=STAGING_BYTES) as made:  # type: ignore[arg-type]
        yield made


@pytest.fixture
def other(served: DaemonProcess) -> Iterator[Client]:
    """A second session of the same tenant."""
    with Client(served.address, staging_bytes=0) as made:
        yield made


@pytest.fixture
def space(client: Client, request: pytest.FixtureRequest) -> Namespace:
    """An empty namespace of the test's own."""
    return namespace(client, request.node.name)


@pytest.fixture
def stored(space: Namespace) -> Keys:
    """Keys of a stored prefix."""
    return store(space, chain(space, BLOCKS))


def store(space: Namespace, keys: Keys) -> Keys:
    assert space.put(keys, contents(keys, space.block_nbytes), timeout_s=WAIT_S) == [STORED] * len(keys)
    return keys


def empty(blocks: int, nbytes: int = BLOCK_NBYTES) -> NDArray[np.uint8]:
    return np.zeros((blocks, nbytes), np.uint8)


# -- put, match, exists


def test_what_was_put_is_found_and_read(space: Namespace) -> None:
    keys = chain(space, BLOCKS)
    assert space.match(keys).blocks == 0
    store(space, keys)
    found = space.match(keys)
    assert (found.blocks, found.tokens) == (BLOCKS, BLOCKS * BLOCK_TOKENS)
    assert found.by_tier == {"hot": 0, "warm": BLOCKS, "cold": 0}
    assert space.exists(keys) == [True] * BLOCKS
    out = empty(BLOCKS)
    with space.acquire(keys) as lease:
        assert (lease.blocks, lease.tokens, lease.ready) == (BLOCKS, BLOCKS * BLOCK_TOKENS, BLOCKS)
        assert lease.read_into(out, verify=True) == BLOCKS
    assert not wrong(keys, out)


def test_a_second_put_says_that_the_blocks_exist_and_changes_nothing(space: Namespace, stored: Keys) -> None:
    others = chain(space, BLOCKS + 2)
    assert space.put(others, np.zeros((BLOCKS + 2, BLOCK_NBYTES), np.uint8)) == [EXISTS] * BLOCKS + [STORED] * 2
    assert fetch(space, stored) == (BLOCKS, [])


def test_only_the_longest_stored_prefix_matches(space: Namespace, stored: Keys) -> None:
    longer = chain(space, BLOCKS + 5)
    assert space.match(longer).blocks == BLOCKS
    assert space.exists(longer) == [True] * BLOCKS + [False] * 5
    branched = space.keys(tokens(4) + tokens(4, seed=1))
    assert space.match(branched).blocks == 4
    with space.acquire(branched) as lease:
        assert lease.blocks == 4
        assert lease.tokens == 4 * BLOCK_TOKENS
    assert fetch(space, longer) == (BLOCKS, [])


def test_keys_mid_prefix_know_their_parent(space: Namespace) -> None:
    keys = chain(space, BLOCKS)
    assert space.put(keys[5:], contents(keys[5:])) == [REJECTED(RejectReason.NO_PARENT)] * (BLOCKS - 5)
    store(space, keys[:5])
    store(space, keys[5:9])
    store(space, keys[9:])
    assert space.match(keys).blocks == BLOCKS
    assert space.match(keys[3:7]).blocks == 4
    with space.acquire(keys[3:7]) as lease:
        out = empty(4)
        lease.read_into(out)
    assert not wrong(keys[3:7], out)


def test_keys_that_are_extended_are_those_of_the_whole(space: Namespace, stored: Keys) -> None:
    begun = space.keys(tokens(BLOCKS)[: 5 * BLOCK_TOKENS + 3])
    whole = begun.extend(tokens(BLOCKS)[5 * BLOCK_TOKENS + 3 :])
    assert whole == stored
    assert space.match(whole).blocks == BLOCKS


def test_extra_keys_keep_images_apart(space: Namespace) -> None:
    def with_image(name: bytes) -> Keys:
        return space.keys(tokens(6), extra=[(40, name)])

    first = store(space, with_image(b"image-a"))
    assert space.match(with_image(b"image-b")).blocks == 2, "the image begins in the third block"
    assert space.match(space.keys(tokens(6))).blocks == 2
    store(space, with_image(b"image-b")[2:])
    assert fetch(space, first) == (6, [])
    assert fetch(space, with_image(b"image-b")) == (6, [])


def test_a_set_needs_no_order(client: Client, request: pytest.FixtureRequest) -> None:
    space = namespace(client, request.node.name, kind="set")
    names = b"".join(number.to_bytes(36, "big") for number in range(BLOCKS))
    keys = Keys.from_digests(names, size=36)
    some = Keys.from_bytes(b"".join(keys[at] for at in (7, 2, 10)))
    store(space, some)
    assert [at for at, is_there in enumerate(space.exists(keys)) if is_there] == [2, 7, 10]
    assert space.match(keys).blocks == 0
    assert fetch(space, some) == (3, [])
    store(space, Keys.from_bytes(b"".join(keys[at] for at in range(BLOCKS) if at not in (7, 2, 10))))
    assert fetch(space, keys) == (BLOCKS, [])
    assert space.delete(keys[3]) == 1
    assert space.exists(keys) == [at != 3 for at in range(BLOCKS)]


def test_the_same_key_twice_in_a_put_is_stored_once(client: Client, request: pytest.FixtureRequest) -> None:
    space = namespace(client, request.node.name, kind="set")
    key = chain(space, 1)[0]
    assert space.put(key * 2, contents([key, key])) == [STORED, EXISTS]
    assert fetch(space, Keys.from_bytes(key * 2)) == (2, [])


def test_blocks_come_as_an_array_a_list_or_segments(space: Namespace) -> None:
    half = BLOCK_NBYTES // 2

    def forms(rows: NDArray[np.uint8]) -> Iterator[object]:
        yield rows
        yield list(rows)
        yield [[row[:half], row[half:]] for row in rows]
        yield [[(row.ctypes.data, half), (row.ctypes.data + half, half)] for row in rows]
        yield torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
        yield rows.tobytes()

    for seed, _ in enumerate(forms(empty(4))):
        keys = chain(space, 4, seed)
        rows = contents(keys)  # addresses do not keep it alive
        assert space.put(keys, list(forms(rows))[seed]) == [STORED] * 4
        assert fetch(space, keys) == (4, [])


# -- staging


def test_staged_buffers_are_put_without_a_copy(space: Namespace) -> None:
    first, second = chain(space, 6), chain(space, 8, seed=1)
    with space.stage(8) as buffers:
        assert (len(buffers), buffers.array.shape) == (8, (8, BLOCK_NBYTES))
        for row, key in zip(buffers, first, strict=False):
            row[:] = content(key, BLOCK_NBYTES)
        assert buffers.put(first) == [STORED] * 6
        buffers.array[:] = contents(second)
        assert buffers.put(second) == [STORED] * 8
        with pytest.raises(InvalidRequest, match="9 keys for 8 staged buffers"):
            buffers.put(chain(space, 9))
    with pytest.raises(InvalidRequest, match="inside the stage"):
        buffers.put(first)
    assert fetch(space, first) == (6, [])
    assert fetch(space, second) == (8, [])


def test_more_than_staging_holds_goes_through_it(served: DaemonProcess, space: Namespace, transport: str) -> None:
    with Client(served.address, transport=transport, staging_bytes=1 << 20) as small:  # type: ignore[arg-type]
        own = namespace(small, space.spec.model)
        keys = store(own, chain(own, 100))
        with pytest.raises(InvalidRequest, match=r"stage\(100\): at most 16 blocks"):
            own.stage(100)
        with own.stage(16) as held:
            busy = own.put(chain(own, 2, seed=1), contents(chain(own, 2, seed=1)), timeout_s=0.2)
            assert busy == [REJECTED(RejectReason.STAGING_BUSY)] * 2 or busy == [REJECTED(RejectReason.DEADLINE)] * 2
            assert len(held) == 16
    assert fetch(space, keys) == (100, [])


# -- leases


def test_ranges_of_a_lease_are_read_one_by_one(space: Namespace, stored: Keys) -> None:
    with space.acquire(stored) as lease:
        out = empty(4)
        for start in range(0, BLOCKS, 4):
            assert lease.read_into(out, start, start + 4) == 4
            assert not wrong(stored[start : start + 4], out)
        assert lease.read_into(empty(BLOCKS), BLOCKS) == 0
        with pytest.raises(InvalidRequest, match=r"blocks \[3, 13\) were asked for"):
            lease.read_into(empty(10), 3, 13)


def test_blocks_are_read_into_an_array_a_list_or_segments(space: Namespace, stored: Keys) -> None:
    half, rows = BLOCK_NBYTES // 2, empty(BLOCKS)
    forms: list[object] = [
        rows,
        list(rows),
        [[row[:half], row[half:]] for row in rows],
        [[(row.ctypes.data, half), (row.ctypes.data + half, half)] for row in rows],
        torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16),
    ]
    with space.acquire(stored) as lease:
        for out in forms:
            rows[:] = 0
            assert lease.read_into(out, verify=True) == BLOCKS
            assert not wrong(stored, rows)


def test_views_are_the_blocks_where_they_lie(space: Namespace, stored: Keys) -> None:
    with space.acquire(stored) as lease:
        for at, key in enumerate(stored):
            view = lease.view(at)
            assert not view.flags.writeable
            assert (view == content(key, BLOCK_NBYTES)).all()
        lease.check()
    with pytest.raises(LeaseExpired):
        lease.view(0)
    with pytest.raises(LeaseExpired):
        lease.check()


def test_tensors_have_names_shapes_and_types(client: Client, request: pytest.FixtureRequest) -> None:
    layout = KVLayout(
        [
            TensorSpec("latent", "bfloat16", (4, BLOCK_TOKENS, 64), "layer token head"),
            TensorSpec("rope", "float32", (4, BLOCK_TOKENS, 8), "layer token head"),
            TensorSpec("index", "float8_e4m3", (BLOCK_TOKENS, 128), "token head"),
        ]
    )
    space = namespace(client, request.node.name, layout=layout)
    key = store(space, chain(space, 1))[0]
    raw = content(key, space.block_nbytes)
    with space.acquire(key) as lease:
        arrays, tensors = lease.tensors(0), lease.tensors(0, framework="torch")
        assert {name: (array.dtype, array.shape) for name, array in arrays.items()} == {
            "latent": (np.dtype("uint16"), (4, 16, 64)),
            "rope": (np.dtype("float32"), (4, 16, 8)),
            "index": (np.dtype("uint8"), (16, 128)),
        }
        assert b"".join(array.tobytes() for array in arrays.values()) == raw.tobytes()
        assert [tensor.dtype for tensor in tensors.values()] == [torch.bfloat16, torch.float32, torch.float8_e4m3fn]
        for name, tensor in tensors.items():
            bits = tensor.contiguous().view(torch.uint8).numpy()
            assert bits.tobytes() == arrays[name].tobytes()
        lease.check()


def test_a_lease_on_nothing_reads_nothing(space: Namespace) -> None:
    with space.acquire(chain(space, 3)) as lease:
        assert (lease.blocks, lease.tokens, lease.ready, lease.wait()) == (0, 0, 0, 0)
        assert lease.read_into(empty(3)) == 0
        with pytest.raises(InvalidRequest, match="cannot be handed off"):
            lease.handoff()


def test_wait_says_how_many_are_readable(space: Namespace, stored: Keys) -> None:
    with space.acquire(stored) as lease:
        assert lease.wait(4) == BLOCKS
        assert lease.wait() == BLOCKS
        with pytest.raises(InvalidRequest, match="given for 12 blocks"):
            lease.wait(BLOCKS + 1)


def test_pins_are_given_back_early_and_at_the_end(served: DaemonProcess, space: Namespace, stored: Keys) -> None:
    def pinned() -> int:
        return sum(session.pinned_blocks for session in served.sessions())

    with space.acquire(stored) as lease:
        assert pinned() == BLOCKS
        lease.release_to(8)
        eventually(lambda: pinned() == BLOCKS - 8, "eight pins to go")
        assert lease.read_into(empty(4), 8) == 4
        with pytest.raises(InvalidRequest, match=r"this lease has \[8, 12\)"):
            lease.read_into(empty(4), 7)
        lease.release_to(3)
        assert pinned() == BLOCKS - 8, "to give back less than before gives nothing back"
    eventually(lambda: pinned() == 0, "every pin to go")


def test_a_lease_that_is_forgotten_is_released(served: DaemonProcess, space: Namespace, stored: Keys) -> None:
    lease = space.acquire(stored)
    assert served.stats().leases == 1
    del lease
    eventually(lambda: served.stats().leases == 0, "the lease to be released")
    assert fetch(space, stored) == (BLOCKS, [])


def test_a_lease_is_handed_off_once(space: Namespace, stored: Keys, other: Client) -> None:
    lease = space.acquire(stored)
    token = lease.handoff()
    with pytest.raises(LeaseExpired, match="handed off"):
        lease.read_into(empty(BLOCKS))
    theirs = namespace(other, space.spec.model)
    with theirs.adopt(token) as adopted:
        assert (adopted.blocks, adopted.tokens) == (BLOCKS, BLOCKS * BLOCK_TOKENS)
        out = empty(BLOCKS)
        adopted.read_into(out, verify=True)
        assert not wrong(stored, out)
        with pytest.raises(NotFound, match="single use"):
            theirs.adopt(token)
    with pytest.raises(NotFound, match="single use"):
        theirs.adopt(bytes(16))


# -- several namespaces


@pytest.fixture
def ranks(client: Client, request: pytest.FixtureRequest) -> list[Namespace]:
    """Two ranks of one model, of different block size."""
    model = request.node.name
    return [
        namespace(client, model, shard={"tp": (0, 2)}),
        namespace(client, model, 2 * BLOCK_NBYTES, shard={"tp": (1, 2)}),
    ]


def test_a_lease_on_several_ranks_ends_where_the_shortest_does(client: Client, ranks: list[Namespace]) -> None:
    keys = [chain(space, BLOCKS) for space in ranks]
    store(ranks[0], keys[0])
    with client.acquire([(ranks[0], keys[0], "prefix"), (ranks[1], keys[1], "prefix")]) as lease:
        assert (lease.blocks, [group.blocks for group in lease.groups]) == (0, [0, 0])
    store(ranks[1], keys[1][:7])
    with client.acquire([(ranks[0], keys[0], "prefix"), (ranks[1], keys[1], "prefix")], timeout_s=1.0) as lease:
        assert [group.blocks for group in lease.groups] == [7, 7]
        assert lease.tokens == 7 * BLOCK_TOKENS
        for group, space, mine in zip(lease.groups, ranks, keys, strict=True):
            out = empty(7, space.block_nbytes)
            assert group.read_into(out, verify=True) == 7
            assert not wrong(mine[:7], out)


def test_a_checkpoint_counts_where_prefix_and_last_meet(client: Client, request: pytest.FixtureRequest) -> None:
    model = request.node.name
    attention = namespace(client, model, identity={"pool": "attention"})
    state = namespace(client, model, 2 * BLOCK_NBYTES, kind="set", block_tokens=64, identity={"pool": "state"})
    mine, states = chain(attention, BLOCKS), state.keys(tokens(BLOCKS))
    store(attention, mine[:10])
    at_two = Keys.from_bytes(states[1])
    store(state, at_two)
    store(state, Keys.from_bytes(states[2]))
    with client.acquire([(attention, mine, "prefix"), (state, states, "last")]) as lease:
        assert lease.tokens == 2 * 64, "the checkpoint at 192 tokens lies beyond the ten attention blocks"
        prefix, last = lease.groups
        assert (prefix.first, prefix.blocks, last.first, last.blocks) == (0, 8, 1, 2)
        out = empty(1, state.block_nbytes)
        assert last.read_into(out) == 1
        assert not wrong(at_two, out)
        out = empty(8)
        assert lease.read_into(out) == 8
        assert not wrong(mine, out)


# -- prefetch, delete, clear


def test_prefetch_of_warm_blocks_has_nothing_to_load(space: Namespace, stored: Keys) -> None:
    assert space.prefetch(stored) == 0
    assert space.prefetch(chain(space, 3, seed=9)) == 0


def test_delete_takes_what_hangs_on_a_block(space: Namespace, stored: Keys) -> None:
    assert space.delete(stored[8]) == 4
    assert space.match(stored).blocks == 8
    assert space.delete(stored[8:]) == 0
    store(space, stored[8:])
    assert fetch(space, stored) == (BLOCKS, [])


def test_deleting_leased_blocks_leaves_the_reader_its_bytes(space: Namespace, stored: Keys) -> None:
    with space.acquire(stored) as lease:
        assert space.delete(stored[0]) == BLOCKS
        assert space.match(stored).blocks == 0
        store(space, chain(space, BLOCKS, seed=3))
        out = empty(BLOCKS)
        assert lease.read_into(out, verify=True) == BLOCKS
        assert not wrong(stored, out)


def test_clear_forgets_every_block_at_once(space: Namespace, stored: Keys) -> None:
    first = space.clear()
    assert space.match(stored).blocks == 0
    assert space.exists(stored) == [False] * BLOCKS
    assert space.put(stored, contents(stored) ^ np.uint8(0xFF)) == [STORED] * BLOCKS, "new weights, new bytes"
    with space.acquire(stored) as lease:
        out = empty(BLOCKS)
        lease.read_into(out, verify=True)
    assert not wrong(stored, out ^ np.uint8(0xFF))
    assert space.clear() == first + 1


# -- the daemon itself


def test_stats_and_ping(client: Client, space: Namespace, stored: Keys) -> None:
    before = client.stats()
    assert before["health"] == "serving"
    assert set(before["tiers"]) == {"hot", "warm", "cold"}
    assert fetch(space, stored)[0] == BLOCKS
    after = client.stats()
    assert after["hit_blocks"] - before["hit_blocks"] == BLOCKS
    assert after["tiers"]["warm"]["hits"] - before["tiers"]["warm"]["hits"] == BLOCKS
    assert 0 < client.ping() < WAIT_S


def test_a_closed_client_says_so(served: DaemonProcess, space: Namespace, transport: str) -> None:
    with Client(served.address, transport=transport) as closing:  # type: ignore[arg-type]
        own = namespace(closing, space.spec.model)
    for call in (closing.ping, lambda: own.match(chain(space, 1)), lambda: own.put(chain(space, 1), empty(1))):
        with pytest.raises(InvalidRequest, match="this client is closed"):
            call()
    eventually(lambda: len(served.sessions()) == 1, "its session to end")


def test_threads_share_a_client(space: Namespace) -> None:
    """Regression: two callers' answers must never be swapped, nor their staging ranges."""
    failures: list[str] = []

    def work(seed: int) -> None:
        keys = chain(space, 8, seed)
        rows = contents(keys)
        for _ in range(5):
            outcomes = space.put(keys, rows, timeout_s=WAIT_S)
            if any(not outcome.is_stored for outcome in outcomes):
                failures.append(f"put {seed}: {outcomes}")
            if (seen := fetch(space, keys)) != (8, []):
                failures.append(f"get {seed}: {seen}")
            if space.match(keys, timeout_s=WAIT_S).blocks != 8:
                failures.append(f"match {seed}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
