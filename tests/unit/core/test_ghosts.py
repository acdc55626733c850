"""The memory of what left: how long it lasts, how much it takes, and how seldom it is wrong."""

from __future__ import annotations

import random

import pytest

from kvstore.core.ghosts import Ghosts


def names(count: int, seed: int = 1) -> list[int]:
    rng = random.Random(seed)
    return [rng.getrandbits(64) for _ in range(count)]


def test_a_name_is_there_until_it_is_taken() -> None:
    ghosts = Ghosts(100)
    ghosts.add(7)
    assert 7 in ghosts and 8 not in ghosts
    assert ghosts.take(7)
    assert not ghosts.take(7) and 7 not in ghosts


def test_the_name_zero_is_a_name() -> None:
    ghosts = Ghosts(100)
    assert 0 not in ghosts
    ghosts.add(0)
    assert 0 in ghosts


@pytest.mark.parametrize("span", [1, 8, 100, 1000, 30_000])
def test_the_newest_are_remembered_and_the_old_are_not(span: int) -> None:
    ghosts = Ghosts(span)
    noted = names(4 * span + 40)
    for name in noted:
        ghosts.add(name)
    assert all(name in ghosts for name in noted[-max(1, span // 8) :])
    assert sum(name in ghosts for name in noted[-span:]) >= 0.9 * span
    assert sum(name in ghosts for name in noted[: -2 * span - 2]) <= 1 + span // 100


def test_a_name_noted_again_is_new_again() -> None:
    ghosts = Ghosts(100)
    ghosts.add(7)
    for name in names(90):
        ghosts.add(name)
    ghosts.add(7)
    for name in names(90, seed=2):
        ghosts.add(name)
    assert 7 in ghosts


def test_it_lasts_through_many_times_its_span() -> None:
    """The clock of the entries goes round after sixteen spans."""
    ghosts = Ghosts(64)
    for name in names(64 * 100):
        ghosts.add(name)
        assert name in ghosts


def test_false_answers_are_rare_and_memory_is_bounded() -> None:
    ghosts = Ghosts(10_000)
    for name in names(50_000):
        ghosts.add(name)
    assert sum(name in ghosts for name in names(100_000, seed=2)) < 40
    assert ghosts.nbytes <= 8 * 10_000 + 64


def test_a_small_change_of_the_span_keeps_what_is_known_and_a_large_one_does_not() -> None:
    ghosts = Ghosts(100)
    ghosts.add(7)
    ghosts.resize(150)
    assert 7 in ghosts
    ghosts.resize(1000)
    assert 7 not in ghosts and ghosts.nbytes >= 4000
    ghosts.resize(10)
    assert ghosts.nbytes < 1000
