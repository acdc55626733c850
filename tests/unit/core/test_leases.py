"""Leases: whose they are, how long they last, and how each of their ends gives the pins back once."""

from __future__ import annotations

import pytest

from core_world import PAGE, TENANT, chain, key
from kvstore.core.block import Block, Namespace
from kvstore.core.leases import Lease, LeasePart, LeaseTable
from kvstore.core.slabs import SlotRef
from kvstore.core.slots import Slot
from kvstore.protocol.errors import LeaseExpired, NotFound, PermissionDenied

TTL_S = 30.0


class Desk:
    """A table of leases, and which of their blocks have been unpinned."""

    def __init__(self) -> None:
        self.unpinned: list[tuple[int, int]] = []
        self.table = LeaseTable(TTL_S, lambda part, start, stop: self.unpinned.append((start, stop)))
        self.space = Namespace(key("ns"), TENANT, PAGE, PAGE, 16, chain=True)

    def part(self, count: int, first_block: int = 0) -> LeasePart:
        blocks = [Block(self.space, name, None) for name in chain(count)]
        slots = [Slot(SlotRef(1, i), i + 1, None) for i in range(count)]
        return LeasePart(self.space, first_block, blocks, slots)

    def open(self, session: int = 1, now_s: float = 0.0, blocks: int = 4) -> Lease:
        return self.table.open(session, TENANT, [self.part(blocks)], 16 * blocks, now_s)


@pytest.fixture
def desk() -> Desk:
    return Desk()


def ids(leases: list[Lease]) -> list[int]:
    return [lease.lease_id for lease in leases]


# -- whose it is ----------------------------------------------------------------------------------------------


def test_lease_ids_are_not_used_again(desk: Desk) -> None:
    first = desk.open()
    desk.table.release(first)
    assert desk.open().lease_id > first.lease_id


def test_a_lease_is_its_sessions_own(desk: Desk) -> None:
    lease = desk.open(session=1)
    assert desk.table.get(1, lease.lease_id) is lease
    with pytest.raises(PermissionDenied, match="another session"):
        desk.table.get(2, lease.lease_id)


def test_a_lease_that_never_was_has_ended(desk: Desk) -> None:
    with pytest.raises(LeaseExpired, match="lease 7 has ended"):
        desk.table.get(1, 7)


# -- release --------------------------------------------------------------------------------------------------


def test_release_gives_everything_back_once(desk: Desk) -> None:
    lease = desk.open(blocks=4)
    assert lease.pinned == 4
    desk.table.release(lease)
    assert desk.unpinned == [(0, 4)]
    assert (lease.pinned, len(desk.table)) == (0, 0)
    with pytest.raises(LeaseExpired):
        desk.table.get(1, lease.lease_id)


def test_release_to_gives_each_block_back_once(desk: Desk) -> None:
    lease = desk.open(blocks=5)
    desk.table.release(lease, 2)
    assert (desk.unpinned, lease.pinned) == ([(0, 2)], 3)
    desk.table.release(lease, 2)
    desk.table.release(lease, 1)
    assert desk.unpinned == [(0, 2)]
    desk.table.release(lease, 4)
    desk.table.release(lease)
    assert desk.unpinned == [(0, 2), (2, 4), (4, 5)]


def test_release_to_the_end_keeps_the_lease(desk: Desk) -> None:
    lease = desk.open(blocks=3)
    desk.table.release(lease, 99)
    assert (lease.pinned, desk.unpinned) == (0, [(0, 3)])
    assert desk.table.get(1, lease.lease_id) is lease


def test_release_to_leaves_the_block_at_the_last_position_pinned(desk: Desk) -> None:
    """The prefix of one model part streams through; the state of another, at its end, is read last."""
    prefix, state = desk.part(8), desk.part(1, first_block=7)
    lease = desk.table.open(1, TENANT, [prefix, state], 128, 0.0)
    desk.table.release(lease, 7)
    assert (prefix.released, state.released) == (7, 0)
    desk.table.release(lease, 8)
    assert (prefix.released, state.released) == (8, 1)


# -- time -----------------------------------------------------------------------------------------------------


def test_a_lease_ends_when_its_time_has_run_out(desk: Desk) -> None:
    lease = desk.open(now_s=100.0)
    assert desk.table.expire(100.0 + TTL_S - 0.1) == []
    assert desk.table.expire(100.0 + TTL_S) == [lease]
    assert desk.unpinned == [(0, 4)]
    assert len(desk.table) == 0


def test_any_frame_of_the_session_renews_all_its_leases(desk: Desk) -> None:
    mine, other = [desk.open(1), desk.open(1)], desk.open(2)
    assert desk.table.renew(1, 20.0) == 2
    assert desk.table.expire(30.0) == [other]
    assert ids(desk.table.expire(50.0)) == ids(mine)


def test_a_renewal_never_shortens(desk: Desk) -> None:
    desk.table.renew(1, 5.0)
    lease = desk.open(1, now_s=10.0)
    assert desk.table.expire(39.0) == []
    assert desk.table.expire(40.0) == [lease]


def test_renewals_far_apart_do_not_add_up(desk: Desk) -> None:
    lease = desk.open()
    for now_s in (10.0, 20.0, 30.0):
        desk.table.renew(1, now_s)
        assert desk.table.expire(now_s) == []
    assert desk.table.expire(60.0) == [lease]


# -- sessions -------------------------------------------------------------------------------------------------


def test_a_lease_ends_with_its_session(desk: Desk) -> None:
    first, second, other = desk.open(1), desk.open(1), desk.open(2)
    assert desk.table.end_session(1) == [first, second]
    assert list(desk.table) == [other]
    assert desk.table.end_session(1) == []


def test_an_ended_session_leaves_nothing_behind(desk: Desk) -> None:
    for session in range(50):
        lease = desk.open(session)
        desk.table.renew(session, 1.0)
        desk.table.offer_handoff(lease, key(session))
        desk.table.adopt(session + 1000, TENANT, key(session), 1.0)
        desk.table.end_session(session)
        desk.table.renew(session, 2.0)  # a late frame
        desk.table.end_session(session + 1000)
    assert len(desk.table) == 0
    assert not (desk.table._by_session or desk.table._seen or desk.table._tokens)


def test_sessions_without_leases_are_not_remembered(desk: Desk) -> None:
    lease = desk.open(5)
    desk.table.renew(5, 1.0)
    desk.table.release(lease)
    assert not desk.table._seen
    assert desk.table.renew(9, 1.0) == 0
    assert not desk.table._seen


# -- handoff --------------------------------------------------------------------------------------------------


def test_a_lease_is_adopted_by_another_session(desk: Desk) -> None:
    lease = desk.open(1)
    desk.table.offer_handoff(lease, b"token")
    assert desk.table.adopt(2, TENANT, b"token", 5.0) is lease
    assert desk.table.get(2, lease.lease_id) is lease
    with pytest.raises(PermissionDenied):
        desk.table.get(1, lease.lease_id)
    assert ids(desk.table.of_session(1)) == []
    assert desk.unpinned == []


def test_a_token_is_good_once(desk: Desk) -> None:
    desk.table.offer_handoff(desk.open(1), b"token")
    desk.table.adopt(2, TENANT, b"token", 0.0)
    with pytest.raises(NotFound, match="single use"):
        desk.table.adopt(3, TENANT, b"token", 0.0)


def test_a_newer_token_replaces_the_older(desk: Desk) -> None:
    lease = desk.open(1)
    desk.table.offer_handoff(lease, b"old")
    desk.table.offer_handoff(lease, b"new")
    with pytest.raises(NotFound):
        desk.table.adopt(2, TENANT, b"old", 0.0)
    assert desk.table.adopt(2, TENANT, b"new", 0.0) is lease


def test_only_its_tenant_adopts_it(desk: Desk) -> None:
    lease = desk.open(1)
    desk.table.offer_handoff(lease, b"token")
    with pytest.raises(PermissionDenied, match="another tenant"):
        desk.table.adopt(2, "stranger", b"token", 0.0)
    assert desk.table.adopt(2, TENANT, b"token", 0.0) is lease  # the attempt did not use it up


def test_an_unknown_token_finds_nothing(desk: Desk) -> None:
    with pytest.raises(NotFound):
        desk.table.adopt(2, TENANT, b"", 0.0)


def test_a_token_ends_with_its_lease(desk: Desk) -> None:
    lease = desk.open(1)
    desk.table.offer_handoff(lease, b"token")
    desk.table.release(lease)
    with pytest.raises(NotFound):
        desk.table.adopt(2, TENANT, b"token", 0.0)


def test_a_lease_that_was_handed_off_outlives_its_session(desk: Desk) -> None:
    kept, handed = desk.open(1), desk.open(1)
    desk.table.offer_handoff(handed, b"token")
    assert desk.table.end_session(1) == [kept]
    assert desk.table.adopt(2, TENANT, b"token", 10.0) is handed
    assert desk.table.expire(39.0) == []
    assert desk.table.expire(40.0) == [handed]


def test_a_lease_that_nobody_adopts_ends_in_time(desk: Desk) -> None:
    lease = desk.open(1)
    desk.table.offer_handoff(lease, b"token")
    desk.table.end_session(1)
    assert desk.table.expire(TTL_S) == [lease]
    assert not (desk.table._by_session or desk.table._tokens)


def test_the_time_of_a_handed_off_lease_counts_from_its_sessions_last_frame(desk: Desk) -> None:
    """The scheduler renewed, handed off and left between two sweeps: the worker has the whole time to adopt."""
    lease = desk.open(1, now_s=0.0)
    desk.table.renew(1, 29.0)
    desk.table.offer_handoff(lease, b"token")
    desk.table.end_session(1)
    assert desk.table.expire(31.0) == []
    assert desk.table.adopt(2, TENANT, b"token", 31.0) is lease


def test_adopting_starts_the_time_again(desk: Desk) -> None:
    lease = desk.open(1, now_s=0.0)
    desk.table.offer_handoff(lease, b"token")
    desk.table.adopt(2, TENANT, b"token", 25.0)
    assert desk.table.expire(54.0) == []
    assert desk.table.expire(55.0) == [lease]


def test_the_former_session_no_longer_renews_it(desk: Desk) -> None:
    lease = desk.open(1)
    desk.table.offer_handoff(lease, b"token")
    desk.table.adopt(2, TENANT, b"token", 0.0)
    desk.table.renew(1, 29.0)
    assert desk.table.expire(30.0) == [lease]
