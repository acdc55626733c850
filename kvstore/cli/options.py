"""What every kvctl verb shares: where the daemon is, how to answer, and which exit code an error gets.

Imports click only: `kvctl --help` must answer at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any

import click

from kvstore.protocol.errors import DeadlineExceeded, InvalidRequest, KVStoreError, Unavailable

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3


@dataclass(frozen=True, slots=True)
class Options:
    """Options that may stand before or after the verb.

    Attributes:
        address: unix:/path; None: look at the usual places.
        output: "table" for people, "json" for programs.
    """

    address: str | None = None
    output: str = "table"

    @property
    def json(self) -> bool:
        """Whether the answer is for a program."""
        return self.output == "json"


def shared_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --address, -o and --json to a command."""
    where = "Daemon, as unix:/path.  [default: $KVSTORE_ADDRESS, else where kvstored puts its socket]"
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Short for -o json."),
        click.option("-o", "--output", type=click.Choice(["table", "json"]), help="For people or for programs."),
        click.option("--address", metavar="ADDR", help=where),
    ):
        function = option(function)
    return function


def merged(context: click.Context, address: str | None, output: str | None, as_json: bool) -> Options:
    """What was given after the verb, else before it, else the defaults."""
    before = context.obj if isinstance(context.obj, Options) else Options()
    return Options(address or before.address, "json" if as_json else output or before.output)


def verb(group: click.Group, name: str) -> Callable[[Callable[..., int]], click.Command]:
    """Register a function of (options, **arguments) as a verb of `group`; its errors become exit codes."""

    def register(function: Callable[..., int]) -> click.Command:
        @click.pass_context
        def run(context: click.Context, /, **given: Any) -> None:  # noqa: ANN401 (one type per option)
            options = merged(context, given.pop("address"), given.pop("output"), given.pop("as_json"))
            try:
                code = function(options, **given)
            except KVStoreError as error:
                click.echo(f"kvctl: {error}", err=True)
                code = exit_code(error)
            context.exit(code)

        return group.command(name)(shared_options(update_wrapper(run, function)))

    return register


def exit_code(error: KVStoreError) -> int:
    """0 ok, 1 failed, 2 used wrongly, 3 the daemon cannot be reached."""
    if isinstance(error, Unavailable | DeadlineExceeded):
        return EXIT_UNREACHABLE
    if type(error) is InvalidRequest:
        return EXIT_USAGE
    return EXIT_FAILED
