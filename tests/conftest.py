"""What every test may use: sample data, a printed seed, an audit of pickle."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from pickle_audit import PickleAudit

# No deadline: on a loaded two-core machine an example may take a hundred times its usual time.
settings.register_profile(
    "ci", derandomize=False, print_blob=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("ci"), max_examples=2000)
settings.load_profile("ci")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Draw the seed of all property tests here, so that the header can say how to repeat the run."""
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(1 << 32))


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Seed, profile and sample data of this run."""
    data = os.environ.get("KVTIER_DATA")
    return [
        f"hypothesis: --hypothesis-profile={settings.get_current_profile_name()} "
        f"--hypothesis-seed={config.getoption('hypothesis_seed')} repeats this run",
        f"sample data: {data or 'none (KVTIER_DATA is not set)'}",
    ]


@pytest.fixture(scope="session")
def kvtier_data() -> Path:
    """The folder of sample data (kv_samples/, traces/); skips the test where KVTIER_DATA names none."""
    named = os.environ.get("KVTIER_DATA")
    if not named:
        pytest.skip("KVTIER_DATA is not set: no sample data (kv_samples/, traces/) to test with")
    folder = Path(named)
    if not folder.is_dir():
        pytest.fail(f"KVTIER_DATA={named} is not a folder")
    return folder.resolve()


@pytest.fixture
def pickle_audit(tmp_path: Path) -> PickleAudit:
    """An audit for processes that the test starts with its environment()."""
    folder = tmp_path / "pickle_audit"
    folder.mkdir()
    return PickleAudit(folder)
