"""The log: one line an event, whatever it holds."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from kvstore.telemetry import log


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    logger = logging.getLogger(log.ROOT)
    before = logger.level, logger.propagate, list(logger.handlers)
    yield io.StringIO()
    logger.setLevel(before[0])
    logger.propagate = before[1]
    logger.handlers[:] = before[2]


def test_an_event_is_one_line_with_time_level_and_name(stream: io.StringIO) -> None:
    log.setup("info", stream=stream)
    logging.getLogger("kvstore.engine").info("started: blocks=%d", 3)
    line = stream.getvalue()
    assert line.endswith("Z INFO kvstore.engine started: blocks=3\n")
    assert line.count("\n") == 1


def test_extra_values_follow_as_pairs(stream: io.StringIO) -> None:
    log.setup("info", stream=stream)
    logging.getLogger("kvstore").info("put", extra={"blocks": 3, "client": "a b", "empty": ""})
    assert stream.getvalue().endswith('put blocks=3 client="a b" empty=""\n')


def test_a_traceback_stays_on_its_line(stream: io.StringIO) -> None:
    log.setup("info", stream=stream)
    try:
        raise ZeroDivisionError("oh")
    except ZeroDivisionError:
        logging.getLogger("kvstore").exception("failed")
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert "traceback=Traceback" in line
    assert "ZeroDivisionError: oh" in line


def test_what_a_client_sends_cannot_forge_a_line(stream: io.StringIO) -> None:
    log.setup("info", stream=stream)
    logging.getLogger("kvstore").info("session began: name=%s", "x\n2026-01-01T00:00:00.000Z ERROR forged\x1b[31m")
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert "\x1b" not in line


def test_json_events_are_objects(stream: io.StringIO) -> None:
    log.setup("info", as_json=True, stream=stream)
    logging.getLogger("kvstore").warning("slow", extra={"seconds": 2.5})
    event = json.loads(stream.getvalue())
    assert (event["level"], event["message"], event["seconds"]) == ("warning", "slow", 2.5)


def test_the_level_can_be_changed_while_running(stream: io.StringIO) -> None:
    log.setup("warning", stream=stream)
    logger = logging.getLogger("kvstore.engine")
    logger.info("unseen")
    assert log.set_level("DEBUG") == "debug"
    logger.debug("seen")
    assert "unseen" not in stream.getvalue()
    assert "seen" in stream.getvalue()


def test_an_unknown_level_is_refused_with_the_known_ones(stream: io.StringIO) -> None:
    with pytest.raises(ValueError, match="debug, info, warning, error"):
        log.set_level("loud")


def test_a_second_setup_replaces_the_first(stream: io.StringIO) -> None:
    first = io.StringIO()
    log.setup("info", stream=first)
    log.setup("info", stream=stream)
    logging.getLogger("kvstore").info("once")
    assert first.getvalue() == ""
    assert stream.getvalue().count("once") == 1
