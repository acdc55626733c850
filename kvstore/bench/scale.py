"""How much a run measures: full figures, or a quick look whether it runs."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes and counts of a run.

    Attributes:
        working_set_bytes: of every transfer; 512 MiB is what "memcpy" means in this project.
        rounds: of a transfer, each with a memcpy of its own.
        calls: one-key calls for a latency.
        batch_keys: keys of the large match.
        idle_s: how long an idle daemon is watched.
        processes: subprocesses started for each median of the footprint.
        warm_bytes: pool of a spawned daemon.
        cold_blocks: of 16 KiB, in the cold tier that a daemon is restarted on.
    """

    working_set_bytes: int = 512 * MIB
    rounds: int = 9
    calls: int = 3000
    batch_keys: int = 8192
    idle_s: float = 10.0
    processes: int = 9
    warm_bytes: int = 2048 * MIB
    cold_blocks: int = 100_000

    @property
    def is_full(self) -> bool:
        """Whether figures of this scale are comparable with the targets."""
        return self == Scale(warm_bytes=self.warm_bytes)


FULL = Scale()
QUICK = Scale(
    working_set_bytes=16 * MIB,
    rounds=3,
    calls=50,
    batch_keys=512,
    idle_s=1.0,
    processes=1,
    warm_bytes=192 * MIB,
    cold_blocks=4096,
)
