"""What is not about reading, storing or failing: match, prefetch, delete, clear, ping."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from derived import chain, contents, fetch, namespace, tokens
from kvstore_client import Client, InvalidRequest, Keys, Match, Namespace
from kvstore_client.testing import FakeDaemon

BLOCK_NBYTES = 16 << 10


def test_match_by_tier(daemon: FakeDaemon, ns: Namespace) -> None:
    keys = chain(ns, 8)
    assert ns.match(keys) == Match(0, 0, {"hot": 0, "warm": 0, "cold": 0})
    ns.put(keys[:6], contents(keys[:6], BLOCK_NBYTES))
    daemon.chill(keys[4:6])
    assert ns.match(keys) == Match(6, 96, {"hot": 0, "warm": 4, "cold": 2})
    assert not daemon.store.leases, "pins nothing"


def test_prefetch_loads(daemon: FakeDaemon, ns: Namespace) -> None:
    keys = chain(ns, 4)
    ns.put(keys, contents(keys, BLOCK_NBYTES))
    daemon.chill(keys[2:])
    assert ns.prefetch(keys) == 2
    daemon.load()
    assert ns.match(keys).by_tier["cold"] == 0
    assert fetch(ns, keys) == (4, [])


def test_delete_takes_what_hangs_on_a_block(ns: Namespace) -> None:
    keys = chain(ns, 6)
    ns.put(keys, contents(keys, BLOCK_NBYTES))
    assert ns.delete(keys[2:3]) == 4
    assert ns.match(keys).blocks == 2
    assert ns.delete(keys[2:3]) == 0


def test_clear_is_for_one_namespace(client: Client, ns: Namespace) -> None:
    other = namespace(client, "other", BLOCK_NBYTES)
    for space in (ns, other):
        keys = chain(space, 3)
        space.put(keys, contents(keys, BLOCK_NBYTES))
    assert ns.clear() == 1
    assert (ns.match(chain(ns, 3)).blocks, other.match(chain(other, 3)).blocks) == (0, 3)


def test_keys_extend_and_take_extras(ns: Namespace) -> None:
    prompt = tokens(5)
    whole = ns.keys([*prompt, 1, 2, 3])
    assert len(whole) == 5
    assert ns.keys(prompt[:50]).extend(prompt[50:]) == ns.keys(prompt)
    image = ns.keys(prompt, extra=[(20, b"image")])
    assert (image[0], image[1] == whole[1]) == (whole[0], False)
    assert isinstance(whole[1:3], Keys)
    with pytest.raises(InvalidRequest, match=r"token_ids\[2\]"):
        ns.keys([1, 2, -3])


def test_ping_and_repr(client: Client, ns: Namespace) -> None:
    assert 0 < client.ping() < 60
    assert "unix:" in repr(client)
    assert "model" in repr(ns)


def test_the_name_is_shown(daemon: FakeDaemon, new_client: Callable[..., Client]) -> None:
    new_client(name="worker 3")
    new_client()
    names = [session.name for session in daemon.store.sessions.values()]
    assert names[0] == "worker 3"
    assert names[1].startswith("pid ")


def test_one_client_serves_many_threads(ns: Namespace) -> None:
    keys = chain(ns, 30)
    ns.put(keys, contents(keys, BLOCK_NBYTES))

    def work(seed: int) -> bool:
        mine = chain(ns, 10, seed + 1)
        for _ in range(5):
            ns.put(mine, contents(mine, BLOCK_NBYTES), 30.0)
            if fetch(ns, keys) != (30, []) or fetch(ns, mine) != (10, []) or ns.match(keys, 30.0).blocks != 30:
                return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
