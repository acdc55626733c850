"""kvctl bench: run the measurements and show them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from kvstore.bench.cold import Cold
from kvstore.bench.cold_codec import ColdCodecs
from kvstore.bench.figures import SUITES, TARGETS
from kvstore.bench.gpu import Gpu
from kvstore.bench.runner import Bench
from kvstore.bench.scale import FULL, QUICK, Scale
from kvstore.cli import render
from kvstore.cli.admin_client import AdminClient
from kvstore.cli.options import EXIT_FAILED, Options
from kvstore.cli.session import connected
from kvstore.protocol.errors import InvalidRequest
from kvstore.sizes import format_size, parse_size


@dataclass(frozen=True, slots=True)
class Run:
    """What the command line says of a run: which suites, on whose daemon, and how large."""

    suites: Sequence[str]
    spawn: bool
    quick: bool
    warm_bytes: str | None
    data: str | None  # the folder with kv_samples
    listing: bool
    device: str = "cuda:0"  # of the worker's memory and the hot tier, for the suite gpu


def bench(options: Options, run: Run) -> int:
    """Measure and report; 1 if something could not be measured. Missing a target is not a failure."""
    if run.listing:
        return _list(options)
    scale = _scale(run.quick, run.warm_bytes)
    address = None if run.spawn else _live_address(options)
    jobs = Cold(scale, AdminClient).jobs() | ColdCodecs(scale, Path(run.data) if run.data else None).jobs()
    jobs |= Gpu(scale, AdminClient, run.device).jobs()
    try:
        made = Bench(run.suites, scale, _progress, address, jobs)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    report = made.run()
    if options.json:
        render.print_json(report)
    else:
        _show(report)
    return EXIT_FAILED if made.failures else 0


def _scale(quick: bool, warm_bytes: str | None) -> Scale:
    scale = QUICK if quick else FULL
    if warm_bytes is None:
        return scale
    try:
        pool = parse_size(warm_bytes)
    except ValueError as error:
        raise InvalidRequest(f"--warm-bytes: {error}") from error
    # A slab of every size class that is used, and the last one is seldom full.
    least = scale.working_set_bytes * 3 // 2
    if pool < least:
        raise InvalidRequest(f"--warm-bytes {format_size(pool)} cannot hold the working set; give {format_size(least)}")
    return replace(scale, warm_bytes=pool)


def _live_address(options: Options) -> str:
    """Address of the daemon that is asked about; fails early where there is none."""
    with connected(options) as client:
        return client.address


def _progress(what: str) -> None:
    click.echo(f"bench: {what}", err=True)


def _list(options: Options) -> int:
    if options.json:
        render.print_json({suite: list(names) for suite, names in SUITES.items()})
    else:
        for suite, names in SUITES.items():
            click.echo(f"{suite}: {' '.join(names)}")
    return 0


def _show(report: dict[str, Any]) -> None:
    rows = [row for result in report["results"] for row in _rows(result)]
    place = report["environment"]
    memcpy = "" if report["memcpy_gb_s"] is None else f"memcpy {report['memcpy_gb_s']} GB/s, one thread; "
    title = f"{memcpy}{place['cores']} cores of {place['cpu']}"
    render.console().print(render.table(("name", "figure", "value", "must", "goal", "", "detail"), rows, title=title))
    for name, reason in report["failures"].items():
        click.echo(f"{name} could not be measured: {reason}")
    if not place["full_scale"]:
        click.echo("A quick run: its figures are not for comparison.")


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    known = {"name", "judged", "must", "goal", "ok", "bytes", "seconds", *result["judged"]}
    detail = ", ".join(
        f"{key} {value}" if isinstance(value, str) else f"{key} {value:.4g}"
        for key, value in result.items()
        if key not in known
    )
    if not TARGETS[result["name"]]:
        yield result["name"], "", "", "", "", "", detail
    for target in TARGETS[result["name"]]:
        sign = "≥" if target.at_least else "≤"
        value = result[target.figure]
        verdict = "ok" if target.reached(value) else "short"
        yield (
            result["name"],
            target.figure,
            f"{value:g}",
            f"{sign} {target.must:g}",
            f"{target.goal:g}",
            verdict,
            detail,
        )
        detail = ""
