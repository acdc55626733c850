"""kvctl replay: what tiers of a given size would have done with a trace. Needs no daemon."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.cli import render
from kvstore.cli.advice import show_advice
from kvstore.cli.options import Options
from kvstore.protocol.errors import InvalidRequest
from kvstore.replay import advice, runs
from kvstore.replay.plot import plot
from kvstore.replay.simulator import PROMOTE_HITS
from kvstore.replay.trace import Trace, load
from kvstore.replay.workloads import WORKLOADS, workload
from kvstore.sizes import format_size, parse_size


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked for on the command line."""

    trace: str
    tiers: str | None
    policies: Sequence[str]
    block_tokens: int
    block_bytes: str | None
    seed: int
    capacities: str
    picture: str | None
    sweep: bool = False
    advise: bool = False
    promote_hits: int = PROMOTE_HITS
    compare_one: bool = False


def replay(options: Options, question: Question) -> int:
    """Replay a trace at one size, or at many."""
    _check(question)
    ask, show = (_sweep, _show_sweep) if question.sweep else (_one, _show)
    if question.advise:
        ask, show = _advise, show_advice
    try:
        result = ask(options, _trace(options, question), question)
        if question.picture is not None:
            plot(result, Path(question.picture))
    except (ValueError, OSError) as error:
        raise InvalidRequest(str(error)) from error
    except ModuleNotFoundError as error:
        raise InvalidRequest(f"--plot needs {error.name}: pip install 'kvtier[demo]'") from error
    if options.json:
        render.print_json(result)
    else:
        show(result)
    return 0


def tier_blocks(text: str, block_bytes: int) -> dict[str, int]:
    """Capacities in blocks of "hot=…,warm=…,cold=…": numbers of blocks, or sizes where the block's is known.

    Raises:
        ValueError: not such a list; the message says what is wrong.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in ("hot", "warm", "cold") or name in found:
            raise ValueError(f"--tiers {part.strip()!r}: write for example warm=439 or hot=100,warm=400,cold=2000")
        if block_bytes:
            found[name] = parse_size(value) // block_bytes
        elif value.strip().isdecimal():
            found[name] = int(value)
        else:
            raise ValueError(f"--tiers {part.strip()!r}: a number of blocks, or a size together with --block-bytes")
    if not found.get("warm"):
        raise ValueError("--tiers needs warm, with room for a block at least")
    return found


def _check(question: Question) -> None:
    """Options that do not go together."""
    if question.picture is not None and not question.sweep:
        raise InvalidRequest("--plot draws a sweep: add --sweep")
    if question.sweep and question.advise:
        raise InvalidRequest("--sweep compares policies and --advise looks at one: give one of them")
    if question.tiers is not None and (question.sweep or question.advise):
        raise InvalidRequest("--sweep and --advise choose the sizes: leave --tiers away")
    if question.compare_one and question.tiers is None:
        raise InvalidRequest("--compare-one compares --tiers with one tier of their size: add --tiers")


def _trace(options: Options, question: Question) -> Trace:
    path = Path(question.trace)
    if not path.exists() and question.trace in WORKLOADS:
        return workload(question.trace, question.seed)
    with render.progress("reading", path.stat().st_size, shown=not options.json) as advance:
        return load(path, question.block_tokens, question.seed, advance)


def _one(options: Options, trace: Trace, question: Question) -> dict[str, Any]:
    if question.tiers is None:
        raise InvalidRequest("say how large the tiers are: --tiers warm=439; or try many sizes: --advise, --sweep")
    block_bytes, policy = _block_bytes(question), _policy(question)
    tiers = tier_blocks(question.tiers, block_bytes)
    steps = (2 - (policy == runs.OPT) + question.compare_one) * len(trace.requests)
    with _progress(options, policy, steps) as advance:
        other = runs.one_tier(trace, tiers, policy, advance) if question.compare_one else None
        result = runs.replay(trace, tiers, policy, block_bytes, advance, question.promote_hits)
    if other is not None:
        points = 100 * (result["block_hit_ratio"] - other["block_hit_ratio"])
        result |= {"one_tier": other, "points_to_one_tier": points}
    return result


def _advise(options: Options, trace: Trace, question: Question) -> dict[str, Any]:
    policy = _policy(question)
    with _progress(options, f"{policy}, many sizes", advice.steps(trace)) as advance:
        return advice.advise(trace, policy, _block_bytes(question), advance)


def _policy(question: Question) -> str:
    if len(question.policies) > 1:
        raise InvalidRequest("one --policy at a time, or --sweep")
    return question.policies[0] if question.policies else "adaptive"


def _block_bytes(question: Question) -> int:
    return parse_size(question.block_bytes) if question.block_bytes else 0


def _sweep(options: Options, trace: Trace, question: Question) -> dict[str, Any]:
    policies = list(question.policies or runs.NAMES[:3])
    percents = [float(text) for text in question.capacities.split(",")]
    if not all(0 < percent <= 100 for percent in percents):
        raise InvalidRequest("--capacities: per cent of the unique blocks, above 0 and up to 100")
    with _progress(options, "sweep", runs.sweep_steps(trace, policies, percents)) as advance:
        return runs.sweep(trace, policies, percents, advance)


def _progress(options: Options, title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return render.progress(title, total, shown=not options.json)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}%"


def _show(result: Mapping[str, Any]) -> None:
    rows: list[tuple[str, str]] = [
        ("block hit ratio", _percent(result["block_hit_ratio"])),
        ("optimum", _percent(result["optimum"])),
    ]
    if "share_of_optimum" in result:
        rows += _details(result)
    asked = f"{result['references']:,} blocks in {result['requests']:,} requests"
    title = f"{result['policy']} on {result['trace']}: {asked}"
    render.console().print(render.table(("figure", "value"), rows, title=title))


def _details(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("share of the optimum", _percent(result["share_of_optimum"]))]
    rows += [
        (f"{name} hit ratio ({tier['capacity_blocks']:,} blocks)", _percent(tier["hit_ratio"]))
        for name, tier in result["tiers"].items()
    ]
    saved = result["tokens_saved"] / result["tokens"] if result["tokens"] else None
    rows += [
        ("prefix hit ratio, mean over requests", _percent(result["prefix_hit_ratio"])),
        ("tokens of prefill saved", f"{result['tokens_saved']:,} ({_percent(saved)})"),
        ("blocks stored", f"{result['stored_blocks']:,}"),
        ("blocks refused", f"{result['refused_blocks']:,}"),
    ]
    if result["promotions"]:
        rows.append(("promoted to a faster tier", f"{sum(result['promotions'].values()):,} blocks"))
    in_bytes = result.get("moved_bytes", {})
    for name, blocks in result["moved_blocks"].items():
        shown = f"{blocks:,} blocks"
        rows.append((f"moved {name}", f"{shown}, {format_size(in_bytes[name])}" if name in in_bytes else shown))
    for title, name in (("written to SSD", "ssd_written"), ("an exclusive tier would write", "ssd_written_exclusive")):
        written = f"{result[f'{name}_blocks']:,} blocks"
        if f"{name}_bytes" in result:
            written += f", {format_size(result[f'{name}_bytes'])}"
        rows.append((title, written))
    if "one_tier" in result:
        one = result["one_tier"]
        shown = f"{_percent(one['block_hit_ratio'])}, the tiers {result['points_to_one_tier']:+.2f} points"
        rows.append((f"one warm tier of {one['capacity_blocks']:,} blocks", shown))
    return [*rows, ("speed", f"{result['references_per_s']:,.0f} blocks/s")]


def _show_sweep(result: Mapping[str, Any]) -> None:
    policies = list(result["means"])
    sizes: dict[float, dict[str, Mapping[str, Any]]] = {}
    for cell in result["cells"]:
        sizes.setdefault(cell["percent"], {})[cell["policy"]] = cell
    rows = [
        (f"{percent:g}%", str(cells[policies[0]]["blocks"]), *(_percent(cells[p]["block_hit_ratio"]) for p in policies))
        for percent, cells in sizes.items()
    ]
    means = result["means"]
    for title, name in (("mean ratio to leaf-lru", "ratio_to_leaf_lru"), ("mean share of optimum", "share_of_optimum")):
        rows.append((title, "", *(_ratio(means[policy][name]) for policy in policies)))
    rows.append(
        ("worst against leaf-lru, points", "", *(f"{means[policy]['worst_points']:+.2f}" for policy in policies))
    )
    title = f"block hits on {result['trace']}"
    render.console().print(render.table(("capacity", "blocks", *policies), rows, title=title))


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
