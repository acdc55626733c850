"""What kvctl replay --advise says to people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvstore.cli import render
from kvstore.replay.advice import WORTH
from kvstore.sizes import format_size

_Figures = Mapping[str, Any]


def show_advice(result: _Figures) -> None:
    """The curve as a table, and what follows from it in words."""
    sized = "bytes" in result["points"][0]
    headings = ["capacity", "blocks", *(["size"] if sized else []), "hit ratio", "of infinite", "points a doubling"]
    rows = [
        [
            f"{point['percent']:.3g}%",
            str(point["blocks"]),
            *([format_size(point["bytes"])] if sized else []),
            _percent(point["hit_ratio"]),
            f"{100 * point['share_of_infinite']:.1f}%",
            "" if point["gain_per_doubling"] is None else f"{100 * point['gain_per_doubling']:+.2f}",
        ]
        for point in result["points"]
    ]
    title = f"{result['policy']} on {result['trace']}: an infinite cache hits {_percent(result['infinite_hit_ratio'])}"
    console = render.console()
    console.print(render.table(headings, rows, title=title))
    for sentence in sentences(result):
        console.print(sentence, highlight=False)


def sentences(result: _Figures) -> list[str]:
    """The answer in words."""
    knee, split = result["knee"], result["split"]
    said = [f"The knee is at {_capacity(knee)}: {_percent(knee['hit_ratio'])}."]
    said += [
        f"{reached['share']:.0%} of what an infinite cache hits needs {_capacity(reached)}."
        for reached in result["reach"]
    ]
    warm = _amount(split["warm_blocks"], split.get("warm_bytes"))
    cold = _amount(split["cold_blocks"], split.get("cold_bytes")) if split["cold_blocks"] else "none"
    said.append(
        f"Warm {warm}: beyond, a doubling brings less than {WORTH:.0%} of what an infinite cache hits. "
        f"Cold {cold}: {result['reach'][-1]['share']:.0%} of it, copies of warm blocks included."
    )
    if "hit_ratio" in split:
        share = f"{100 * split['share_of_infinite']:.1f}%"
        said.append(f"Both together hit {_percent(split['hit_ratio'])}, {share} of an infinite cache.")
    return said


def _capacity(point: _Figures) -> str:
    return f"{_amount(point['blocks'], point.get('bytes'))} ({point['percent']:.3g}% of the unique blocks)"


def _amount(blocks: int, nbytes: int | None) -> str:
    return f"{blocks:,} blocks" + (f", {format_size(nbytes)}" if nbytes is not None else "")


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
