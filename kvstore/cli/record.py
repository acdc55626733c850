"""kvctl record: what workers ask a running daemon for, as a trace for kvctl replay.

Keys leave the daemon to this process alone and the file gets 64-bit digests of them, salted with random bytes that no
one else ever has: the ids of two recordings cannot be joined, and nobody who has a prompt can look its keys up.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from types import FrameType
from typing import TextIO

import click

from kvstore.cli import render
from kvstore.cli.admin_client import AdminClient
from kvstore.cli.options import Options
from kvstore.cli.session import connected
from kvstore.protocol.errors import InvalidRequest
from kvstore.protocol.keys import KEY_BYTES
from kvstore.v1 import admin_pb2 as pb

_POLL_S = 0.2
_ID_BYTES = 8
_SALT_BYTES = 32


@dataclass(slots=True)
class Recording:
    """One recording: where it goes, and how far it is."""

    file: TextIO
    max_requests: int  # 0: any number
    salt: bytes = field(default_factory=lambda: secrets.token_bytes(_SALT_BYTES))
    number: int = 0  # by which the daemon knows it
    requests: int = 0
    blocks: int = 0
    dropped: int = 0
    left_out: int = 0

    @property
    def full(self) -> bool:
        """Whether it has all the requests that were asked for."""
        return bool(self.max_requests) and self.requests >= self.max_requests

    def add(self, reply: pb.RecordResponse) -> None:
        """Write the requests of a reply, one line each."""
        self.number, self.dropped, self.left_out = reply.recording, reply.dropped, reply.left_out
        for request in reply.requests:
            if self.full:
                return
            ids = _ids(self.salt, request.namespace, request.keys)
            line = {
                "timestamp": request.time_us // 1000,
                "input_length": len(ids) * request.block_tokens,
                "output_length": 0,  # nobody tells the daemon
                "hash_ids": ids,
            }
            self.file.write(json.dumps(line, separators=(",", ":")) + "\n")
            self.requests += 1
            self.blocks += len(ids)
        self.file.flush()


def record(options: Options, path: str, seconds: float, max_requests: int) -> int:
    """Write requests into a new file until the time is up, there are enough, or Ctrl-C."""
    with connected(options) as client, _created(path) as file, _interruptible() as interrupted:
        recording = Recording(file, max_requests)
        started_s = time.monotonic()
        try:
            _follow(client, recording, started_s + seconds, interrupted)
        finally:  # what has come is a trace, also where the daemon went away
            if recording.number:
                _summarise(options, recording, path, time.monotonic() - started_s)
    return 0


def _follow(client: AdminClient, recording: Recording, until_s: float, interrupted: threading.Event) -> None:
    """Ask again and again; the last call fetches what has come since, as far as it fits one reply."""
    started_s = time.monotonic()
    ended = False
    while True:
        request = pb.RecordRequest(recording=recording.number, after=recording.requests, stop=ended or recording.full)
        reply = client.call("Record", request)
        recording.add(reply)
        if request.stop:
            recording.dropped += 0 if recording.full else reply.waiting
            return
        _show(recording, time.monotonic() - started_s)
        if not (reply.waiting or recording.full):
            ended = interrupted.wait(min(_POLL_S, max(0.0, until_s - time.monotonic())))
        # Not by what waits: a busy daemon always has more.
        ended = ended or time.monotonic() >= until_s or interrupted.is_set()


def _ids(salt: bytes, namespace: bytes, keys: bytes) -> list[int]:
    """One id a key; the same key in another namespace has another."""
    begun = blake2b(namespace, digest_size=_ID_BYTES, key=salt)
    ids = []
    for start in range(0, len(keys), KEY_BYTES):
        digest = begun.copy()
        digest.update(keys[start : start + KEY_BYTES])
        ids.append(int.from_bytes(digest.digest(), "little"))
    return ids


@contextmanager
def _created(path: str) -> Iterator[TextIO]:
    """A file that was not there, for its owner alone: it shows what is asked for when."""
    try:
        made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise InvalidRequest(f"{path} exists; give the name of a new file") from error
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(made, "w", encoding="ascii") as file:
            yield file
    finally:
        if not Path(path).stat().st_size:
            Path(path).unlink()


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event, so that no line is cut in half."""
    interrupted = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(recording: Recording, seconds: float) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r{_counts(recording)}, {seconds:.0f} s (Ctrl-C ends it) ", err=True, nl=False)


def _summarise(options: Options, recording: Recording, path: str, seconds: float) -> None:
    if sys.stderr.isatty():
        click.echo(err=True)
    if options.json:
        render.print_json({
            "file": path,
            "seconds": seconds,
            "requests": recording.requests,
            "blocks": recording.blocks,
            "dropped": recording.dropped,
            "left_out": recording.left_out,
        })  # fmt: skip
    else:
        click.echo(f"{path}: {_counts(recording)} in {seconds:.0f} s")
    if recording.dropped:
        click.echo(f"{recording.dropped} requests were dropped: they came faster than they could be written", err=True)
    if recording.left_out:
        click.echo(f"{recording.left_out} groups were left out: sets, and groups of last blocks", err=True)


def _counts(recording: Recording) -> str:
    return f"{recording.requests:,} requests for {recording.blocks:,} blocks, {recording.dropped:,} dropped"
