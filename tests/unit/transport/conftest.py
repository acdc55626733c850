"""Transports over the engine double."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from transport_double import Setup


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Setup]]:
    """Starts transports; keyword arguments are those of TransportConfig, `limits` a dict."""
    setups: list[Setup] = []

    def build(start: bool = True, **changes: object) -> Setup:
        setup = Setup(tmp_path, **changes)
        setups.append(setup)
        if start:
            setup.transport.start()
        return setup

    yield build
    for setup in setups:
        setup.close()


@pytest.fixture
def setup(make: Callable[..., Setup]) -> Setup:
    """One that runs, with the defaults."""
    return make()
