"""From an agent's configuration to the tier that it serves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kvstore.agents.compiling import CompilingFormat, give_back_heap
from kvstore.agents.devices import Wanted, device_for
from kvstore.agents.loads import Loads, PausingFormat
from kvstore.agents.memory import MappedSlabs
from kvstore.protocol.errors import InvalidRequest
from kvstore.tiers.base import BlockRef, Checkable, ReadAhead, StoredRecord, Tier
from kvstore.v1 import agent_pb2

READER_THREADS_MAX = 16
_READER_THREADS_DEFAULT_MAX = 4


class Durable(Checkable, Protocol):
    """What a tier has that keeps its blocks across restarts."""

    @property
    def failure(self) -> str:
        """Why only opening it anew, in another process, can help; empty while there is nothing wrong."""

    def scan(self, after: BlockRef | None = None) -> Iterator[StoredRecord]:
        """Every record behind `after`, ordered by namespace and key; holds nothing open between two of them."""

    def flush(self) -> None:
        """Return once everything written before is durable. Raises OSError."""


@dataclass(frozen=True, slots=True)
class Medium:
    """A tier ready to serve; `durable` and `ahead` are the same tier, where it is one.

    `resize` gives it another capacity and says what it is then (None: it cannot); `loads` counts what is being read
    from it; `stats` is what there is to count beside the tier; `format` says to people how blocks are written.
    """

    tier: Tier
    durable: Durable | None = None
    ahead: ReadAhead | None = None
    device: str = ""
    loads: Loads = field(default_factory=Loads)
    stats: Callable[[], Mapping[str, int]] = dict
    resize: Callable[[int], int] | None = None
    format: str = ""


def reader_threads(config: agent_pb2.AgentConfig) -> int:
    """How many threads read blocks.

    Raises:
        InvalidRequest: `config` asks for too many.
    """
    if config.reader_threads > READER_THREADS_MAX:
        raise InvalidRequest(f"{config.reader_threads} reader threads; the limit is {READER_THREADS_MAX}")
    cores = len(os.sched_getaffinity(0))
    return config.reader_threads or min(cores, _READER_THREADS_DEFAULT_MAX)


def open_medium(config: agent_pb2.AgentConfig, memory: MappedSlabs) -> Medium:
    """Open what `config` names.

    Raises:
        InvalidRequest: it names nothing that there is.
        ValueError: the codec is not known.
        OSError: the medium cannot be used.
    """
    if config.capacity_bytes < 1 and not config.capacity_permille:
        raise InvalidRequest(f"the {config.tier} tier needs a capacity of more than 0 bytes")
    if config.tier == "cold":
        return _open_cold(config, memory)
    if config.tier == "hot":
        wanted = Wanted(config.capacity_bytes, config.capacity_permille)
        tier, device = device_for(config.device).make_tier(wanted, memory)
        return Medium(tier, device=device, resize=tier.resize)
    raise InvalidRequest(f"unknown tier {config.tier!r}; agents serve cold and hot")


def _open_cold(config: agent_pb2.AgentConfig, memory: MappedSlabs) -> Medium:
    # Here and not above: a hot agent has no use for lmdb and zstandard.
    from kvstore.codec.frame import FrameFormat  # noqa: PLC0415
    from kvstore.tiers.cold import LmdbOptions, LmdbTier  # noqa: PLC0415
    from kvstore.tiers.disk_rate import read_bytes_s  # noqa: PLC0415

    if not config.path:
        raise InvalidRequest("the cold tier needs a path")
    path = Path(config.path)
    if path.exists() and not path.is_dir():
        raise InvalidRequest(f"the cold tier's path {path} is not a directory")
    readers, disk = config.reader_threads or 2, read_bytes_s(path) if path.exists() else 0.0
    try:
        frames = FrameFormat(config.codec or "auto", numba=config.kernels == "numba", ssd_bytes_s=disk, readers=readers)
    except ImportError as error:
        raise InvalidRequest(f"codec_kernels numba: {error}") from error
    frames.warm()
    give_back_heap()
    loads = Loads()
    settled = config.kernels in ("numba", "numpy")
    pausing = PausingFormat(frames if settled else CompilingFormat(frames, loads), loads)
    wanted: dict[str, Any] = {
        "durability": config.durability,
        "sync_interval_s": config.sync_interval_ms / 1000,
        "free_reserve_bytes": config.free_reserve_bytes,
    }
    options = LmdbOptions(**{name: value for name, value in wanted.items() if value})
    tier = LmdbTier(path, config.capacity_bytes, memory, pausing, options)
    return Medium(tier, tier, tier, loads=loads, stats=pausing.stats, format=frames.describe())
