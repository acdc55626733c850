"""The daemon's log: one line per event on standard error, whatever the message or the traceback holds.

    2026-03-01T12:00:00.123Z INFO kvstore.transport.attach session began: session=3 pid=4711

Values given as `extra={...}` follow as key=value. Line breaks and other control characters are written as escapes,
so that nothing a client sends (its name, say) can look like a line of its own.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

ROOT = "kvstore"
LEVELS = ("debug", "info", "warning", "error")

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), 127)} | {9: "\\t", 10: "\\n", 13: "\\r"}


class LineFormatter(logging.Formatter):
    """Formats a record as one line of text."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        parts = [_time_of(record), record.levelname, record.name, record.getMessage()]
        parts += [f"{key}={_value(value)}" for key, value in _extra(record).items()]
        if record.exc_info:
            parts.append("traceback=" + self.formatException(record.exc_info))
        return " ".join(parts).translate(_ESCAPES)


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        event: dict[str, Any] = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            event["traceback"] = self.formatException(record.exc_info)
        return json.dumps(event, default=str)


def setup(level: str = "info", as_json: bool = False, stream: TextIO | None = None) -> logging.Handler:
    """Send everything below the logger `kvstore` to `stream` (standard error); replaces an earlier setup.

    Returns:
        The handler, for whoever wants to take it off again.

    Raises:
        ValueError: `level` is none of LEVELS.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else LineFormatter())
    logger = logging.getLogger(ROOT)
    set_level(level)
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.propagate = False
    return handler


def set_level(level: str) -> str:
    """Set the level of the daemon's log while it runs.

    Returns:
        The level's name in lower case.

    Raises:
        ValueError: `level` is none of LEVELS.
    """
    name = level.strip().lower()
    if name not in LEVELS:
        raise ValueError(f"log level {level!r} is unknown; it must be one of {', '.join(LEVELS)}")
    logging.getLogger(ROOT).setLevel(name.upper())
    return name


def _time_of(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.created % 1 * 1000):03d}Z"


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def _value(value: object) -> str:
    text = str(value)
    return json.dumps(text) if not text or any(sign in text for sign in ' "=\n') else text
