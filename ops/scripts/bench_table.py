"""Turns the JSON of `kvctl bench --json` into the table of docs/benchmarks: bench_table.py FILE.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def row(result: dict[str, Any]) -> str:
    """One line of the table for one result."""
    must, goal = result.get("must", ""), result.get("goal", "")
    cells = []
    for figure in result["judged"]:
        bar = must[figure] if isinstance(must, dict) else must
        aim = goal[figure] if isinstance(goal, dict) else goal
        verdict = "ok" if result.get("ok") else "**short**"
        cells.append(f"| {result['name']} | {figure} | {result[figure]:.3g} | {bar} | {aim} | {verdict} |")
    return "\n".join(cells)


def main() -> None:
    """Print the table."""
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print("| name | figure | measured | must | goal | |\n|---|---|---|---|---|---|")
    for result in report["results"]:
        print(row(result))


if __name__ == "__main__":
    main()
