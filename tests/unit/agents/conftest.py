from __future__ import annotations

from collections.abc import Iterator

import pytest

from served_agent import Served


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.close()


@pytest.fixture
def served_hot() -> Iterator[Served]:
    made = Served(durable=False)
    yield made
    made.close()
