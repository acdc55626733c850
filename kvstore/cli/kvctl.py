"""kvctl: look at a running daemon, and give it orders.

Exit codes: 0 done, 1 failed, 2 used wrongly, 3 no daemon answers. Only click is imported here; a verb imports
what it needs when it runs, so that `kvctl --help` costs no more than Python itself.
"""

from __future__ import annotations

from typing import Any

import click

from kvstore.cli.options import Options, merged, shared_options, verb
from kvstore.protocol.errors import InvalidRequest

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_TIER = click.Choice(["hot", "warm", "cold"])
_LONG_TIMEOUT = click.option(
    "--timeout", "timeout_s", type=click.FloatRange(1, 86400), default=3600.0, show_default=True, help="Seconds."
)


@click.group(context_settings=_CONTEXT)
@shared_options
@click.version_option(package_name="kvtier", prog_name="kvctl")
@click.pass_context
def main(context: click.Context, address: str | None, output: str | None, as_json: bool) -> None:
    """Look at a kvstored daemon, and give it orders.

    Exit codes: 0 done, 1 failed, 2 used wrongly, 3 no daemon answers.
    """
    context.obj = merged(context, address, output, as_json)


@verb(main, "ping")
def ping(options: Options) -> int:
    """Is the daemon there, and does it serve?"""
    from kvstore.cli import look

    return look.ping(options)


@verb(main, "status")
def status(options: Options) -> int:
    """One screen: tiers, hit ratios, sessions, health."""
    from kvstore.cli import look

    return look.status(options)


@verb(main, "stats")
@click.option("--prometheus", is_flag=True, help="In Prometheus's text format, as for its node exporter's text files.")
def stats(options: Options, prometheus: bool) -> int:
    """Every counter of the daemon."""
    from kvstore.cli import look

    return look.prometheus(options) if prometheus else look.stats(options)


@verb(main, "tiers")
@click.argument("change", nargs=-1, metavar="[resize hot=SIZE]")
def tiers(options: Options, change: tuple[str, ...]) -> int:
    """What the hot, warm and cold tier hold; with `resize hot=4GiB` the hot tier has that size from now on."""
    from kvstore.cli import act, look

    if not change:
        return look.tiers(options)
    if len(change) != 2 or change[0] != "resize":
        raise InvalidRequest(f"tiers {' '.join(change)}: write for example tiers resize hot=4GiB")
    return act.resize(options, change[1])


@verb(main, "namespaces")
def namespaces(options: Options) -> int:
    """Which models and layouts have blocks here."""
    from kvstore.cli import look

    return look.namespaces(options)


@verb(main, "sessions")
def sessions(options: Options) -> int:
    """Which processes are attached, and what they hold."""
    from kvstore.cli import look

    return look.sessions(options)


@verb(main, "inspect")
@click.argument("key")
def inspect(options: Options, key: str) -> int:
    """Where the block KEY is (hex; the first 8 digits are enough)."""
    from kvstore.cli import look

    return look.inspect(options, key)


@verb(main, "pin")
@click.argument("key")
def pin(options: Options, key: str) -> int:
    """Have the block KEY (hex), and the prefix that it ends, leave a tier last, until the daemon ends."""
    from kvstore.cli import act

    return act.pin(options, key, pinned=True)


@verb(main, "unpin")
@click.argument("key")
def unpin(options: Options, key: str) -> int:
    """Let the block KEY (hex) leave as any other."""
    from kvstore.cli import act

    return act.pin(options, key, pinned=False)


@verb(main, "set")
@click.argument("namespace")
@click.option("--priority", type=click.Choice(["low", "normal", "high"]), help="Of a tenant's blocks low leaves first.")
@click.option("--ttl", metavar="TIME", help="Drop what nobody used for so long (90s, 12h, 30d); 0: never.")
@click.option("--warm-bytes", metavar="SIZE", help="That it may hold in warm; 0: as much as its tenant.")
@click.option("--cold-bytes", metavar="SIZE", help="And in cold, as stored.")
def set_terms(
    options: Options,
    namespace: str,
    priority: str | None,
    ttl: str | None,
    warm_bytes: str | None,
    cold_bytes: str | None,
) -> int:
    """Treat NAMESPACE (hex, as `kvctl namespaces` shows it) like this from now on, also after a restart."""
    from kvstore.cli import act

    return act.set_terms(options, namespace, priority, ttl, {"warm_bytes": warm_bytes, "cold_bytes": cold_bytes})


@verb(main, "evict")
@click.argument("tier", type=_TIER)
@click.argument("size")
def evict(options: Options, tier: str, size: str) -> int:
    """Drop the least valuable blocks of TIER until SIZE (512MiB) is freed."""
    from kvstore.cli import act

    return act.evict(options, tier, size)


@verb(main, "flush")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(0, 3600), default=60.0, show_default=True, help="Seconds."
)
def flush(options: Options, timeout_s: float) -> int:
    """Save every warm block below; exit code 1 if some could not be."""
    from kvstore.cli import act

    return act.flush(options, timeout_s)


@verb(main, "verify")
@click.argument("tier", type=_TIER, default="cold")
@click.option("--repair", is_flag=True, help="Drop what is damaged; what warm still has is saved again.")
@_LONG_TIMEOUT
def verify(options: Options, tier: str, repair: bool, timeout_s: float) -> int:
    """Read every block of TIER (cold) and check it; exit code 1 if one is damaged and not repaired."""
    from kvstore.cli import act

    return act.verify(options, tier, timeout_s, repair=repair)


@verb(main, "compact")
@_LONG_TIMEOUT
def compact(options: Options, timeout_s: float) -> int:
    """Give the file system back what the cold tier's files no longer need."""
    from kvstore.cli import act

    return act.compact(options, timeout_s)


@verb(main, "drain")
def drain(options: Options) -> int:
    """Stop taking new blocks and report NOT_SERVING; what is stored can still be read."""
    from kvstore.cli import act

    return act.drain(options)


@verb(main, "log-level")
@click.argument("level", type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False))
def log_level(options: Options, level: str) -> int:
    """Change how much the daemon logs, until it restarts."""
    from kvstore.cli import act

    return act.log_level(options, level)


@verb(main, "bench")
@click.argument("suites", metavar="[SUITE]...", nargs=-1)
@click.option("--spawn", is_flag=True, help="Start a daemon for this, in a folder that is removed afterwards.")
@click.option("--quick", is_flag=True, help="Small sizes and few rounds: does it run? Not for figures.")
@click.option("--warm-bytes", metavar="SIZE", help="Warm pool of the daemon that is started.")
@click.option("--data", metavar="DIR", envvar="KVTIER_DATA", help="Folder with kv_samples, for the suite cold.")
@click.option("--device", default="cuda:0", show_default=True, metavar="cuda:N|cpu", help="Device, for the suite gpu.")
@click.option("--list", "listing", is_flag=True, help="Name the suites and end.")
def bench(options: Options, **given: Any) -> int:  # noqa: ANN401 (one type per option)
    """Measure SUITEs (all but cold and gpu where none is named) against memcpy in the same run."""
    from kvstore.cli import measure

    return measure.bench(options, measure.Run(**given))


@verb(main, "record")
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False))
@click.option("--seconds", type=click.FloatRange(0.1), default=600.0, show_default=True, help="How long.")
@click.option("--max-requests", type=click.IntRange(0), default=0, help="End after so many; 0: any number.")
def record(options: Options, file: str, seconds: float, max_requests: int) -> int:
    """Write what workers ask the daemon for into FILE (new), as a trace for kvctl replay.

    Ctrl-C ends it early. The file holds salted digests of keys, no tokens.
    """
    from kvstore.cli import record as recording

    return recording.record(options, file, seconds, max_requests)


@verb(main, "replay")
@click.argument("trace", metavar="TRACE")
@click.option("--tiers", metavar="hot=…,warm=…,cold=…", help="Capacities in blocks, or sizes with --block-bytes.")
@click.option("--block-bytes", metavar="SIZE", help="Size of a block, so that tiers are sizes and moves have bytes.")
@click.option(
    "--block-tokens", type=click.IntRange(0), default=0, help="Tokens of a block, to know a partial last one."
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=click.Choice(["leaf-lru", "adaptive", "opt", "lru-2", "s3-fifo", "arc"]),
    help="Order of eviction, several for a sweep; the last three are for comparison only.  [default: adaptive]",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Changes the keys of all blocks, and so the samples.")
@click.option("--sweep", is_flag=True, help="Every policy at many sizes of one warm tier.")
@click.option(
    "--capacities", metavar="LIST", default="0.5,1,2,5,10,20,50", show_default=True, help="Of a sweep, in % of blocks."
)
@click.option("--advise", is_flag=True, help="Which capacities pay: hits over size, and a split into warm and cold.")
@click.option(
    "--promote-hits", type=click.IntRange(1), default=2, show_default=True, help="Acquires until a block goes to hot."
)
@click.option("--compare-one", is_flag=True, help="Also try one warm tier of the same size as all --tiers.")
@click.option("--plot", "picture", type=click.Path(dir_okay=False), help="Draw a sweep into a file (PNG, SVG, PDF).")
def replay(options: Options, **given: Any) -> int:  # noqa: ANN401 (one type per option)
    """What tiers of a given size would have done with TRACE (JSONL); no daemon is needed.

    TRACE may also be one that is made on the spot: loops, bursts, drift, alternating.
    """
    from kvstore.cli import replay as replaying

    return replaying.replay(options, replaying.Question(**given))


if __name__ == "__main__":
    main(prog_name="kvctl")
