"""kvctl verbs that look: ping, status, stats, tiers, namespaces, sessions, inspect."""

from __future__ import annotations

import time
from typing import Any

import click

from kvstore.cli import render
from kvstore.cli.options import EXIT_FAILED, Options
from kvstore.cli.session import connected
from kvstore.cli.status import status_screen
from kvstore.protocol.errors import InvalidRequest
from kvstore.v1 import admin_pb2 as pb
from kvstore.v1 import types_pb2

TIERS = ("hot", "warm", "cold")
_KEY_DIGITS = 64
_KEY_DIGITS_MIN = 8


def ping(options: Options) -> int:
    """Attach, ask for the health over gRPC, and say how long both took."""
    with connected(options) as client:
        started = time.perf_counter()
        health = client.stats().health
        answer = {
            "address": client.address,
            "version": client.hello.server_version,
            "instance_id": client.hello.instance_id,
            "health": health,
            "attach_ms": round(client.attach_ms, 3),
            "grpc_ms": round((time.perf_counter() - started) * 1e3, 3),
        }
    if options.json:
        render.print_json(answer)
    else:
        click.echo(
            f"kvstored {answer['version']} at {answer['address']} is {health}: "
            f"attached in {answer['attach_ms']:.1f} ms, answered in {answer['grpc_ms']:.1f} ms"
        )
    return 0


def status(options: Options) -> int:
    """The screen that answers "is it well, and does it help?"."""
    with connected(options) as client:
        found = client.stats()
        if options.json:
            render.print_json(stats_document(found))
            return 0
        sessions = client.call("ListSessions", pb.ListSessionsRequest()).sessions
        render.console().print(status_screen(found, sessions, client.address))
    return 0


def prometheus(options: Options) -> int:
    """Every counter as Prometheus reads it."""
    from kvstore.telemetry.metrics import Metrics  # its library takes longer to import than a verb to run

    with connected(options) as client:
        click.echo(Metrics(client).render(), nl=False)
    return 0


def stats(options: Options) -> int:
    """Every counter, tiers by name."""
    with connected(options) as client:
        document = stats_document(client.stats())
    if options.json:
        render.print_json(document)
        return 0
    tiers_of = document.pop("tiers")
    rows = [(f"{tier}.{name}", value) for tier, values in tiers_of.items() for name, value in values.items()]
    for name, value in document.items():
        nested = value.items() if isinstance(value, dict) else [("", value)]
        rows += [(f"{name}.{key}".rstrip("."), item) for key, item in nested]
    render.console().print(render.table(("counter", "value"), rows))
    return 0


def tiers(options: Options) -> int:
    """One line a tier."""
    with connected(options) as client:
        found = client.stats()
    if options.json:
        render.print_json(stats_document(found)["tiers"])
        return 0
    rows = [
        (
            tier.name,
            tier.state,
            render.size(tier.used_bytes),
            render.size(tier.capacity_bytes),
            render.percent(tier.used_bytes, tier.capacity_bytes),
            tier.blocks,
            tier.hits,
            tier.evictions,
            tier.corrupt,
            tier.restarts,
            tier.device,
        )
        for tier in found.tiers
    ]
    headings = (
        "tier",
        "state",
        "used",
        "capacity",
        "full",
        "blocks",
        "hits",
        "evictions",
        "corrupt",
        "restarts",
        "device",
    )
    render.console().print(render.table(headings, rows))
    return 0


def namespaces(options: Options) -> int:
    """One line a namespace."""
    with connected(options) as client:
        found = client.call("ListNamespaces", pb.ListNamespacesRequest()).namespaces
    if options.json:
        render.print_json(render.plain(found))
        return 0
    rows = [
        (
            item.namespace.hex()[:12],
            item.tenant,
            item.spec.model,
            item.spec.revision,
            ",".join(f"{shard.axis}={shard.rank}/{shard.size}" for shard in item.spec.shard) or "all",
            item.spec.block_tokens,
            render.size(item.block_nbytes),
            item.blocks,
            render.size(item.warm_bytes),
            render.size(item.cold_bytes),
            item.epoch,
            terms_text(item.terms),
        )
        for item in found
    ]
    headings = (
        "namespace",
        "tenant",
        "model",
        "revision",
        "shard",
        "tokens",
        "block",
        "blocks",
        "warm",
        "cold",
        "epoch",
        "terms",
    )
    render.console().print(render.table(headings, rows))
    return 0


def sessions(options: Options) -> int:
    """One line a session."""
    with connected(options) as client:
        found = client.call("ListSessions", pb.ListSessionsRequest()).sessions
    if options.json:
        render.print_json(render.plain(found))
        return 0
    rows = [
        (
            item.session_id,
            item.client_name,
            item.pid,
            item.uid,
            item.tenant,
            item.leases,
            item.pinned_blocks,
            render.size(item.staging_bytes),
            render.duration(item.age_ms),
            render.duration(item.idle_ms),
            item.calls,
        )
        for item in found
    ]
    headings = ("session", "name", "pid", "uid", "tenant", "leases", "pinned", "staging", "age", "idle", "calls")
    render.console().print(render.table(headings, rows))
    return 0


def inspect(options: Options, key: str) -> int:
    """Every block whose key begins with `key` (hex)."""
    digits = parse_key_prefix(key)
    whole = digits[: len(digits) // 2 * 2]
    with connected(options) as client:
        reply = client.call("InspectBlock", pb.InspectBlockRequest(key=bytes.fromhex(whole)))
    found = [block for block in reply.blocks if block.key.hex().startswith(digits)]
    if options.json:
        render.print_json(render.plain(found))
    elif found:
        for block in found:
            rows = [(name, _told(name, value)) for name, value in render.plain(block).items()]
            render.console().print(render.table(("field", "value"), rows))
    if not found:
        click.echo(f"kvctl: no block here has a key that begins with {digits}", err=True)
        return EXIT_FAILED
    return 0


def terms_text(terms: types_pb2.NamespaceTerms) -> str:
    """How a namespace is treated, in words."""
    said = [types_pb2.Priority.Name(terms.priority).removeprefix("PRIORITY_").lower()] if terms.priority else []
    if terms.ttl_ms:
        said.append(f"ttl {render.duration(terms.ttl_ms)}")
    said += [
        f"{tier} ≤ {render.size(limit)}"
        for tier, limit in (("warm", terms.warm_bytes), ("cold", terms.cold_bytes))
        if limit
    ]
    return ", ".join(said) or "normal"


def parse_key_prefix(text: str) -> str:
    """Lower-case hex digits of a key or of its beginning.

    Raises:
        InvalidRequest: not hex, or of a length that cannot be.
    """
    digits = text.lower().removeprefix("0x").rstrip("….")
    if not digits or set(digits) - set("0123456789abcdef"):
        raise InvalidRequest(f"{text!r} is not a key in hex")
    if not _KEY_DIGITS_MIN <= len(digits) <= _KEY_DIGITS:
        raise InvalidRequest(
            f"a key has {_KEY_DIGITS} hex digits, of which {_KEY_DIGITS_MIN} at least are needed; got {len(digits)}"
        )
    return digits


def stats_document(found: pb.GetStatsResponse) -> dict[str, Any]:
    """The answer of GetStats as JSON: tiers by name, all three of them, and every other counter by its name."""
    document = render.plain(found)
    by_name = {tier: render.plain(pb.TierStats(name=tier, state="off")) for tier in TIERS}
    by_name |= {tier["name"]: tier for tier in document.pop("tiers")}
    for values in by_name.values():
        values.pop("name")
    return {"tiers": by_name, **document}


def _told(name: str, value: object) -> object:
    if name == "parent" and not value:
        return "(root)"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "nowhere"
    return render.size(value) if name.endswith("bytes") and isinstance(value, int) else value
