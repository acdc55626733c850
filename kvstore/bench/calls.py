"""How long calls take that move no bytes: one key, 8,192 keys, hashing, and one key beside busy neighbours."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvstore.bench import worker
from kvstore.bench.echo import Echo
from kvstore.bench.figures import Result, Value, latency_figures
from kvstore.bench.memory import kv_like_blocks
from kvstore.bench.neighbour import BLOCK_NBYTES, neighbour_name
from kvstore.bench.neighbours import neighbours
from kvstore.bench.scale import Scale
from kvstore_client import Client, Keys, Namespace

_TIMEOUT_S = 30.0
_NEIGHBOURS = 3
_HASHED_TOKENS = 131_072
_HASH_ROUNDS = 9
_MATCH_ROUNDS = 60
_BUSY_SPAN_S = 5.0


class Calls:
    """Calls of one session. `store` comes first and leaves `batch_keys` blocks of 16 KiB behind."""

    def __init__(self, address: str, scale: Scale) -> None:
        self._address = address
        self._scale = scale

    def store(self, client: Client) -> tuple[Namespace, Keys]:
        """(namespace, keys) of a prefix that is stored whole."""
        space = worker.namespace(client, BLOCK_NBYTES, "calls")
        keys = space.keys(worker.tokens(self._scale.batch_keys))
        space.put(keys, kv_like_blocks(len(keys), BLOCK_NBYTES), timeout_s=_TIMEOUT_S)
        found = space.match(keys, timeout_s=_TIMEOUT_S).blocks
        if found != len(keys):
            raise worker.NotSettled(f"{found} of {len(keys)} blocks are stored")
        return space, keys

    def clear(self, client: Client) -> None:
        """Leave nothing behind, of the neighbours either."""
        for name in ("calls", *map(neighbour_name, range(_NEIGHBOURS))):
            worker.namespace(client, BLOCK_NBYTES, name).clear()

    def one_key(self, name: str, space: Namespace, keys: Keys) -> Result:
        """A match of one key, again and again, by whichever transport the client has."""
        one = keys[:1]
        with Echo() as echo:
            bare_s = _timed(echo, self._scale.calls)
        taken_s = _timed(lambda: space.match(one, timeout_s=_TIMEOUT_S), self._scale.calls)
        return Result(name, {**latency_figures(taken_s), **_bare(bare_s)})

    def many_keys(self, name: str, space: Namespace, keys: Keys) -> Result:
        """A match of the whole prefix, all of it present."""
        rounds = min(self._scale.calls, _MATCH_ROUNDS)
        figures = latency_figures(_timed(lambda: space.match(keys, timeout_s=_TIMEOUT_S), rounds))
        return Result(name, {**figures, "keys": len(keys)})

    def hashing(self, name: str, space: Namespace) -> Result:
        """Keys of a prompt of 131,072 tokens, from a list."""
        prompt = worker.tokens(_HASHED_TOKENS // worker.BLOCK_TOKENS)
        return Result(
            name, {**latency_figures(_timed(lambda: space.keys(prompt), _HASH_ROUNDS), "ms"), "tokens": _HASHED_TOKENS}
        )

    def beside_neighbours(self, name: str, space: Namespace, keys: Keys) -> Result:
        """A match of one key while three other processes keep the daemon busy."""
        one, taken_s, bare_s = keys[:1], [], []
        with Echo() as echo, neighbours("calls", self._address, self._scale.batch_keys, _NEIGHBOURS):
            ends = time.monotonic() + (_BUSY_SPAN_S if self._scale.is_full else 1.0)
            while time.monotonic() < ends:
                taken_s += _timed(lambda: space.match(one, timeout_s=_TIMEOUT_S), 1)
                time.sleep(0.001)  # a worker does something between its calls
                bare_s += _timed(echo, 1)
                time.sleep(0.001)
        return Result(name, {**latency_figures(taken_s), **_bare(bare_s), "neighbours": _NEIGHBOURS})


def _bare(taken_s: list[float]) -> dict[str, Value]:
    """An echo's figures, beside those of the calls that were made in turn with it."""
    return {f"echo_{name}": value for name, value in latency_figures(taken_s).items() if name.endswith("_us")}


def _timed(call: Callable[[], object], times: int) -> list[float]:
    taken_s = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken_s.append(time.perf_counter() - started)
    return taken_s
