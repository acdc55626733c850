"""Answers for people (rich tables) and for programs (JSON)."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import click
from google.protobuf.message import Message
from rich import box
from rich.console import Console
from rich.table import Table

from kvstore.sizes import format_size

_PIPE_WIDTH = 1000  # nobody looks at a pipe: cells must not be cut to a guessed screen
_COUNTS = (str.isdigit, lambda cell: cell.endswith(("%", "B", "×")) and cell[:1].isdigit())


def console() -> Console:
    """A console on stdout that does not cut lines where stdout is a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def plain(value: Any) -> Any:  # noqa: ANN401 (any protobuf value)
    """A protobuf value as JSON can hold it: bytes in hex, numbers as numbers, every field present."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, Message):
        return {field.name: plain(getattr(value, field.name)) for field in value.DESCRIPTOR.fields}
    if isinstance(value, Mapping):
        return {key: plain(value[key]) for key in sorted(value)}
    return [plain(item) for item in value]


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> Table:
    """A table without lines; columns of numbers stand right."""
    cells = [[str(cell) for cell in row] for row in rows]
    lines = box.SIMPLE_HEAD if sys.stdout.isatty() else None  # a pipe gets bare columns
    made = Table(title=title, title_justify="left", box=lines, pad_edge=False, padding=(0, 2, 0, 0))
    for index, heading in enumerate(headings):
        numbers = bool(cells) and all(_is_count(row[index]) for row in cells)
        last = index == len(headings) - 1  # the one that may be broken where a screen is narrow
        made.add_column(heading, justify="right" if numbers else "left", no_wrap=not last, overflow="fold")
    for row in cells:
        made.add_row(*row)
    return made


@contextlib.contextmanager
def progress(title: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, while that is a terminal; yields what advances it."""
    hidden = not (shown and sys.stderr.isatty())
    steps = max(1, total // 1000)  # drawn no more often
    with click.progressbar(
        length=max(total, 1), label=title, file=sys.stderr, hidden=hidden, update_min_steps=steps
    ) as made:
        yield made.update


def bar(used: int, capacity: int, width: int = 24) -> str:
    """How full, as a bar in eighths of a character."""
    share = min(1.0, used / capacity) if capacity else 0.0
    eighths = round(share * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")).ljust(width, "·")


def percent(part: int, whole: int) -> str:
    """A share in per cent, "-" of nothing."""
    return f"{100 * part / whole:.1f}%" if whole else "-"


def duration(milliseconds: float) -> str:
    """A span of time in its two largest units: 2d 3h, 4m 5s, 300ms."""
    if milliseconds < 1000:
        return f"{milliseconds:.0f}ms"
    rest, parts = int(milliseconds // 1000), []
    for unit, seconds in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, seconds)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])


def size(nbytes: int) -> str:
    """Bytes for people."""
    return format_size(nbytes)


def _is_count(cell: str) -> bool:
    return cell in ("-", "") or any(test(cell.replace(".", "", 1)) for test in _COUNTS)
