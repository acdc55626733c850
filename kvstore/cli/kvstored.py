"""kvstored: the daemon's command line. Runs in the foreground; SIGTERM drains it.

Exit codes: 0 drained and stopped, 1 could not start, 2 the configuration cannot be used.
"""

from __future__ import annotations

import click

from kvstore.config import Config, ConfigError, load, prepare_state_dir, quiet_grpc

EXIT_FAILED = 1
EXIT_CONFIG = 2
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.command(context_settings=_CONTEXT)
@click.option(
    "--config", "config_file", metavar="FILE", help="TOML file; flags win over it.  [default: $KVSTORE_CONFIG]"
)
@click.option("--state-dir", metavar="DIR", help="Where the cold tier and the lock live; for this daemon alone.")
@click.option("--socket", metavar="PATH", help="Unix socket for gRPC; PATH.attach is the workers' door.")
@click.option(
    "--socket-mode", metavar="MODE", help="Permissions of both sockets, in octal.  [default: 0600, with a group 0660]"
)
@click.option("--socket-group", metavar="GROUP", help="Group of both sockets; its members may attach.")
@click.option("--warm-bytes", metavar="SIZE", help="Shared memory, as 8GiB.  [default: a quarter of what is available]")
@click.option(
    "--cold-bytes",
    metavar="SIZE",
    help="Disk, as 64GiB; 0 for none.  [default: a quarter of what is free, at most 64GiB]",
)
@click.option(
    "--hot-bytes",
    metavar="SIZE|PERCENT",
    help="Memory of the GPU, or a share of what is free there, as 50%.  [default: 2GiB where there is a device]",
)
@click.option(
    "--hot-device",
    metavar="auto|off|cpu|cuda:N",
    help="GPU of the hot tier; auto is the first one, or off.  [default: auto]",
)
@click.option(
    "--listen",
    metavar="HOST:PORT",
    help="TCP for workers on other hosts; needs identities, see SECURITY.md.  [default: off]",
)
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error.  [default: info]")
@click.version_option(package_name="kvtier", prog_name="kvstored")
@click.pass_context
def main(context: click.Context, /, config_file: str | None, **flags: str | None) -> None:
    """Keep KV-cache blocks of inference workers in GPU memory, shared memory and on disk.

    Prints one line with its address when it is ready, and its log on stderr. SIGTERM drains it.

    Every flag can stand in the configuration file as well (warm_bytes = "8GiB"). Only there: drain_grace_s,
    reader_threads, codec, staging_max_bytes, staging_total_bytes, max_sessions, policy, promote_hits, cold_daily_bytes,
    tls_certificate, tls_key, tls_client_ca, and tables [tenants.NAME] with uids, gids, warm_bytes, cold_bytes, and for
    --listen sans or token_file, admin_sans or admin_token_file.
    """
    try:
        config = load(flags, config_file)
        prepare_state_dir(config.state_dir)
    except ConfigError as error:
        click.echo(f"kvstored: {error}", err=True)
        context.exit(EXIT_CONFIG)
    context.exit(_run(config))


def _run(config: Config) -> int:
    quiet_grpc()
    from kvstore import app  # numpy and grpc: not for --help, nor for a typing error

    try:
        app.run(config)
    except app.StartError as error:
        click.echo(f"kvstored: {error}", err=True)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    main(prog_name="kvstored")
