"""Runs, without the daemons: what is chosen, and what one failure leaves of the rest."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.bench import footprint
from kvstore.bench.figures import Result
from kvstore.bench.runner import Bench
from kvstore.bench.scale import QUICK, Scale


def quiet(what: str) -> None:
    assert what


def help_result(name: str, scale: Scale) -> Result:
    return Result(name, {"seconds": 0.1})


def test_one_failure_leaves_the_other_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, scale: Scale) -> Result:
        raise OSError("no process")

    monkeypatch.setattr(footprint, "import_ratio", fail)
    monkeypatch.setattr(footprint, "kvctl_help", help_result)
    report: dict[str, Any] = Bench(["import_ratio", "kvctl_help_s"], QUICK, quiet).run()
    assert report["failures"] == {"import_ratio": "OSError: no process"}
    assert [(result["name"], result["ok"]) for result in report["results"]] == [("kvctl_help_s", True)]
    assert report["memcpy_gb_s"] is None
    assert report["environment"]["cores"] >= 1


def test_a_running_daemon_is_not_filled_to_the_brim() -> None:
    with pytest.raises(ValueError, match="put_spill: needs a daemon of its own; give --spawn"):
        Bench(["put_spill"], QUICK, quiet, address="unix:/live")


def test_a_group_that_ends_early_names_everything_it_lacks() -> None:
    bench = Bench(["get"], QUICK, quiet, address="unix:/nowhere/k.sock")
    report: dict[str, Any] = bench.run()
    assert report["results"] == []
    assert set(report["failures"]) == {"get_256", "get_64", "get_8", "get_1"}
    assert all(reason.startswith("Unavailable: ") for reason in bench.failures.values())
