"""What a worker says of itself, and what it is told of blocks that were not promised."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from derived import chain, contents, fetch, namespace
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client import Client, InvalidRequest, Keys, Match, Namespace, WithheldReason, benefit
from kvstore_client.benefit import CopyRate
from kvstore_client.outcomes import withheld_reason
from kvstore_client.testing import FakeDaemon

BLOCK_NBYTES = 16 << 10
N = 6
MIB = 1 << 20


def stored(space: Namespace) -> Keys:
    keys = chain(space, N)
    space.put(keys, contents(keys, BLOCK_NBYTES))
    return keys


def test_who_does_not_know_what_recomputing_takes_says_nothing(daemon: FakeDaemon, ns: Namespace) -> None:
    keys = stored(ns)
    daemon.withhold(2)
    assert ns.match(keys) == Match(N, 16 * N, {"hot": 0, "warm": N, "cold": 0})
    with ns.acquire(keys) as lease:
        assert (lease.blocks, lease.withheld, lease.withheld_reason) == (N, 0, None)
    assert daemon.store.workers == []


def test_what_was_said_of_the_namespace_counts_unless_the_call_says_otherwise(
    daemon: FakeDaemon, client: Client
) -> None:
    space = namespace(client, "gated", BLOCK_NBYTES, recompute_s_per_token=(2e-5, 1e-10))
    keys = stored(space)
    space.acquire(keys).release()
    space.match(keys, recompute_s_per_token=1e-3)
    space.match(keys, recompute_s_per_token=0.0)
    said = [(worker.recompute_ns_per_token, worker.recompute_ns_per_token2) for worker in daemon.store.workers]
    assert said == [pytest.approx((20_000, 0.1)), pytest.approx((1_000_000, 0.0))]


def test_withheld_blocks_are_told(daemon: FakeDaemon, client: Client) -> None:
    space = namespace(client, "gated", BLOCK_NBYTES, recompute_s_per_token=1e-5)
    keys = stored(space)
    daemon.withhold(2)
    assert space.match(keys) == Match(2, 32, {"hot": 0, "warm": 2, "cold": 0}, N - 2, WithheldReason.NOT_WORTH)
    with space.acquire(keys) as lease:
        assert (lease.blocks, lease.tokens) == (2, 32)
        assert (lease.withheld, lease.withheld_reason) == (N - 2, WithheldReason.NOT_WORTH)
    assert fetch(space, keys) == (2, [])
    daemon.withhold(0)
    with space.acquire(keys) as lease:
        assert (lease.blocks, lease.tokens, lease.withheld) == (0, 0, N)


def test_a_lease_on_several_namespaces_is_not_gated(daemon: FakeDaemon, client: Client) -> None:
    spaces = [namespace(client, name, BLOCK_NBYTES, recompute_s_per_token=1e-5) for name in ("a", "b")]
    keys = [stored(space) for space in spaces]
    daemon.withhold(0)
    with client.acquire([(spaces[0], keys[0], "prefix"), (spaces[1], keys[1], "last")]) as lease:
        assert (lease.blocks, lease.withheld) == (N, 0)
    assert daemon.store.workers == []


def test_a_fail_open_miss_has_nothing_withheld(daemon: FakeDaemon, new_client: Callable[..., Client]) -> None:
    space = namespace(new_client(fail_open=True), "gone", BLOCK_NBYTES, recompute_s_per_token=1e-5)
    keys = stored(space)
    daemon.die()
    assert (space.match(keys).withheld, space.match(keys).withheld_reason) == (0, None)
    lease = space.acquire(keys)
    assert (lease.blocks, lease.withheld, lease.withheld_reason) == (0, 0, None)


@pytest.mark.parametrize("given", [-1.0, float("nan"), float("inf"), "fast", (1.0,), (1.0, 2.0, 3.0), (1.0, -1.0)])
def test_a_recompute_cost_is_a_time(client: Client, ns: Namespace, given: object) -> None:
    for call in (
        lambda: ns.match(chain(ns, 1), recompute_s_per_token=given),  # type: ignore[arg-type]
        lambda: ns.acquire(chain(ns, 1), recompute_s_per_token=given),  # type: ignore[arg-type]
        lambda: namespace(client, "x", BLOCK_NBYTES, recompute_s_per_token=given),
    ):
        with pytest.raises(InvalidRequest, match="recompute_s_per_token is"):
            call()


def test_a_newer_daemon_may_have_other_reasons() -> None:
    assert withheld_reason(3, 99) is WithheldReason.UNKNOWN
    assert withheld_reason(0, 1) is None
    wire = {name.removeprefix("WITHHELD_REASON_"): number for name, number in pb.WithheldReason.items()}
    assert {"UNSPECIFIED": 0} | {r.name: int(r) for r in WithheldReason if r} == wire


# --- the copy rate


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now_s = [100.0]
    monkeypatch.setattr(benefit.time, "monotonic", lambda: now_s[0])
    return now_s


def test_the_rate_is_that_of_late_copies(clock: list[float]) -> None:
    rate = CopyRate()
    assert rate.bytes_per_s == 0.0
    rate.note(MIB, 0.001)
    assert rate.bytes_per_s == pytest.approx(MIB / 0.001)
    for _ in range(40):
        rate.note(MIB, 0.002)
    assert rate.bytes_per_s == pytest.approx(MIB / 0.002, rel=0.01)


def test_one_stall_counts_as_three_copies(clock: list[float]) -> None:
    rate = CopyRate()
    for _ in range(40):
        rate.note(MIB, 0.001)
    rate.note(MIB, 2.0)
    assert rate.bytes_per_s > MIB / 0.0015


def test_a_rate_that_is_not_renewed_is_forgotten(clock: list[float]) -> None:
    """Or a worker that was slow once would be promised nothing, copy nothing, and stay slow for good."""
    rate = CopyRate()
    rate.note(MIB, 10.0)
    assert rate.bytes_per_s > 0
    clock[0] += 5.0
    assert rate.bytes_per_s == 0.0


def test_reading_measures_it(daemon: FakeDaemon, client: Client) -> None:
    space = namespace(client, "gated", BLOCK_NBYTES, recompute_s_per_token=1e-5)
    keys = stored(space)
    assert fetch(space, keys) == (N, [])
    assert fetch(space, keys) == (N, [])
    first, second = (worker.copy_bytes_per_s for worker in daemon.store.workers)
    assert (first, second > 0) == (0.0, True)
