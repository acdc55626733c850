"""Traces made to break an order: each is easy for one rule and bad for another. The same seed gives the same trace."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from kvstore.replay.trace import Chain, Trace, made

_BLOCK_TOKENS = 16
_GAP_S = 0.1

Prompt = list[object]


def loops(rng: random.Random) -> Iterator[Prompt]:
    """400 documents of 12 blocks, read round and round: LRU hits nothing that does not fit as a whole."""
    documents = [_blocks(f"loop-{i}", 12) for i in range(400)]
    for _ in range(8):
        yield from documents


def bursts(rng: random.Random) -> Iterator[Prompt]:
    """Every prompt is read twice in quick succession and never again, beside a few that are read for ever.

    A rule that trusts what was used twice fills up with what is dead.
    """
    lasting = [_blocks(f"lasting-{i}", 10) for i in range(60)]
    waiting: list[Prompt] = []
    for i in range(1500):
        prompt = _blocks(f"burst-{i}", rng.randint(4, 16))
        waiting.append(prompt)
        yield prompt
        if len(waiting) > 5:
            yield waiting.pop(rng.randrange(len(waiting)))
        if i % 3 == 0:
            yield rng.choice(lasting)


def drift(rng: random.Random) -> Iterator[Prompt]:
    """What is popular changes slowly: uses of long ago say nothing, and frequency is worse than recency."""
    for i in range(4000):
        centre = i / 20
        chosen = int(rng.gauss(centre, 12))
        yield [*_blocks("system", 4), *_blocks(f"topic-{chosen}", 10)]


def alternating(rng: random.Random) -> Iterator[Prompt]:
    """Turns of growing conversations (recency is right), then passes over one-time prompts (it is wrong), in turns."""
    fixed = [_blocks(f"template-{i}", 14) for i in range(80)]
    talks: list[Prompt] = []
    for phase in range(8):
        for i in range(600):
            if phase % 2 == 0:
                if len(talks) < 40 or rng.random() < 0.1:
                    talks.append(_blocks(f"talk-{phase}-{i}", 4))
                talks = talks[-40:]
                at = rng.randrange(len(talks))
                talks[at] = [*talks[at], f"turn-{phase}-{i}"]
                yield talks[at]
            else:
                yield rng.choice(fixed) if i % 3 == 0 else _blocks(f"once-{phase}-{i}", 12)


WORKLOADS: dict[str, Callable[[random.Random], Iterator[Prompt]]] = {
    "loops": loops,
    "bursts": bursts,
    "drift": drift,
    "alternating": alternating,
}


def workload(name: str, seed: int = 0) -> Trace:
    """A made trace by its name, one of WORKLOADS. The seed changes the keys, and where there is chance, the requests.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}; there are {', '.join(WORKLOADS)}")
    chain = Chain(seed)
    prompts = WORKLOADS[name](random.Random(f"{name} {seed}"))
    trace = Trace(name, _BLOCK_TOKENS)
    for number, ids in enumerate(prompts):
        trace.requests.append(made(chain, number * _GAP_S, ids, len(ids) * _BLOCK_TOKENS, _BLOCK_TOKENS))
    return trace


def _blocks(name: str, count: int) -> Prompt:
    return [f"{name}/{i}" for i in range(count)]
