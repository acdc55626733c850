"""What is measured, what it must reach and should reach, and how a result is reported."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Value = float | int | str | Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Target:
    """Bounds of one figure of a result: a release needs `must`, the design aims at `goal`."""

    figure: str
    must: float
    goal: float
    at_least: bool = False

    def reached(self, value: float) -> bool:
        """Whether `value` is as good as `must`."""
        return value >= self.must if self.at_least else value <= self.must


def _ratio(must: float, goal: float) -> tuple[Target, ...]:
    return _more("ratio_memcpy", must, goal)


def _more(figure: str, must: float, goal: float) -> tuple[Target, ...]:
    return (Target(figure, must, goal, at_least=True),)


TARGETS: dict[str, tuple[Target, ...]] = {
    "get_256": _ratio(0.82, 0.97),
    "get_64": _ratio(0.82, 0.95),
    "get_8": _ratio(0.68, 0.85),
    "get_1": _ratio(0.33, 0.65),
    "get_256k_256": _ratio(0.55, 0.75),
    "get_256k_64": _ratio(0.5, 0.7),
    "get_256k_8": _ratio(0.35, 0.5),
    "get_256k_1": _ratio(0.12, 0.25),
    "put_256": _ratio(0.40, 0.60),
    "put_spill": (Target("ratio_empty", 0.7, 0.9, at_least=True),),
    "call_local_us": (Target("median_us", 80, 30),),
    "call_grpc_us": (Target("median_us", 1000, 600),),
    "call_busy_p99_us": (Target("p99_us", 3000, 1000),),
    "match_8192_us": (Target("median_us", 1500, 400),),
    "keys_131072_ms": (Target("median_ms", 40, 12),),
    "remote_get": _more("ratio_grpc", 0.8, 1.0),
    "idle": (Target("cpu_percent", 1.0, 0.2), Target("rss_mb", 140, 100)),
    "import_ratio": (Target("ratio", 2.0, 1.5),),
    "kvctl_help_s": (Target("seconds", 0.5, 0.3),),
    "cold_ratio_minilm": _more("ratio", 1.48, 1.52),
    "cold_ratio_small_lm": _more("ratio", 1.50, 1.52),
    "cold_decode_numba": _ratio(0.17, 0.30),
    "cold_decode_numpy": _ratio(0.10, 0.12),
    "cold_decode_zipnn": _more("ratio_zipnn", 1.15, 2.0),
    "cold_encode": _more("ratio_zstd3", 3.0, 6.0),
    "cold_get_2_numba": (*_ratio(0.25, 0.40), Target("agent_mb", 110, 80)),
    "cold_get_2_numpy": (*_ratio(0.15, 0.21), Target("agent_mb", 60, 40)),
    "cold_get_1_numba": _ratio(0.15, 0.22),
    "cold_get_1_numpy": _ratio(0.10, 0.15),
    "cold_disk_sequential": _more("ratio_pread", 0.6, 1.2),
    "cold_disk_random": _more("ratio_pread", 1.0, 1.4),
    "cold_spill": _more("ratio_fsync", 0.7, 0.95),
    "cold_call_us": (Target("median_us", 150, 75), Target("p99_us", 5000, 1300)),
    "cold_churn": _more("ratio_first", 0.8, 0.95),
    "cold_restart_s": (Target("seconds", 3.0, 1.0),),
    # Nothing is judged before it has been measured on a card.
    "gpu_hot_to_worker": (),
    "gpu_warm_to_worker": (),
    "gpu_worker_to_staging": (),
    "gpu_scatter": (),
    "gpu_one_block_us": (),
    "gpu_overlap": (),
    "gpu_memory_held": (),
}

# What one suite measures; a result can also be named by itself.
SUITES: dict[str, tuple[str, ...]] = {
    "get": ("get_256", "get_64", "get_8", "get_1"),
    "get_256k": ("get_256k_256", "get_256k_64", "get_256k_8", "get_256k_1"),
    "put": ("put_256", "put_spill"),
    "calls": ("call_local_us", "call_grpc_us", "call_busy_p99_us", "match_8192_us", "keys_131072_ms"),
    "remote": ("remote_get",),
    "footprint": ("idle", "import_ratio", "kvctl_help_s"),
    "cold": tuple(name for name in TARGETS if name.startswith("cold_")),
    "gpu": tuple(name for name in TARGETS if name.startswith("gpu_")),
}
_ONLY_BY_NAME = ("cold", "gpu")  # one takes longer than all the others together, one needs a device


@dataclass(frozen=True, slots=True)
class Result:
    """One measurement: named figures, of which those in TARGETS are judged."""

    name: str
    figures: Mapping[str, Value] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every judged figure is as good as it must be."""
        return all(target.reached(self._judged(target)) for target in TARGETS[self.name])

    def document(self) -> dict[str, object]:
        """As JSON: the figures, then "must", "goal" (by figure where several are judged) and "ok"."""
        targets = TARGETS[self.name]
        must: object = {target.figure: target.must for target in targets}
        goal: object = {target.figure: target.goal for target in targets}
        if len(targets) == 1:
            must, goal = targets[0].must, targets[0].goal
        judged = [target.figure for target in targets]
        return {"name": self.name, **self.figures, "judged": judged, "must": must, "goal": goal, "ok": self.ok}

    def _judged(self, target: Target) -> float:
        value = self.figures[target.figure]
        assert isinstance(value, float | int), f"{self.name}.{target.figure} is not a number"
        return value


def chosen(names: Sequence[str]) -> list[str]:
    """Result names of suites and results; where none is named, all suites but those that take long (cold).

    Raises:
        ValueError: there is no such suite or result.
    """
    wanted: set[str] = set()
    for name in names or [suite for suite in SUITES if suite not in _ONLY_BY_NAME]:
        if name not in SUITES and name not in TARGETS:
            raise ValueError(f"no suite {name!r}; there are {', '.join([*SUITES, *TARGETS])}")
        wanted.update(SUITES.get(name, (name,)))
    return [name for name in TARGETS if name in wanted]


def transfer_result(name: str, memcpy_s: Sequence[float], taken_s: Sequence[float], nbytes: int) -> Result:
    """A copy against memcpy of the same bytes in the same round: the median of the rounds' ratios."""
    ratios = [base / taken for base, taken in zip(memcpy_s, taken_s, strict=True)]
    figures: dict[str, Value] = {
        "ratio_memcpy": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
        "seconds": statistics.median(taken_s),
        "bytes": nbytes,
        "gb_s": round(nbytes / statistics.median(taken_s) / 1e9, 3),
        "rounds": len(ratios),
    }
    return Result(name, figures)


def latency_figures(taken_s: Sequence[float], unit: str = "us") -> dict[str, Value]:
    """Median, 99th percentile and count of call times, in `unit` ("us" or "ms")."""
    scale = {"us": 1e6, "ms": 1e3}[unit]
    ordered = sorted(taken_s)
    p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    return {
        f"median_{unit}": round(statistics.median(ordered) * scale, 2),
        f"p99_{unit}": round(p99 * scale, 2),
        "calls": len(ordered),
        "seconds": sum(ordered),
    }
