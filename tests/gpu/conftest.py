"""What only a CUDA machine can run; skipped with the reason anywhere else."""

from __future__ import annotations

from functools import lru_cache

import pytest

from daemon_fixtures import start_daemon
from kvstore.protocol.cuda_calls import CudaError
from kvstore.tiers.cuda import CudaDevice

__all__ = ["start_daemon"]


@lru_cache
def reason_to_skip() -> str:
    """Why nothing here can run; empty where it can."""
    try:
        CudaDevice("cuda:0").close()
    except CudaError as error:
        return str(error)
    import torch

    if not torch.cuda.is_available():
        return "this torch cannot use the CUDA device"
    torch.zeros(1, device="cuda")  # its context stays, whatever tiers come and go
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = reason_to_skip()
    if reason:
        pytest.skip(f"no CUDA device: {reason}")
