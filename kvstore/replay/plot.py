"""A sweep as a picture. The one place that needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw hit ratio over capacity, one line a policy, into a file whose ending names the format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
        ValueError: no picture has such an ending.
    """
    # Half a second to import, for one option of one verb; and it is no dependency of the daemon.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for policy in result["means"]:
        cells = [cell for cell in result["cells"] if cell["policy"] == policy]
        style = {"color": "black", "linestyle": "--"} if policy == "opt" else {"marker": "o", "markersize": 4}
        axes.plot(
            [cell["percent"] for cell in cells],
            [100 * cell["block_hit_ratio"] for cell in cells],
            label=policy,
            **style,
        )
    axes.set_xscale("log")
    ticks = sorted({cell["percent"] for cell in result["cells"]})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("capacity, % of unique blocks")
    axes.set_ylabel("block hit ratio, %")
    axes.set_title(f"{result['trace']}: {result['references']:,} references, {result['unique']:,} unique blocks")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
