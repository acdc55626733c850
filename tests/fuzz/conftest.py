"""The daemon under fuzz, and what was sent to it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest

from fuzz_target import Target, running

_sent: Counter[tuple[str, str, int]] = Counter()


@pytest.fixture(scope="session")
def target() -> Iterator[Target]:
    """One for the whole run: what an earlier test did to it is part of the fuzz."""
    with running() as made:
        yield made
        _sent.update(made.codes)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How often each method was called, and what it answered."""
    by_method: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for (transport, method, code), count in sorted(_sent.items()):
        by_method[transport, method][code] = count
    if by_method:
        terminalreporter.write_sep("-", f"{_sent.total()} fuzzed calls, by code")
    for (transport, method), codes in by_method.items():
        shown = "  ".join(f"{code}: {count}" for code, count in codes.items())
        terminalreporter.write_line(f"{transport:7} {method:15} {shown}")
