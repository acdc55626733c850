"""How a READ is cut into parts, and how they are answered."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvstore.agents.reading import Reading
from kvstore.tiers.base import BlockRef, Outcome, SlabRange, TierItem
from kvstore.v1 import agent_pb2


def items(count: int, nbytes: int) -> list[TierItem]:
    return [
        TierItem(BlockRef(b"n" * 32, number.to_bytes(32, "big")), SlabRange(number, 0, nbytes), b"c" * 16)
        for number in range(count)
    ]


def outcomes(batch: Sequence[TierItem]) -> list[Outcome]:
    return [Outcome(item.range.slab_id % 3) for item in batch]


@pytest.mark.parametrize(
    ("count", "nbytes", "parts"),
    [
        (3, 2 << 20, [(0, 1), (1, 2), (2, 3)]),  # each is told as soon as it is there
        (5, 256 << 10, [(0, 2), (2, 4), (4, 5)]),
        (70, 16 << 10, [(0, 32), (32, 64), (64, 70)]),
        (130, 1, [(0, 64), (64, 128), (128, 130)]),
        (0, 1, []),
    ],
)
def test_parts_are_in_order_and_not_too_small(count: int, nbytes: int, parts: list[tuple[int, int]]) -> None:
    assert list(Reading(items(count, nbytes), outcomes, lambda payload: None).parts()) == parts


def test_only_the_last_answer_says_that_it_is_the_last() -> None:
    sent: list[bytes] = []
    reading = Reading(items(40, 1 << 20), outcomes, sent.append)
    parts = list(reading.parts())
    with ThreadPoolExecutor(4) as pool:
        ended = list(pool.map(lambda part: reading.read_part(*part), reversed(parts)))
    assert sum(ended) == 1
    answers = [agent_pb2.AgentOutcomes.FromString(payload) for payload in sent]
    assert [answer.more for answer in answers] == [True] * 39 + [False]
    found = {answer.first + at: a.outcome for answer in answers for at, a in enumerate(answer.outcomes)}
    assert found == {number: number % 3 for number in range(40)}
