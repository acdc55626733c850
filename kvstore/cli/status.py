"""The one screen of `kvctl status`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kvstore.cli import render
from kvstore.v1 import admin_pb2 as pb

_SESSIONS_SHOWN = 8
_DAY_MS = 86_400_000
_COLOURS = {"hot": "red", "warm": "yellow", "cold": "blue"}


def status_screen(stats: pb.GetStatsResponse, sessions: Sequence[pb.SessionInfo], address: str) -> RenderableType:
    """Tiers with bars, hit ratios, sessions, and what is not as it should be."""
    serving = stats.health == "serving"
    head = Text.assemble(
        ("● ", "green" if serving else "yellow"),
        (stats.health or "unknown", "bold"),
        f"   kvstored {stats.version}   up {render.duration(stats.uptime_ms)}   {address}",
    )
    parts: list[RenderableType] = [head, Text(), _tiers(stats), _ratios(stats)]
    if sessions:
        parts += [Text(), _sessions(sessions)]
    parts += [Text(), _health(stats)]
    return Panel(Group(*parts), title="kvstore", title_align="left", expand=False, padding=(1, 2))


def warnings(stats: pb.GetStatsResponse) -> list[str]:
    """What an operator should know, in sentences; empty where all is well."""
    found = [f"{tier.name} tier: {line}" for tier in stats.tiers for line in _tier_warnings(tier)]
    if stats.health == "draining":
        found.append("draining: new blocks are refused")
    if stats.quarantined_bytes:
        found.append(f"{render.size(stats.quarantined_bytes)} quarantined until a process that may write there is gone")
    if stats.dropped_unsaved:
        found.append(
            f"{stats.dropped_unsaved} blocks were evicted from warm without a copy below: cold may be too slow or off"
        )
    return found


def _tier_warnings(tier: pb.TierStats) -> Iterator[str]:
    if tier.state not in ("ok", "off", ""):
        yield tier.state
    if tier.restarts:
        yield f"its agent was restarted {tier.restarts} times"
    if tier.corrupt:
        yield f"{tier.corrupt} copies failed their checksum and were dropped"
    if tier.medium.get("set_aside"):
        yield "what was found at the start could not be trusted and was set aside (see the log)"
    if tier.medium.get("full"):
        yield f"{tier.medium['full']} writes found no room on the disk"
    if tier.write_failures:
        yield f"{tier.write_failures} writes failed"


def _tiers(stats: pb.GetStatsResponse) -> Table:
    grid = Table.grid(padding=(0, 2))
    for tier in stats.tiers:
        colour = _COLOURS.get(tier.name, "white")
        if tier.state == "off":
            grid.add_row(Text(tier.name, colour), Text("off", "dim"))
            continue
        compressed = (
            f"  {tier.raw_bytes / tier.stored_bytes:.2f}× compressed" if tier.stored_bytes != tier.raw_bytes else ""
        )
        grid.add_row(
            Text(tier.name, colour),
            Text(render.bar(tier.used_bytes, tier.capacity_bytes), colour),
            Text(render.percent(tier.used_bytes, tier.capacity_bytes), justify="right"),
            Text(f"{render.size(tier.used_bytes)} of {render.size(tier.capacity_bytes)}"),
            Text(f"{tier.blocks:,} blocks  {tier.hits:,} hits  {tier.evictions:,} evicted{compressed}", "dim"),
        )
    return grid


def _ratios(stats: pb.GetStatsResponse) -> Text:
    served = sum(tier.hits for tier in stats.tiers)
    shares = ", ".join(f"{tier.name} {render.percent(tier.hits, served)}" for tier in stats.tiers if tier.hits)
    rejected = ", ".join(f"{stats.put_rejected[reason]:,} {reason}" for reason in sorted(stats.put_rejected))
    staging = render.size(stats.staging_bytes)
    lines = [
        f"acquire  {render.percent(stats.hit_blocks, stats.lookups)} of {stats.lookups:,} blocks"
        + (f"  ({shares})" if shares else ""),
        f"match    {render.percent(stats.match_hit_blocks, stats.match_lookups)} of {stats.match_lookups:,} blocks",
        f"put      {stats.put_stored:,} stored, {stats.put_exists:,} existed"
        + (f", rejected: {rejected}" if rejected else ""),
        f"holding  {stats.namespaces:,} namespaces, {stats.leases:,} leases, {staging} staging",
        *_withheld(stats),
        *_wear(stats),
        f"process  {render.size(stats.anonymous_bytes)} of memory beside the pool",
    ]
    return Text("\n" + "\n".join(lines))


def _withheld(stats: pb.GetStatsResponse) -> list[str]:
    """What the benefit gate did, and by which figures; nothing where it had nothing to do."""
    blocks = stats.counters.get("withheld_blocks", 0)
    if not blocks:
        return []
    rates = ", ".join(
        f"{tier.name} {render.size(tier.fetch_bytes_per_s)}/s"
        + (f" after {tier.fetch_fixed_us / 1000:.1f} ms" if tier.fetch_fixed_us else "")
        for tier in stats.tiers
        if tier.fetch_bytes_per_s
    )
    acquires = stats.counters.get("gated_acquires", 0)
    return [
        f"withheld {blocks:,} blocks of {acquires:,} acquires, quicker to recompute" + (f"  ({rates})" if rates else "")
    ]


def _wear(stats: pb.GetStatsResponse) -> list[str]:
    """What the cold tier wrote to its device since the start, and how often that would fill the device in a day."""
    medium: Mapping[str, int] = next((tier.medium for tier in stats.tiers if tier.name == "cold"), {})
    written, disk = medium.get("device_bytes", 0), medium.get("disk_bytes", 0)
    if not (written and disk and stats.uptime_ms):
        return []
    daily = written * _DAY_MS / stats.uptime_ms / disk
    share = f"{written / medium['written_bytes']:.2f} times its blocks" if medium.get("written_bytes") else ""
    return [f"device   {render.size(written)} written ({share}), {daily:.2f} drive writes a day at this rate"]


def _sessions(sessions: Sequence[pb.SessionInfo]) -> Table:
    rows = [
        (item.client_name, item.pid, item.tenant, item.leases, item.pinned_blocks, render.duration(item.idle_ms))
        for item in sorted(sessions, key=lambda item: item.idle_ms)[:_SESSIONS_SHOWN]
    ]
    shown = f"sessions: {len(sessions)}" + (
        f", the {_SESSIONS_SHOWN} latest" if len(sessions) > _SESSIONS_SHOWN else ""
    )
    return render.table(("name", "pid", "tenant", "leases", "pinned", "idle"), rows, title=shown)


def _health(stats: pb.GetStatsResponse) -> Text:
    found = warnings(stats)
    if not found:
        return Text("nothing to report", "green")
    return Text("\n".join(f"! {line}" for line in found), "yellow")
