"""kvctl verbs that act: evict, flush, verify, drain, log-level."""

from __future__ import annotations

import click

from kvstore.cli import render
from kvstore.cli.options import EXIT_FAILED, Options
from kvstore.cli.session import connected
from kvstore.protocol.errors import InvalidRequest
from kvstore.sizes import format_size, parse_size
from kvstore.v1 import admin_pb2 as pb
from kvstore.v1 import types_pb2

_TIERS = {"hot": types_pb2.TIER_HOT, "warm": types_pb2.TIER_WARM, "cold": types_pb2.TIER_COLD}
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


def verify(options: Options, tier: str, timeout_s: float) -> int:
    """Check a tier's checksums; 1 if one was wrong."""
    with connected(options) as client:
        reply = client.call("Verify", pb.VerifyRequest(tier=_TIERS[tier]), timeout_s=timeout_s)
    _tell(options, reply, f"checked {reply.checked} blocks of {tier}, {reply.corrupt} were corrupt and are dropped")
    return EXIT_FAILED if reply.corrupt else 0


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
