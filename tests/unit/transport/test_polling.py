"""A reader polls while that pays, and never two at a time."""

from __future__ import annotations

import pytest

from kvstore.protocol.errors import Unavailable
from kvstore.transport.polling import Activity, Poller


class Reader:
    def __init__(self, found: bool) -> None:
        self.found = found
        self.polls = 0

    def poll(self) -> bool:
        self.polls += 1
        return self.found


class GoneReader:
    def poll(self) -> bool:
        raise Unavailable("gone")


def test_polling_that_pays_goes_on() -> None:
    reader = Reader(found=True)
    poller = Poller(reader, Activity())  # type: ignore[arg-type]
    for _ in range(100):
        poller.poll()
    assert reader.polls == 100


def test_polling_in_vain_gets_rare_and_recovers() -> None:
    """Two peers on one core that both polled took 106 us a round trip instead of 5."""
    reader = Reader(found=False)
    poller = Poller(reader, Activity())  # type: ignore[arg-type]
    for _ in range(10_000):
        poller.poll()
    assert reader.polls < 20
    reader.found = True
    for _ in range(2000):
        poller.poll()
    assert reader.polls > 900


def test_one_reader_polls_at_a_time_and_none_while_puts_run() -> None:
    activity, reader = Activity(), Reader(found=True)
    poller = Poller(reader, activity)  # type: ignore[arg-type]
    with activity.spinner:
        poller.poll()
    activity.putting.add("a put")
    poller.poll()
    assert reader.polls == 0
    activity.putting.clear()
    poller.poll()
    assert reader.polls == 1


def test_the_turn_is_given_back_when_the_peer_goes() -> None:
    activity = Activity()
    with pytest.raises(Unavailable):
        Poller(GoneReader(), activity).poll()  # type: ignore[arg-type]
    assert not activity.spinner.locked()
