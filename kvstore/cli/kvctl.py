"""kvctl: look at a running daemon, and give it orders.

Exit codes: 0 done, 1 failed, 2 used wrongly, 3 no daemon answers. Only click is imported here; a verb imports
what it needs when it runs, so that `kvctl --help` costs no more than Python itself.
"""

from __future__ import annotations

import click

from kvstore.cli.options import Options, merged, shared_options, verb

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_TIER = click.Choice(["hot", "warm", "cold"])


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
def stats(options: Options) -> int:
    """Every counter of the daemon."""
    from kvstore.cli import look

    return look.stats(options)


@verb(main, "tiers")
def tiers(options: Options) -> int:
    """What the hot, warm and cold tier hold."""
    from kvstore.cli import look

    return look.tiers(options)


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
@click.argument("tier", type=_TIER)
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(1, 86400), default=600.0, show_default=True, help="Seconds."
)
def verify(options: Options, tier: str, timeout_s: float) -> int:
    """Check every block of TIER against its checksum; exit code 1 if one was wrong."""
    from kvstore.cli import act

    return act.verify(options, tier, timeout_s)


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
@click.option("--list", "listing", is_flag=True, help="Name the suites and end.")
def bench(
    options: Options, suites: tuple[str, ...], spawn: bool, quick: bool, warm_bytes: str | None, listing: bool
) -> int:
    """Measure SUITEs (all of them where none is named) against memcpy in the same run."""
    from kvstore.cli import measure

    return measure.bench(options, suites, spawn=spawn, quick=quick, warm_bytes=warm_bytes, listing=listing)


if __name__ == "__main__":
    main(prog_name="kvctl")
