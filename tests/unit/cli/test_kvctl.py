"""kvctl against a daemon with fixed answers: what it says, to people and to programs, and its exit codes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import grpc
import pytest
from click.testing import CliRunner, Result

from kvstore.cli.kvctl import main
from kvstore.protocol.errors import KVStoreError, PermissionDenied, ProtocolMismatch
from kvstore.v1 import admin_pb2 as pb
from kvstore.v1 import types_pb2
from kvstore.v1.kvstore_pb2 import HelloRequest, HelloResponse

Run = Callable[..., Result]
RunJson = Callable[..., Any]


class Admin(Protocol):
    requests: list[object]
    answers: dict[str, object]


class Daemon(Protocol):
    path: Path
    address: str
    admin: Admin
    hello: HelloResponse | KVStoreError
    greeted: list[HelloRequest]


# What it says


def test_ping_says_who_answers(kvctl: Run, kvctl_json: RunJson, daemon: Daemon) -> None:
    result = kvctl("ping")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"kvstored 9.9 at {daemon.address} is serving: attached in ")
    answer = kvctl_json("ping")
    assert (answer["version"], answer["health"], answer["instance_id"]) == ("9.9", "serving", "i-1")
    assert answer["attach_ms"] > 0
    assert daemon.greeted[0].client_name == "kvctl"


def test_stats_has_every_tier_by_name(kvctl_json: RunJson) -> None:
    stats = kvctl_json("stats")
    assert list(stats["tiers"]) == ["hot", "warm", "cold"]
    for tier in stats["tiers"].values():
        assert {"capacity_bytes", "used_bytes", "blocks", "hits", "evictions", "state"} <= set(tier)
    assert stats["tiers"]["warm"]["used_bytes"] == 1 << 29
    assert (stats["tiers"]["cold"]["stored_bytes"], stats["tiers"]["cold"]["raw_bytes"]) == (300, 450)
    assert stats["put_rejected"] == {"no_room": 3}
    assert stats["counters"]["dirty_blocks"] == 7
    assert stats["put_stored"] == 258


def test_a_tier_the_daemon_does_not_name_is_off(kvctl_json: RunJson, daemon: Daemon) -> None:
    daemon.admin.answers["GetStats"] = pb.GetStatsResponse(tiers=[pb.TierStats(name="warm", state="ok")])
    tiers = kvctl_json("tiers")
    assert (tiers["hot"]["state"], tiers["cold"]["state"], tiers["cold"]["capacity_bytes"]) == ("off", "off", 0)


def test_stats_lists_every_counter_for_people(kvctl: Run) -> None:
    lines = {tuple(line.split()) for line in kvctl("stats").stdout.splitlines()}
    assert {("warm.blocks", "256"), ("counters.dirty_blocks", "7"), ("put_stored", "258")} <= lines


def test_status_is_one_screen(kvctl: Run) -> None:
    shown = kvctl("status").stdout
    assert "serving   kvstored 9.9   up 1h 2m" in shown
    assert "████████████············" in shown
    assert "512MiB of 1GiB" in shown
    assert "acquire  50.0% of 200 blocks  (warm 75.0%, cold 25.0%)" in shown
    assert "258 stored, 0 existed, rejected: 3 no_room" in shown
    assert "1.50× compressed" in shown
    assert "worker-0" in shown
    assert "! cold tier: its agent was restarted 1 times" in shown
    assert len(shown.splitlines()) <= 30


def test_status_of_a_well_daemon_has_nothing_to_report(kvctl: Run, daemon: Daemon) -> None:
    daemon.admin.answers["GetStats"] = pb.GetStatsResponse(
        health="serving", tiers=[pb.TierStats(name="warm", state="ok", capacity_bytes=1)]
    )
    assert "nothing to report" in kvctl("status").stdout


def test_status_says_what_was_withheld_and_by_which_figures(kvctl: Run, kvctl_json: RunJson, daemon: Daemon) -> None:
    assert "withheld" not in kvctl("status").stdout
    daemon.admin.answers["GetStats"] = pb.GetStatsResponse(
        health="serving",
        tiers=[pb.TierStats(name="cold", state="ok", fetch_bytes_per_s=3 << 20, fetch_fixed_us=1500)],
        counters={"withheld_blocks": 1234, "gated_acquires": 5, "probes": 2},
    )
    line = "withheld 1,234 blocks of 5 acquires, quicker to recompute  (cold 3MiB/s after 1.5 ms)"
    assert line in kvctl("status").stdout
    document = kvctl_json("stats")
    assert document["counters"] == {"withheld_blocks": 1234, "gated_acquires": 5, "probes": 2}
    assert document["tiers"]["cold"]["fetch_fixed_us"] == 1500


def test_tiers_sessions_namespaces_are_tables(kvctl: Run) -> None:
    assert "50.0%" in kvctl("tiers").stdout
    assert "worker-0" in kvctl("sessions").stdout
    assert KEY_HEX[:12] in kvctl("namespaces").stdout


KEY_HEX = "ab" * 32
KEY = bytes.fromhex(KEY_HEX)


def test_inspect_takes_the_beginning_of_a_key(kvctl: Run, kvctl_json: RunJson, daemon: Daemon) -> None:
    (block,) = kvctl_json("inspect", "abababab")
    assert (block["key"], block["tiers"]) == (KEY_HEX, ["warm", "cold"])
    assert "warm, cold" in kvctl("inspect", KEY_HEX).stdout
    kvctl("inspect", "ABABABABA")
    assert daemon.admin.requests[-1] == pb.InspectBlockRequest(key=bytes.fromhex("abababab"))


def test_inspect_sorts_out_what_half_a_byte_excludes(kvctl: Run) -> None:
    result = kvctl("inspect", "ababababc")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no block here has a key that begins with ababababc" in result.stderr


@pytest.mark.parametrize("key", ["abab", "", "xyzxyzxy", "ab" * 33])
def test_inspect_refuses_what_is_no_key(kvctl: Run, key: str) -> None:
    assert kvctl("inspect", key).exit_code == 2


# What it orders


def test_evict_sends_tier_and_bytes(kvctl: Run, daemon: Daemon) -> None:
    result = kvctl("evict", "cold", "1.5GB")
    assert result.stdout == "evicted 2 blocks, 4MiB, from cold\n"
    assert daemon.admin.requests == [pb.EvictRequest(tier=types_pb2.TIER_COLD, bytes=1_500_000_000)]


def test_pin_and_unpin(kvctl: Run, daemon: Daemon) -> None:
    digits = KEY.hex()
    assert kvctl("pin", digits[:10]).stdout == f"pinned {digits}\n"
    assert kvctl("unpin", digits).stdout == f"unpinned {digits}\n"
    assert daemon.admin.requests == [pb.PinRequest(key=KEY[:5]), pb.PinRequest(key=KEY, unpin=True)]


def test_set_sends_only_what_was_said(kvctl: Run, daemon: Daemon) -> None:
    digits = KEY.hex()
    result = kvctl("set", digits[:8], "--ttl", "90", "--warm-bytes", "1GiB", "--cold-bytes", "0")
    assert result.stdout == f"namespace {digits[:12]}: high, ttl 1m 30s, warm ≤ 1GiB\n"
    terms = types_pb2.NamespaceTerms(ttl_ms=90_000, warm_bytes=1 << 30, cold_bytes=0)
    assert daemon.admin.requests[-1] == pb.SetTermsRequest(namespace=KEY, terms=terms)
    kvctl("set", digits[:8], "--priority", "low")
    assert daemon.admin.requests[-1] == pb.SetTermsRequest(namespace=KEY, terms=types_pb2.NamespaceTerms(priority=1))  # type: ignore[arg-type]


def test_set_of_a_namespace_that_is_not_one(kvctl: Run, daemon: Daemon) -> None:
    result = kvctl("set", "99999999", "--priority", "low")
    assert result.exit_code == 2 and "0 namespaces begin with 99999999" in result.stderr
    twice = [pb.NamespaceInfo(namespace=KEY[:4] + bytes([i]) * 28) for i in range(2)]
    daemon.admin.answers["ListNamespaces"] = pb.ListNamespacesResponse(namespaces=twice)
    result = kvctl("set", KEY.hex()[:8], "--priority", "low")
    assert result.exit_code == 2 and "2 namespaces begin with" in result.stderr


def test_flush_fails_where_blocks_are_left(kvctl: Run, daemon: Daemon) -> None:
    assert kvctl("flush", "--timeout", "2").exit_code == 0
    assert daemon.admin.requests == [pb.FlushRequest(timeout_ms=2000)]
    daemon.admin.answers["Flush"] = pb.FlushResponse(saved=1, unsaved=4)
    result = kvctl("flush")
    assert (result.exit_code, result.stdout) == (1, "saved 1 blocks, 4 are still unsaved\n")


def test_verify_fails_where_a_block_is_damaged_and_not_repaired(kvctl: Run, daemon: Daemon) -> None:
    daemon.admin.answers["Verify"] = pb.VerifyResponse(checked=9)
    assert kvctl("verify").stdout == "checked 9 blocks of cold: all are good\n"
    daemon.admin.answers["Verify"] = pb.VerifyResponse(checked=9, corrupt=1, missing=1)
    result = kvctl("verify", "cold")
    assert result.exit_code == 1
    assert result.stdout == "checked 9 blocks of cold: 1 corrupt, 1 missing; run it again with --repair to drop them\n"
    daemon.admin.answers["Verify"] = pb.VerifyResponse(checked=9, corrupt=1, missing=1, repaired=2)
    result = kvctl("verify", "--repair")
    assert (result.exit_code, result.stdout) == (0, "checked 9 blocks of cold: 1 corrupt, 1 missing; 2 repaired\n")
    assert daemon.admin.requests[-1] == pb.VerifyRequest(tier=types_pb2.TIER_COLD, repair=True)


def test_verify_asks_page_after_page_and_adds_them_up(kvctl_json: RunJson, daemon: Daemon) -> None:
    pages = [pb.VerifyResponse(checked=3, last=b"a" * 64), pb.VerifyResponse(checked=2, corrupt=1, repaired=1)]
    daemon.admin.answers["Verify"] = iter(pages)
    assert kvctl_json("verify", "--repair") == {"checked": 5, "corrupt": 1, "missing": 0, "repaired": 1}
    asked = [request for request in daemon.admin.requests if isinstance(request, pb.VerifyRequest)]
    assert [request.after for request in asked] == [b"", b"a" * 64]


def test_compact_says_what_it_gave_back(kvctl: Run, daemon: Daemon) -> None:
    daemon.admin.answers["Compact"] = pb.CompactResponse(before_bytes=3 << 30, after_bytes=1 << 30)
    assert kvctl("compact").stdout == "the cold tier takes 1GiB; it was 3GiB\n"


def test_resize_says_what_the_device_gave(kvctl: Run, daemon: Daemon) -> None:
    daemon.admin.answers["Resize"] = pb.ResizeResponse(capacity_bytes=3 << 30)
    assert kvctl("tiers", "resize", "hot=4GiB").stdout == "hot has 3GiB, not 4GiB\n"
    assert daemon.admin.requests[-1] == pb.ResizeRequest(tier=types_pb2.TIER_HOT, capacity_bytes=4 << 30)
    daemon.admin.answers["Resize"] = pb.ResizeResponse(capacity_bytes=1 << 30)
    assert kvctl("tiers", "resize", "hot=1GiB").stdout == "hot has 1GiB\n"


def test_status_says_what_the_disk_had_to_take_and_what_was_set_aside(kvctl: Run, daemon: Daemon) -> None:
    medium = {"written_bytes": 1 << 30, "device_bytes": 5 << 28, "disk_bytes": 10 << 30, "set_aside": 1, "full": 3}
    cold = pb.TierStats(name="cold", state="ok", medium=medium)
    daemon.admin.answers["GetStats"] = pb.GetStatsResponse(uptime_ms=86_400_000, tiers=[cold])
    shown = kvctl("status").stdout
    assert "written (1.25 times its blocks), 0.12 drive writes a day at this rate" in shown
    assert "set aside" in shown
    assert "3 writes found no room on the disk" in shown


def test_stats_for_prometheus(kvctl: Run) -> None:
    text = kvctl("stats", "--prometheus").stdout
    assert 'kvstore_tier_hits_total{tier="warm"} 75.0' in text
    assert "kvstore_serving 1.0" in text


def test_drain_and_log_level(kvctl: Run, kvctl_json: RunJson, daemon: Daemon) -> None:
    assert "draining" in kvctl("drain").stdout
    assert kvctl_json("log-level", "DEBUG") == {"level": "debug"}
    assert daemon.admin.requests[-1] == pb.SetLogLevelRequest(level="debug")


# Where options stand, and exit codes


@pytest.mark.parametrize(
    "arguments", [("--json", "stats"), ("stats", "--json"), ("-o", "json", "stats"), ("stats", "-o", "json")]
)
def test_options_may_stand_before_or_after_the_verb(kvctl: Run, arguments: tuple[str, ...]) -> None:
    assert kvctl(*arguments).stdout.startswith("{")


def test_the_address_may_stand_after_the_verb(daemon: Daemon) -> None:
    result = CliRunner().invoke(main, ["--address", "unix:/nowhere", "ping", "--address", daemon.address])
    assert result.exit_code == 0


def test_no_daemon_is_exit_code_3_and_says_what_to_do(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--address", f"unix:{tmp_path}/k", "status"])
    assert (result.exit_code, result.stdout) == (3, "")
    assert "there is no such socket; start kvstored, or give its --address" in result.stderr


def test_a_dead_daemons_socket_is_exit_code_3(daemon: Daemon) -> None:
    dead = daemon.path.parent / "dead"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(f"{dead}.attach")
    result = CliRunner().invoke(main, ["--address", f"unix:{dead}", "ping"])
    assert result.exit_code == 3
    assert "nobody listens" in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root opens every socket")
def test_a_socket_that_is_not_ours_to_open_is_exit_code_1(daemon: Daemon) -> None:
    Path(f"{daemon.path}.attach").chmod(0)
    result = CliRunner().invoke(main, ["--address", daemon.address, "ping"])
    assert (result.exit_code, "this user may not open the socket" in result.stderr) == (1, True)


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (grpc.StatusCode.UNAVAILABLE, 3),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 3),
        (grpc.StatusCode.PERMISSION_DENIED, 1),
        (grpc.StatusCode.INTERNAL, 1),
        (grpc.StatusCode.INVALID_ARGUMENT, 2),
    ],
)
def test_errors_of_the_daemon_have_their_exit_codes(
    kvctl: Run, daemon: Daemon, code: grpc.StatusCode, exit_code: int
) -> None:
    daemon.admin.answers["GetStats"] = code
    result = kvctl("stats", "--json")
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert result.stderr.startswith("kvctl: ")


@pytest.mark.parametrize(
    ("failure", "words"),
    [(PermissionDenied("uid 7 belongs to no tenant"), "uid 7"), (ProtocolMismatch("speaks 2 and 1"), "speaks 2 and 1")],
)
def test_a_refused_hello_is_exit_code_1(kvctl: Run, daemon: Daemon, failure: KVStoreError, words: str) -> None:
    daemon.hello = failure
    result = kvctl("ping")
    assert result.exit_code == 1
    assert words in result.stderr


def test_a_daemon_of_another_protocol_is_told(kvctl: Run, daemon: Daemon) -> None:
    daemon.hello = HelloResponse(protocol_version=9, server_version="99")
    result = kvctl("ping")
    assert result.exit_code == 1
    assert "the daemon (version 99) 9" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-verb",),
        ("evict", "lukewarm", "1GiB"),
        ("evict", "warm", "much"),
        ("pin", "abc"),
        ("pin", "abcdefab1"),
        ("set", "abcdefab", "--priority", "huge"),
        ("set", "abcdefab", "--ttl", "-1"),
        ("set", "abcdefab", "--warm-bytes", "much"),
        ("log-level", "loud"),
        ("tiers", "grow"),
        ("tiers", "resize", "hot"),
        ("tiers", "resize", "lukewarm=1GiB"),
        ("tiers", "resize", "hot=much"),
        ("stats", "-o", "xml"),
        ("--address", "tcp:localhost:80", "ping"),
        ("bench", "no-such-suite"),
        ("bench", "--spawn", "--warm-bytes", "1MiB"),
    ],
)
def test_wrong_use_is_exit_code_2(kvctl: Run, arguments: tuple[str, ...]) -> None:
    result = kvctl(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")


def test_bench_lists_its_suites_without_a_daemon() -> None:
    result = CliRunner().invoke(main, ["--address", "unix:/nowhere", "bench", "--list"])
    assert result.exit_code == 0
    assert "put: put_256 put_spill" in result.stdout


def test_every_verb_has_help_and_the_shared_options() -> None:
    assert set(main.commands) == {
        "ping", "status", "stats", "tiers", "namespaces", "sessions", "inspect", "evict", "flush", "verify", "drain",
        "log-level", "bench", "compact", "record", "replay", "pin", "unpin", "set",
    }  # fmt: skip
    for name in main.commands:
        shown = CliRunner().invoke(main, [name, "--help"]).stdout
        assert all(option in shown for option in ("--address", "--output", "--json")), name
