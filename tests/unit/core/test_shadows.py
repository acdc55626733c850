"""Shadow caches: their sample, their bound, and which candidate they choose."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from core_world import key, packed
from kvstore.core.adaptive import CANDIDATES
from kvstore.core.shadows import FOREVER, GHOSTS, SHADOW_BLOCKS, Candidate, Shadow, Shadows

LRU, AGAIN = Candidate(0), Candidate(FOREVER)


def hits(shadow: Shadow, names: Iterable[int]) -> str:
    return "".join("+" if hit else "-" for hit in shadow.use(list(names)))


def test_without_a_capacity_everything_is_kept() -> None:
    shadow = Shadow(LRU)
    assert hits(shadow, [1, 2, 3, 1, 2, 3]) == "---+++"


def test_the_order_without_a_bias_is_lru() -> None:
    shadow = Shadow(LRU)
    shadow.resize(2)
    assert hits(shadow, [1, 2, 1, 3, 1, 2, 1, 3]) == "--+-+-+-"


def test_with_an_endless_bias_what_was_used_again_stays() -> None:
    shadow = Shadow(AGAIN)
    shadow.resize(2)
    assert hits(shadow, [1, 1, 2, 3, 4, 5, 1]) == "-+----+"


def test_a_name_that_would_be_next_is_refused_and_let_in_when_it_is_back() -> None:
    shadow = Shadow(AGAIN)
    shadow.resize(1)
    assert hits(shadow, [1, 1, 2, 1]) == "-+-+"
    assert hits(shadow, [2, 2]) == "-+"  # the first was a ghost's return


def test_a_closed_one_takes_only_what_it_has_turned_away_before() -> None:
    shadow = Shadow(Candidate(FOREVER, closed=True))
    shadow.resize(2)
    assert hits(shadow, [1, 2, 3, 1, 2]) == "---++"
    assert hits(shadow, [3, 3]) == "-+"


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_it_never_holds_more_than_its_capacity(candidate: Candidate) -> None:
    rng = random.Random(1)
    shadow = Shadow(candidate)
    for capacity in (50, 10, 30):
        shadow.resize(capacity)
        for _ in range(2000):
            shadow.use([int(rng.paretovariate(0.5))])
        assert len(shadow) <= capacity
        assert len(shadow._ghosts) <= GHOSTS * capacity


def test_the_sample_follows_the_capacity() -> None:
    shadows = Shadows([LRU])
    keys = [key(i) for i in range(20_000)]
    shadows.refer(0, packed(keys[:SHADOW_BLOCKS]))
    assert len(shadows) == SHADOW_BLOCKS
    for held in range(0, 20_000, 500):
        shadows.growing(held)
        shadows.refer(0, packed(keys[held : held + 500]))
    assert SHADOW_BLOCKS <= len(shadows) <= 3 * SHADOW_BLOCKS
    shadows.resize(1_000_000)
    assert len(shadows) < 0.02 * 20_000


def loop(count: int, rounds: int) -> list[bytes]:
    return [packed([key(i)]) for _ in range(rounds) for i in range(count)]


def test_they_choose_what_hits_most() -> None:
    shadows = Shadows(CANDIDATES)
    shadows.resize(100)
    assert shadows.best == 0
    rng = random.Random(1)
    for i in range(5000):
        shadows.refer(0, key(("new", i)))
        shadows.refer(0, key(("popular", rng.randrange(90))))
        shadows.refer(0, key(("newer", i)))
        shadows.refer(0, key(("newest", i)))
    assert CANDIDATES[shadows.best].factor == FOREVER
    for i in range(5000):  # each is used thrice in a row and then never again
        for _ in range(3):
            for depth in range(3):
                shadows.refer(0, key(("passing", i // 10 * 10 + depth, i % 10)))
            shadows.refer(0, key(("recent", i - rng.randrange(40))))
    assert CANDIDATES[shadows.best].factor < FOREVER


def test_chance_changes_nothing() -> None:
    shadows = Shadows(CANDIDATES)
    shadows.resize(100)
    for part in loop(50, 100):  # all fit: nothing tells the candidates apart
        shadows.refer(0, part)
    assert shadows.best == 0


def test_equal_keys_of_two_namespaces_are_two_blocks() -> None:
    shadows = Shadows([LRU])
    shadows.refer(0, key("a"))
    shadows.refer(1 << 20, key("a"))
    assert len(shadows) == 2


def test_a_prefix_is_used_from_its_last_block_to_its_first() -> None:
    shadows = Shadows([LRU])
    shadows.resize(2)
    keys = [key(i) for i in range(3)]
    shadows.refer(0, packed(keys))
    (shadow,) = shadows._shadows
    kept = list(shadow._once)
    assert kept == [int.from_bytes(name[:8], "little") for name in (keys[1], keys[0])]


def test_weights_do_not_grow_without_bound() -> None:
    shadows = Shadows(CANDIDATES)
    shadows.resize(2)
    rng = random.Random(1)
    for _ in range(20_000):
        shadows.refer(0, key(rng.randrange(6)))
    shadows.refer(0, packed([key(i) for i in range(20_000)]))
    assert shadows._weight < 1e200
    assert all(count < 1e200 for row in shadows._wins for count in row)
