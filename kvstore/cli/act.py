"""kvctl verbs that act: evict, resize, flush, verify, compact, drain, log-level."""

from __future__ import annotations

import time
from collections.abc import Iterator

import click

from kvstore.cli import render
from kvstore.cli.admin_client import AdminClient
from kvstore.cli.options import EXIT_FAILED, Options
from kvstore.cli.session import connected
from kvstore.protocol.errors import DeadlineExceeded, InvalidRequest
from kvstore.sizes import format_size, parse_size
from kvstore.v1 import admin_pb2 as pb
from kvstore.v1 import types_pb2

_TIERS = {"hot": types_pb2.TIER_HOT, "warm": types_pb2.TIER_WARM, "cold": types_pb2.TIER_COLD}
_CHECKED = ("checked", "corrupt", "missing", "repaired")
_ANSWER_MARGIN_S = 5.0  # the daemon answers at its own time-out; ours must not come first


def evict(options: Options, tier: str, size: str) -> int:
    """Free `size` bytes of a tier."""
    try:
        nbytes = parse_size(size)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    with connected(options) as client:
        reply = client.call("Evict", pb.EvictRequest(tier=_TIERS[tier], bytes=nbytes), timeout_s=60.0)
    _tell(options, reply, f"evicted {reply.blocks} blocks, {format_size(reply.bytes)}, from {tier}")
    return 0


def flush(options: Options, timeout_s: float) -> int:
    """Save warm blocks below; 1 if some are still unsaved."""
    with connected(options) as client:
        request = pb.FlushRequest(timeout_ms=round(timeout_s * 1e3))
        reply = client.call("Flush", request, timeout_s=timeout_s + _ANSWER_MARGIN_S)
    _tell(options, reply, f"saved {reply.saved} blocks, {reply.unsaved} are still unsaved")
    return EXIT_FAILED if reply.unsaved else 0


def verify(options: Options, tier: str, timeout_s: float, *, repair: bool) -> int:
    """Check a tier's checksums; 1 if a block was damaged, and is not repaired."""
    total = pb.VerifyResponse()
    with connected(options) as client:
        blocks = next(found.blocks for found in client.stats().tiers if found.name == tier)
        request = pb.VerifyRequest(tier=_TIERS[tier], repair=repair)
        with render.progress(f"checking {tier}", blocks, shown=not options.json) as advance:
            for page in _pages(client, request, time.monotonic() + timeout_s):
                advance(page.checked + page.missing)
                for count in _CHECKED:
                    setattr(total, count, getattr(total, count) + getattr(page, count))
    if options.json:
        render.print_json({count: getattr(total, count) for count in _CHECKED})
    else:
        click.echo(_verdict(tier, total))
    return EXIT_FAILED if total.corrupt + total.missing > total.repaired else 0


def resize(options: Options, change: str) -> int:
    """Give a tier another capacity; `change` is "hot=4GiB"."""
    tier, equals, size = change.partition("=")
    if tier not in _TIERS or not equals:
        raise InvalidRequest(f"{change!r}: write for example hot=4GiB")
    try:
        nbytes = parse_size(size)
    except ValueError as error:
        raise InvalidRequest(f"{change}: {error}") from error
    with connected(options) as client:
        reply = client.call("Resize", pb.ResizeRequest(tier=_TIERS[tier], capacity_bytes=nbytes))
    short = "" if reply.capacity_bytes == nbytes else f", not {format_size(nbytes)}"
    _tell(options, reply, f"{tier} has {format_size(reply.capacity_bytes)}{short}")
    return 0


def compact(options: Options, timeout_s: float) -> int:
    """Rewrite the cold tier's files without what they no longer need."""
    with connected(options) as client:
        reply = client.call("Compact", pb.CompactRequest(), timeout_s=timeout_s)
    _tell(
        options,
        reply,
        f"the cold tier takes {format_size(reply.after_bytes)}; it was {format_size(reply.before_bytes)}",
    )
    return 0


def _pages(client: AdminClient, request: pb.VerifyRequest, deadline_s: float) -> Iterator[pb.VerifyResponse]:
    """One page after the other until the daemon says that there are no more.

    Raises:
        DeadlineExceeded: not all of it by `deadline_s` (time.monotonic).
    """
    while True:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded("not every block could be checked in time; give a longer --timeout")
        page: pb.VerifyResponse = client.call("Verify", request, timeout_s=left_s)
        yield page
        if not page.last:
            return
        request.after = page.last


def _verdict(tier: str, found: pb.VerifyResponse) -> str:
    if not found.corrupt + found.missing:
        return f"checked {found.checked} blocks of {tier}: all are good"
    cure = f"{found.repaired} repaired" if found.repaired else "run it again with --repair to drop them"
    return f"checked {found.checked} blocks of {tier}: {found.corrupt} corrupt, {found.missing} missing; {cure}"


def drain(options: Options) -> int:
    """Refuse new blocks from now on."""
    with connected(options) as client:
        reply = client.call("Drain", pb.DrainRequest())
    _tell(options, reply, "draining: new blocks are refused, stored ones are still served; stop it with SIGTERM")
    return 0


def log_level(options: Options, level: str) -> int:
    """Set the daemon's log level."""
    with connected(options) as client:
        reply = client.call("SetLogLevel", pb.SetLogLevelRequest(level=level.lower()))
    _tell(options, reply, f"log level is {reply.level}")
    return 0


def _tell(options: Options, reply: object, sentence: str) -> None:
    if options.json:
        render.print_json(render.plain(reply))
    else:
        click.echo(sentence)
