"""The core under any order of events: found by hypothesis, and in long random walks."""

from __future__ import annotations

import inspect
import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import event, settings

from core_machine import SPACES, CacheMachine
from core_world import TTL_S, Answer
from kvstore.core.block import COLD, HIGH, HOT, LOW, NORMAL, WARM


class ReportingMachine(CacheMachine):
    """With what was reached in the statistics (--hypothesis-show-statistics)."""

    def teardown(self) -> None:
        super().teardown()
        for what in getattr(self, "seen", ()):
            event(what)


ReportingMachine.TestCase.settings = settings(stateful_step_count=60, max_examples=100)
TestCache = ReportingMachine.TestCase


# -- the same machine in long random walks --------------------------------------------------------------------

STEPS = 350
# Rules by weight: often what fills tiers and leases, seldom what empties them.
WEIGHTS = {
    "put_begin": 4, "put_step": 8, "put": 6, "cool": 6, "match": 4, "acquire": 10, "acquire_two": 6, "prefetch": 2,
    "release": 6, "hand_off": 2, "adopt": 2, "end_session": 1, "time_passes": 2, "delete": 2, "clear": 1, "reap": 4,
    "evict": 4, "load_begin": 8, "load_end": 8, "load_everything": 2, "save_begin": 8, "save_end": 12,
    "learn": 4, "acquire_gated": 10,
    "treat": 2, "pin": 2,
    "save_everything": 1, "agent_restarts": 1, "damage": 1, "reclaim": 2, "memory": 1, "restart": 0.3,
}  # fmt: skip
VALUES: dict[str, Callable[[random.Random], object]] = {
    "name": lambda r: r.choice(SPACES),
    "left": lambda r: r.choice(["chain", "wide", "other"]),
    "right": lambda r: r.choice(SPACES),
    "path": lambda r: "".join(r.choices("aab", k=r.randint(1, 6))),
    "other": lambda r: "".join(r.choices("aab", k=r.randint(1, 6))),
    "start": lambda r: r.choice([0, 0, 1, 2, 3]),
    "stop": lambda r: r.randint(1, 6),
    "which": lambda r: r.randrange(10**6),
    "step": lambda r: r.choice(["copy", "copy", "finish", "cancel"]),
    "session": lambda r: r.randint(1, 3),
    "upto": lambda r: r.choice([0, 1, 2, 3, 6]),
    "last": lambda r: r.random() < 0.5,
    "passed_s": lambda r: r.choice([1.0, TTL_S / 2, 2 * TTL_S]),
    "load_s": lambda r: r.choice([1e-3, 1.0, 1.0]),
    "recompute_s": lambda r: r.choice([1e-4, 1e-4, 1e-4, 1e-1]),
    "sure": lambda r: True,
    "level": lambda r: r.choice([LOW, NORMAL, HIGH]),
    "ttl_s": lambda r: r.choice([0, 0, 1.0]),
    "pinned": lambda r: r.random() < 0.6,
    "tier": lambda r: r.choice([HOT, WARM, COLD, COLD]),
    "blocks": lambda r: r.randint(1, 3),
    "limit": lambda r: r.randint(1, 8),
    "answer": lambda r: r.choice([*[Answer.GOOD] * 6, *Answer]),
    "takes": lambda r: r.choice([0.6, 1.0, 1.0, 1.05, None]),
    "goes_up": lambda r: r.random() < 0.7,
    "gone": lambda r: r.random() < 0.5,
    "may": lambda r: r.random() < 0.8,
}


INVARIANTS: list[Callable[[CacheMachine], None]] = [
    CacheMachine.everything_adds_up,
    CacheMachine.a_reader_sees_its_own_bytes_or_none,
    CacheMachine.a_lease_keeps_what_was_ready,
    CacheMachine.stored_prefixes_have_no_holes,
    CacheMachine.a_copy_below_is_on_its_medium,
]


def walk(seed: int) -> Counter[str]:
    """A walk of the machine; returns what it reached."""
    order = random.Random(seed)
    machine = CacheMachine()
    machine.start(
        cold_blocks=order.choice([0, 4, 12, 40, 40]), hot_blocks=order.choice([0, 3, 6]), limited=order.random() < 0.3
    )
    arguments = {name: list(inspect.signature(getattr(machine, name)).parameters) for name in WEIGHTS}
    for name in order.choices(list(WEIGHTS), list(WEIGHTS.values()), k=STEPS):
        values = {argument: VALUES[argument](order) for argument in arguments[name]}
        if "tier" in values and name != "evict" and values["tier"] == WARM:
            values["tier"] = HOT
        getattr(machine, name)(**values)
        for holds in INVARIANTS:
            holds(machine)
    machine.teardown()
    return machine.seen


@pytest.mark.parametrize("batch", range(4))
def test_long_walks(batch: int) -> None:
    # Always the same ones, for what they must reach is counted; hypothesis looks for others above.
    seen: Counter[str] = Counter()
    for seed in range(10 * batch, 10 * batch + 10):
        seen += walk(seed)
    assert seen["load GOOD READY"] and seen["save tier 4 done"] and seen["acquire all"] and seen["put NO_ROOM"]
    assert seen["gated all"] and seen["gated none"] and seen["probes True"]
    assert seen["expired"]
