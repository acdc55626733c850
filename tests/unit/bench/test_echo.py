"""The round trip that calls are compared with."""

from __future__ import annotations

import pytest

from kvstore.bench.echo import Echo


def test_an_echo_comes_back_and_its_process_ends() -> None:
    with Echo() as echo:
        for _ in range(3):
            echo()
        process = echo._process
        assert process.poll() is None
    assert process.returncode == 0


def test_an_echo_whose_process_is_gone_says_so() -> None:
    with Echo() as echo:
        echo._process.kill()
        echo._process.wait()
        with pytest.raises(OSError, match=r"ended|reset|Broken pipe"):
            echo()
