"""Reading traces: both forms of time, chaining by prefix, partial last blocks, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstore.replay.trace import Chain, load


def written(path: Path, *requests: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return path


def asked(ids: list[object], tokens: int = 100, timestamp: object = 0) -> dict[str, object]:
    return {"timestamp": timestamp, "input_length": tokens, "output_length": 1, "hash_ids": ids}


def test_times_are_milliseconds_or_strings_of_nanoseconds(tmp_path: Path) -> None:
    trace = load(written(tmp_path / "a.jsonl", asked([1], timestamp=500), asked([1], timestamp=2000)))
    assert [request.time_s for request in trace.requests] == [0, 1.5]
    start = 1753694362340138614
    later = written(tmp_path / "b.jsonl", asked([1], timestamp=str(start)), asked([1], timestamp=str(start + 10**9)))
    assert [request.time_s for request in load(later).requests] == [0, 1]


def test_a_block_is_its_whole_prefix(tmp_path: Path) -> None:
    trace = load(written(tmp_path / "a.jsonl", asked([1, 2, 3]), asked([1, 2, 4]), asked([7, 2, 3])))
    first, second, third = (request.keys for request in trace.requests)
    assert first[:2] == second[:2] and first[2] != second[2]
    assert not set(third) & set(first)
    assert (trace.references, trace.unique) == (9, 7)
    assert all(len(key) == 32 for key in first)


def test_the_seed_changes_keys_and_nothing_else(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", asked([1, 2]), asked([1, 3]))
    one, same, other = load(path, seed=1), load(path, seed=1), load(path, seed=2)
    assert one.requests == same.requests
    assert not {key for r in one.requests for key in r.keys} & {key for r in other.requests for key in r.keys}
    assert one.unique == other.unique


@pytest.mark.parametrize(("tokens", "full"), [(1536, 3), (1535, 2), (1025, 2), (9999, 3)])
def test_a_last_block_without_enough_tokens_is_partial(tmp_path: Path, tokens: int, full: int) -> None:
    trace = load(written(tmp_path / "a.jsonl", asked([1, 2, 3], tokens)), block_tokens=512)
    assert (len(trace.requests[0].keys), trace.requests[0].full) == (3, full)


def test_without_block_tokens_every_block_is_full(tmp_path: Path) -> None:
    assert load(written(tmp_path / "a.jsonl", asked([1, 2, 3], 1))).requests[0].full == 3


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[]",
        "{}",
        '{"timestamp": 0, "input_length": -1, "hash_ids": []}',
        '{"timestamp": 0, "input_length": 1, "hash_ids": [[1]]}',
        '{"timestamp": "x", "input_length": 1, "hash_ids": [1]}',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(asked([1])) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=r"bad.jsonl:3 is no request"):
        load(path)


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no block at all"):
        load(written(tmp_path / "a.jsonl", asked([])))


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    path, told = written(tmp_path / "a.jsonl", asked([1]), asked([2])), []
    load(path, progress=told.append)
    assert sum(told) == path.stat().st_size


def test_keys_are_chained_hashes() -> None:
    chain = Chain()
    assert chain.keys([1, 2])[1] == Chain().keys([1, 2])[1] != chain.keys([2])[0]
    assert chain.keys([1]) != chain.keys(["1"])
