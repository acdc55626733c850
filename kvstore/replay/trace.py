"""Traces of requests: which blocks each one asked for.

A trace is JSONL: `timestamp` (milliseconds, or a string of nanoseconds), `input_length`, `output_length` (tokens) and
`hash_ids`, one id a block. Ids are chained again by prefix, so that a block is its whole prefix whatever the ids of the
file mean; the key of a block is a SHA-256 over its parent's key and its id, as everywhere in the daemon.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

NS_PER_MS = 1_000_000


class Request(NamedTuple):
    """One request.

    Attributes:
        time_s: since the first request.
        keys: 32-byte keys of all its blocks, from the root on.
        full: how many of them are full; only a last one may not be, and it is never stored.
        tokens: of the prompt.
    """

    time_s: float
    keys: list[bytes]
    full: int
    tokens: int


@dataclass(eq=False)
class Trace:
    """Requests in the order of their arrival. `block_tokens` is 0 where the trace does not say."""

    name: str
    block_tokens: int
    requests: list[Request] = field(default_factory=list)

    @cached_property
    def references(self) -> int:
        """Blocks asked for, the partial ones too."""
        return sum(len(request.keys) for request in self.requests)

    @cached_property
    def unique(self) -> int:
        """Different blocks."""
        return len({key for request in self.requests for key in request.keys})


class Chain:
    """Gives ids the keys of their prefixes. The seed changes every key and nothing else."""

    def __init__(self, seed: int = 0) -> None:
        self._root = hashlib.sha256(b"replay %d" % seed).digest()
        self._known: dict[tuple[bytes, object], bytes] = {}

    def keys(self, ids: Iterable[object]) -> list[bytes]:
        """One key an id."""
        known, parent, found = self._known, self._root, []
        for name in ids:
            key = known.get((parent, name))
            if key is None:
                key = known[parent, name] = hashlib.sha256(parent + repr(name).encode()).digest()
            found.append(key)
            parent = key
        return found


def load(path: Path, block_tokens: int = 0, seed: int = 0, progress: Callable[[int], None] | None = None) -> Trace:
    """Read a trace. `progress` is told the bytes of every line.

    Raises:
        ValueError: a line is no request; the message names it.
        OSError: the file cannot be read.
    """
    trace, chain, start_ns = Trace(path.stem, block_tokens), Chain(seed), None
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    time_ns, tokens, ids = _parse(line)
                    start_ns = time_ns if start_ns is None else start_ns
                    time_s = max(0, time_ns - start_ns) / 1e9
                # Overflow: a time that is infinite, or that no float holds. Recursion: a list in a list in a list ...
                except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                    raise ValueError(f"{path}:{number} is no request of a trace: {error!r}") from error
                trace.requests.append(made(chain, time_s, ids, tokens, block_tokens))
            if progress is not None:
                progress(len(line))
    if not trace.references:
        raise ValueError(f"{path} asks for no block at all")
    return trace


def made(chain: Chain, time_s: float, ids: list[object], tokens: int, block_tokens: int) -> Request:
    """A request; its last block is partial where so many blocks would have more tokens than it has."""
    partial = bool(block_tokens and ids) and len(ids) * block_tokens > tokens
    return Request(time_s, chain.keys(ids), len(ids) - partial, tokens)


def lines(requests: Iterable[Mapping[str, object]]) -> Iterator[str]:
    """Requests as lines of a trace file."""
    for request in requests:
        yield json.dumps(request, separators=(",", ":")) + "\n"


def _parse(line: bytes) -> tuple[int, int, list[object]]:
    given = json.loads(line)
    stamp, ids = given["timestamp"], given["hash_ids"]
    time_ns = int(stamp) if isinstance(stamp, str) else round(stamp * NS_PER_MS)
    if not isinstance(ids, list) or not all(isinstance(name, int | str) for name in ids):
        raise ValueError("hash_ids must be a list of numbers or strings")
    tokens = given["input_length"]
    if not isinstance(tokens, int) or tokens < 0:
        raise ValueError("input_length must be a number of tokens")
    return time_ns, tokens, ids
