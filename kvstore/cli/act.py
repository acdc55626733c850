"""kvctl verbs that act: pin, unpin, set, evict, resize, flush, verify, compact, drain, log-level."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping

import click

from kvstore.cli import render
from kvstore.cli.admin_client import AdminClient
from kvstore.cli.look import parse_key_prefix, terms_text
from kvstore.cli.options import EXIT_FAILED, Options
from kvstore.cli.session import connected
from kvstore.protocol.errors import DeadlineExceeded, InvalidRequest
from kvstore.sizes import format_size, parse_size
from kvstore.v1 import admin_pb2 as pb
from kvstore.v1 import types_pb2

_TIERS = {"hot": types_pb2.TIER_HOT, "warm": types_pb2.TIER_WARM, "cold": types_pb2.TIER_COLD}
_CHECKED = ("checked", "corrupt", "missing", "repaired")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_ANSWER_MARGIN_S = 5.0  # the daemon answers at its own time-out; ours must not come first


def evict(options: Options, tier: str, size: str) -> int:
    """Free `size` bytes of a tier."""
    nbytes = _parsed(size)
    with connected(options) as client:
        reply = client.call("Evict", pb.EvictRequest(tier=_TIERS[tier], bytes=nbytes), timeout_s=60.0)
    _tell(options, reply, f"evicted {reply.blocks} blocks, {format_size(reply.bytes)}, from {tier}")
    return 0


def pin(options: Options, key: str, *, pinned: bool) -> int:
    """Pin a block softly, or unpin it; `key` in hex, an even number of digits of it are sent."""
    digits = parse_key_prefix(key)
    if len(digits) % 2:
        raise InvalidRequest(f"{key!r} has an odd number of hex digits; give one more or one less")
    with connected(options) as client:
        reply = client.call("Pin", pb.PinRequest(key=bytes.fromhex(digits), unpin=not pinned))
    _tell(options, reply, f"{'pinned' if pinned else 'unpinned'} {reply.key.hex()}")
    return 0


def set_terms(
    options: Options, namespace: str, priority: str | None, ttl: str | None, sizes: Mapping[str, str | None]
) -> int:
    """Say how a namespace is treated; what is None stays as it is."""
    terms = types_pb2.NamespaceTerms()
    if priority is not None:
        terms.priority = types_pb2.Priority.Value(f"PRIORITY_{priority.upper()}")
    if ttl is not None:
        terms.ttl_ms = round(parse_duration(ttl) * 1000)
    for name, size in sizes.items():
        if size is not None:
            setattr(terms, name, _parsed(size))
    digits = parse_key_prefix(namespace)
    with connected(options) as client:
        known = client.call("ListNamespaces", pb.ListNamespacesRequest()).namespaces
        found = [item.namespace for item in known if item.namespace.hex().startswith(digits)]
        if len(found) != 1:
            raise InvalidRequest(
                f"{len(found)} namespaces begin with {digits}; `kvctl namespaces` lists those there are"
            )
        reply = client.call("SetTerms", pb.SetTermsRequest(namespace=found[0], terms=terms))
    _tell(options, reply, f"namespace {found[0].hex()[:12]}: {terms_text(reply.terms)}")
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


def parse_duration(text: str) -> float:
    """Seconds of "90", "90s", "1.5h", "30d".

    Raises:
        InvalidRequest: it is none.
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)\s*([smhd]?)", text.strip())
    if found is None:
        raise InvalidRequest(f"{text!r} is not a time; write seconds, or a number with s, m, h or d, as 90s or 30d")
    return float(found[1]) * _UNIT_S[found[2] or "s"]


def _parsed(size: str) -> int:
    try:
        return parse_size(size)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


def _tell(options: Options, reply: object, sentence: str) -> None:
    if options.json:
        render.print_json(render.plain(reply))
    else:
        click.echo(sentence)
