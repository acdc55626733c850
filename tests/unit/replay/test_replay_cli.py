"""kvctl replay: needs no daemon, answers people and programs, and says what is wrong with the question."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvstore.cli.kvctl import main
from kvstore.cli.replay import tier_blocks
from kvstore.core.cache import CacheConfig
from kvstore.core.residency import Limits


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": i * 100, "input_length": 63, "output_length": 1, "hash_ids": [0, i % 7, i % 3, i % 2]}
        for i in range(200)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def kvctl(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_json_has_the_hit_ratio_on_top(trace: Path) -> None:
    result = kvctl("replay", trace, "--tiers", "warm=20", "--block-tokens", 16, "--policy", "leaf-lru", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert next(iter(answer)) == "block_hit_ratio"
    assert 0 < answer["block_hit_ratio"] <= answer["optimum"] <= 0.75  # the last of four blocks is partial
    assert answer["tiers"]["warm"]["capacity_blocks"] == 20


def test_a_table_for_people(trace: Path) -> None:
    result = kvctl("replay", trace, "--tiers", "hot=2,warm=4,cold=30", "--policy", "adaptive")
    assert result.exit_code == 0, result.output
    for words in ("block hit ratio", "cold hit ratio", "tokens of prefill saved", "written to SSD", "optimum"):
        assert words in result.stdout


def test_sizes_need_the_size_of_a_block(trace: Path) -> None:
    assert tier_blocks("hot=1GiB,warm=4GiB", 2 << 20) == {"hot": 512, "warm": 2048}
    result = kvctl("replay", trace, "--tiers", "warm=40MiB", "--block-bytes", "2MiB", "--json")
    assert json.loads(result.stdout)["tiers"]["warm"]["capacity_blocks"] == 20
    result = kvctl("replay", trace, "--tiers", "warm=40MiB")
    assert result.exit_code == 2 and "--block-bytes" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--tiers warm=439"),
        (["--tiers", "cold=4"], "needs warm"),
        (["--tiers", "warm"], "warm=439"),
        (["--tiers", "warm=1,warm=2"], "warm=2"),
        (["--tiers", "warm=4", "--policy", "opt", "--policy", "arc"], "--sweep"),
        (["--tiers", "warm=4", "--plot", "a.png"], "--sweep"),
        (["--sweep", "--advise"], "one of them"),
        (["--advise", "--tiers", "warm=4"], "leave --tiers away"),
        (["--advise", "--policy", "opt", "--policy", "arc"], "one --policy"),
        (["--compare-one"], "add --tiers"),
        (["--tiers", "warm=4,cold=9", "--compare-one", "--policy", "opt"], "one tier only"),
        (["--tiers", "warm=4", "--promote-hits", "0"], "--promote-hits"),
        (["--sweep", "--capacities", "0,5"], "--capacities"),
    ],
)
def test_a_bad_question_is_answered_with_what_is_wrong(trace: Path, arguments: list[str], words: str) -> None:
    result = kvctl("replay", trace, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_missing_or_bad_trace(tmp_path: Path) -> None:
    assert kvctl("replay", tmp_path / "none.jsonl", "--tiers", "warm=4").exit_code == 2
    bad = tmp_path / "bad.jsonl"
    bad.write_text("what\n")
    result = kvctl("replay", bad, "--tiers", "warm=4")
    assert result.exit_code == 2 and "bad.jsonl:1" in result.stderr


def test_a_sweep_as_table_json_and_picture(trace: Path, tmp_path: Path) -> None:
    shown = kvctl("replay", trace, "--sweep", "--capacities", "10,50", "--policy", "leaf-lru", "--policy", "arc")
    assert shown.exit_code == 0, shown.output
    assert "mean ratio to leaf-lru" in shown.stdout and "arc" in shown.stdout
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: no picture to draw")
    picture = tmp_path / "out.png"
    result = kvctl("replay", trace, "--sweep", "--capacities", "10,50", "--plot", picture, "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["cells"]) == 6
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_answer(trace: Path) -> None:
    def answer(seed: int) -> dict[str, object]:
        result = json.loads(kvctl("replay", trace, "--tiers", "warm=8", "--seed", seed, "--json").stdout)
        return {name: value for name, value in result.items() if name not in ("seconds", "references_per_s")}

    assert answer(3) == answer(3)


def test_made_traces_have_names() -> None:
    result = kvctl("replay", "loops", "--tiers", "warm=100", "--policy", "opt", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["trace"] == "loops"


def test_promotions_can_be_compared_with_promote_always(trace: Path) -> None:
    """Two runs tell what N saves; the default is the daemon's."""

    def promoted(*more: object) -> dict[str, int]:
        result = kvctl("replay", trace, "--tiers", "hot=8,warm=9,cold=40", "--json", *more)
        found: dict[str, int] = json.loads(result.stdout)["promotions"]
        return found

    assert promoted() == promoted("--promote-hits", CacheConfig(Limits(1)).promote_hits)
    always, seldom = promoted("--promote-hits", 1), promoted("--promote-hits", 9)
    assert list(always) == ["hot", "warm"]
    assert always["hot"] > promoted()["hot"] > seldom["hot"]
    assert always["warm"] > seldom["warm"]


def test_tiers_against_one_of_their_size(trace: Path) -> None:
    arguments = ("replay", trace, "--tiers", "warm=5,cold=15", "--compare-one")
    answer = json.loads(kvctl(*arguments, "--json").stdout)
    one = json.loads(kvctl("replay", trace, "--tiers", "warm=20", "--json").stdout)
    assert answer["one_tier"] == {"capacity_blocks": 20, "block_hit_ratio": one["block_hit_ratio"]}
    assert answer["points_to_one_tier"] == 100 * (answer["block_hit_ratio"] - one["block_hit_ratio"])
    shown = kvctl(*arguments).stdout
    assert "one warm tier of 20 blocks" in shown and f"the tiers {answer['points_to_one_tier']:+.2f} points" in shown


def test_advice_as_table_and_json(trace: Path) -> None:
    shown = kvctl("replay", trace, "--advise", "--block-bytes", "2MiB")
    assert shown.exit_code == 0, shown.output
    for words in ("points a doubling", "The knee is at", "90% of what an infinite cache hits needs", "Warm ", "MiB"):
        assert words in shown.stdout
    answer = json.loads(kvctl("replay", trace, "--advise", "--json").stdout)
    assert [reached["share"] for reached in answer["reach"]] == [0.9, 0.95, 0.99]
    assert "bytes" not in answer["knee"] and answer["split"]["warm_blocks"] > 0
