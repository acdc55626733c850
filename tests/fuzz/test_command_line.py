"""kvctl under any arguments, and traces of any content for its replay: an answer, or a clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from fuzz_messages import fuzzing
from kvstore.cli.kvctl import main
from kvstore.replay import trace as traces

VERBS = sorted(set(main.commands) - {"bench"})  # which would start a daemon
FLAGS = sorted(
    {name for verb in main.commands.values() for option in verb.params for name in option.opts if "-" in name}
)
WORDS = (
    "warm",
    "cold",
    "8GiB",
    "0",
    "-1",
    "9" * 400,
    "nan",
    "inf",
    "1e400",
    "ab" * 32,
    "abcdef12",
    "0x12345678",
    "warm=4",
    "hot=1,warm=2,cold=3",
    "warm=٣",
    "warm=1,warm=2",
    "warm=" + "9" * 30,
    "warm=1e3",
    "unix:/nowhere/k.sock",
    "tcp:host:1",
    "unix:" + "x" * 200,
    "unix:a\udcffb",
    "json",
    "loops",
    "trace.jsonl",
    "nowhere/out.jsonl",
    "x" * 300,
    "",
    "\udcff",
    "0,1,200",
    "1,2,x",
    "adaptive",
)
arguments = st.lists(
    st.one_of(st.sampled_from(FLAGS), st.sampled_from(WORDS), st.sampled_from(WORDS), st.text(max_size=6)), max_size=6
)

EDGES = (0, -1, 1, 1 << 63, 1 << 64, 10**400, -(10**400), 0.5, 1e308, float("inf"), float("-inf"), float("nan"))
scalars = st.one_of(st.none(), st.booleans(), st.sampled_from(EDGES), st.integers(-9, 99), st.text(max_size=5))
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner)
)
stamps = st.one_of(
    st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(EDGES), st.integers().map(str), anything
)
ids = st.one_of(
    st.lists(
        st.one_of(st.integers(0, 9), st.integers(0, 9), st.sampled_from(EDGES[:8]), st.text(max_size=3)), max_size=8
    ),
    anything,
)
requests = st.fixed_dictionaries(
    {"timestamp": stamps, "input_length": st.one_of(st.integers(0, 9999), anything), "hash_ids": ids},
    optional={"output_length": anything, "more": anything},
).map(json.dumps)
well_formed = st.builds(
    lambda time, names: json.dumps({"timestamp": time, "input_length": 64 * len(names), "hash_ids": names}),
    st.integers(0, 10**6),
    st.lists(st.integers(0, 30), min_size=1, max_size=8),
)
trace_lines = st.one_of(well_formed, well_formed, requests, st.text(max_size=20), anything.map(json.dumps))
files = st.one_of(
    st.lists(well_formed, min_size=1, max_size=8).map("\n".join).map(str.encode),
    st.lists(trace_lines, max_size=6).map("\n".join).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=80),
)
questions = st.sampled_from(
    (
        ["--tiers", "warm=4"],
        ["--tiers", "hot=1,warm=2,cold=3", "--block-tokens", "64", "--compare-one"],
        ["--sweep", "--capacities", "10,100"],
        ["--advise", "--block-bytes", "64KiB"],
        ["--tiers", "warm=1MiB", "--block-bytes", "1GiB"],
    )
)
HOSTILE = {
    "deep JSON": b"[" * 200_000,
    "a deep request": b'{"timestamp": 0, "input_length": 1, "hash_ids": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a long number": b'{"timestamp": ' + b"9" * 10_000 + b', "input_length": 1, "hash_ids": [1]}',
    "infinity": b'{"timestamp": Infinity, "input_length": 1, "hash_ids": [1]}',
    "a number that is infinite": b'{"timestamp": 1e999, "input_length": 1, "hash_ids": [1]}',
    "a distance that no float has": b'{"timestamp": 0, "input_length": 1, "hash_ids": [1]}\n'
    b'{"timestamp": "' + b"9" * 400 + b'", "input_length": 1, "hash_ids": [1]}',
    "a huge time": b'{"timestamp": 0, "input_length": 1, "hash_ids": [1]}\n'
    b'{"timestamp": ' + b"9" * 400 + b', "input_length": 1, "hash_ids": [1]}',
    "tokens beyond a float": b'{"timestamp": 0, "input_length": ' + b"9" * 400 + b', "hash_ids": [1]}',
    "half a surrogate": b'{"timestamp": 0, "input_length": 1, "hash_ids": ["\\ud800"]}',
    "no UTF-8": b'{"timestamp": 0, "input_length": 1, "hash_ids": ["\xff"]}',
    "UTF-16": '{"timestamp": 0, "input_length": 1, "hash_ids": [1]}'.encode("utf-16"),
    "one endless line": b" " * 5_000_000,
    "nothing": b"",
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that relative names are in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_kvctl(given_arguments: list[str]) -> Result:
    """Run it and see that it ends as it says it does."""
    result = CliRunner().invoke(main, given_arguments, env={"KVSTORE_ADDRESS": "unix:/nowhere/k.sock"})
    assert result.exception is None or isinstance(result.exception, SystemExit), f"{result.exception!r}"
    assert result.exit_code in (0, 1, 2, 3)
    assert "Traceback" not in result.output
    if result.exit_code:
        assert result.stderr.strip(), "an exit code without a word"
        assert len(result.stderr) < 8000
    return result


def test_any_arguments(here: Path) -> None:
    @fuzzing(200, "arguments")
    @given(st.sampled_from(VERBS), arguments, st.booleans())
    def ends_in_order(verb: str, rest: list[str], first: bool) -> None:
        check_kvctl([*rest, verb] if first else [verb, *rest])

    ends_in_order()
    assert not list(here.iterdir()), "no verb that reached nobody leaves a file"


def test_any_trace(here: Path) -> None:
    """It is replayed, or refused by line."""
    file = here / "trace.jsonl"

    @fuzzing(150, "traces")
    @given(files, questions)
    def is_replayed_or_refused(content: bytes, question: list[str]) -> None:
        file.write_bytes(content)
        result = check_kvctl(["replay", str(file), *question, "--json"])
        if result.exit_code == 0:
            assert 0 <= json.loads(result.stdout).get("block_hit_ratio", 0) <= 1

    is_replayed_or_refused()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_traces(here: Path, name: str) -> None:
    file = here / "trace.jsonl"
    file.write_bytes(HOSTILE[name])
    check_kvctl(["replay", str(file), "--tiers", "warm=4", "--block-tokens", "1"])


def test_the_harness_finds_a_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "_parse", lambda line: 1 // 0)
    (here / "trace.jsonl").write_bytes(b"{}")
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        check_kvctl(["replay", "trace.jsonl", "--tiers", "warm=4"])
