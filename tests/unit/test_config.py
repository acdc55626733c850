"""The configuration: file, flags, defaults from the machine, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvstore import config as config_module
from kvstore.config import Config, ConfigError, default_addresses, load, prepare_state_dir, quiet_grpc
from kvstore.machine import Machine

GIB = 1 << 30
Settle = Callable[..., Config]


@dataclass(frozen=True)
class FakeMachine(Machine):
    """16 GiB available, no GPU, whatever runs underneath."""

    available: int = 16 * GIB
    gpus: int = 0

    def available_bytes(self) -> int:
        return self.available

    def cuda_devices(self) -> int:
        return self.gpus


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    sizes = {"free": 100 * GIB, "used": 0}
    monkeypatch.setattr(config_module, "free_disk_bytes", lambda _: sizes["free"])
    monkeypatch.setattr(config_module, "disk_used_bytes", lambda _: sizes["used"])
    return sizes


@pytest.fixture
def settle(tmp_path: Path, disk: dict[str, int]) -> Settle:
    def call(toml: str | None = None, machine: Machine | None = None, **flags: object) -> Config:
        path = None
        if toml is not None:
            path = tmp_path / "kvstored.toml"
            path.write_text(toml)
        flags.setdefault("state_dir", str(tmp_path / "state"))
        flags.setdefault("socket", "/run/test/kvstore.sock")
        return load(flags, path, environ={}, machine=machine or FakeMachine())

    return call


def test_grpc_logs_errors_only_unless_it_is_told_otherwise() -> None:
    environ: dict[str, str] = {}
    quiet_grpc(environ)
    assert environ == {"GRPC_VERBOSITY": "ERROR"}
    asked = {"GRPC_VERBOSITY": "DEBUG"}
    quiet_grpc(asked)
    assert asked == {"GRPC_VERBOSITY": "DEBUG"}


# Where values come from


def test_defaults_are_a_quarter_of_the_machine_and_are_told(settle: Settle) -> None:
    config = settle()
    assert config.warm_bytes == 4 * GIB
    assert config.cold_bytes == 25 * GIB
    assert (config.hot_device, config.hot_bytes) == ("off", 0)
    told = "\n".join(config.describe())
    assert "warm 4GiB" in told
    assert "a quarter of 16GiB available memory" in told
    assert "a quarter of 100GiB free disk" in told


def test_the_cold_default_stops_at_64_gib(settle: Settle, disk: dict[str, int]) -> None:
    disk["free"] = 10_000 * GIB
    assert settle().cold_bytes == 64 * GIB


def test_the_cold_default_does_not_shrink_with_every_restart(settle: Settle, disk: dict[str, int]) -> None:
    before = settle().cold_bytes
    disk.update(free=80 * GIB, used=20 * GIB)  # the tier filled up, then the daemon restarted
    assert settle().cold_bytes == before


def test_a_full_disk_turns_the_cold_default_off_and_says_so(settle: Settle, disk: dict[str, int]) -> None:
    disk["free"] = 1 << 20
    config = settle()
    assert config.cold_bytes == 0
    assert any("cold tier off" in note for note in config.notes)


def test_flags_win_over_the_file_and_the_file_over_defaults(settle: Settle) -> None:
    config = settle('warm_bytes = "2GiB"\ncold_bytes = "3GiB"\nlog_level = "DEBUG"', warm_bytes="1GiB")
    assert (config.warm_bytes, config.cold_bytes, config.log_level) == (1 * GIB, 3 * GIB, "debug")


def test_a_flag_that_was_not_given_leaves_the_file_alone(settle: Settle) -> None:
    assert settle('warm_bytes = "2GiB"', warm_bytes=None).warm_bytes == 2 * GIB


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "from-env.toml"
    path.write_text(f'warm_bytes = 67108864\nstate_dir = "{tmp_path}"\nsocket = "/run/k.sock"')
    config = load({}, environ={"KVSTORE_CONFIG": str(path)}, machine=FakeMachine())
    assert config.warm_bytes == 64 << 20


def test_zero_turns_cold_off(settle: Settle) -> None:
    config = settle(cold_bytes="0")
    assert config.cold_bytes == 0
    assert "cold off" in "\n".join(config.describe())


def test_socket_defaults_to_the_runtime_folder(tmp_path: Path) -> None:
    flags = {"state_dir": str(tmp_path)}
    assert str(load(flags, environ={}, machine=FakeMachine()).socket) == "/run/kvstore/kvstore.sock"
    config = load(flags, environ={"XDG_RUNTIME_DIR": "/run/user/7"}, machine=FakeMachine())
    assert config.address == "unix:/run/user/7/kvstore/kvstore.sock"
    assert str(config.attach_socket) == "/run/user/7/kvstore/kvstore.sock.attach"


def test_a_named_address_is_the_only_one_and_else_the_nearest_comes_first() -> None:
    usual = {"XDG_RUNTIME_DIR": "/run/user/7"}
    assert default_addresses({"KVSTORE_ADDRESS": "unix:/a.sock", **usual}) == ["unix:/a.sock"]
    assert default_addresses(usual) == ["unix:/run/user/7/kvstore/kvstore.sock", "unix:/run/kvstore/kvstore.sock"]
    assert default_addresses({}) == ["unix:/run/kvstore/kvstore.sock"]


def test_a_group_opens_the_socket_to_it(settle: Settle) -> None:
    config = settle(socket_group=str(os.getegid()))
    assert (config.socket_mode, config.socket_group) == (0o660, os.getegid())
    assert settle().socket_mode == 0o600
    assert settle(socket_mode="0640").socket_mode == 0o640
    assert settle("socket_mode = 0o660").socket_mode == 0o660


# The hot tier


def test_the_first_gpu_is_taken_where_there_is_one(settle: Settle) -> None:
    config = settle(machine=FakeMachine(gpus=1))
    assert (config.hot_device, config.hot_bytes, config.hot_permille) == ("cuda:0", 2 * GIB, 0)
    assert "hot_device auto: cuda:0, the first device" in config.notes
    assert settle(machine=FakeMachine(gpus=1), hot_device="off").hot_device == "off"
    assert settle(machine=FakeMachine(gpus=1), hot_bytes=0).hot_device == "off"
    assert settle(hot_device="cuda:7").hot_device == "cuda:7", "whether it is there the agent finds out"


def test_a_driver_is_found_where_the_daemon_finds_it_and_nothing_else_goes_on() -> None:
    wanted = {"LD_LIBRARY_PATH": "/opt/cuda", "CUDA_VISIBLE_DEVICES": "1", "CUDA_MPS_PIPE_DIRECTORY": "/run/mps"}
    assert config_module.device_environment(wanted | {"AWS_SECRET_ACCESS_KEY": "x", "HOME": "/h"}) == wanted


def test_a_share_of_the_device_is_told_from_a_size(settle: Settle) -> None:
    config = settle('hot_bytes = "4GiB"', hot_device="cuda:1", hot_bytes="12.5%")
    assert (config.hot_device, config.hot_bytes, config.hot_permille) == ("cuda:1", 0, 125)
    assert any("hot cuda:1 12.5% of free memory" in line for line in config.describe())
    config = settle('hot_bytes = "50%"', hot_device="cuda:1", hot_bytes="4GiB")
    assert (config.hot_bytes, config.hot_permille) == (4 * GIB, 0)
    assert settle(hot_bytes="50%").hot_device == "off"
    with pytest.raises(ConfigError, match="a share, which only a CUDA device has"):
        settle(hot_device="cpu", hot_bytes="50%")


@pytest.mark.parametrize("share", ["0%", "96%", "-5%", "half%", "%", "1e1%"])
def test_what_is_no_share_says_what_is(settle: Settle, share: str) -> None:
    with pytest.raises(ConfigError, match=r"hot-bytes: .* is not a share from 0.1% to 95%"):
        settle(hot_device="cuda:0", hot_bytes=share)


def test_the_stand_in_is_never_chosen_by_itself_and_says_what_it_is(settle: Settle) -> None:
    config = settle(hot_device="cpu", hot_bytes="64MiB")
    assert (config.hot_device, config.hot_bytes) == ("cpu", 64 << 20)
    assert any("stand-in" in note for note in config.notes)
    assert settle(hot_device="cpu", hot_bytes=0).hot_device == "off"
    assert settle(hot_bytes="1GiB").hot_device == "off"


# What is refused


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("warm_byts = 1", r"kvstored\.toml: warm_byts: unknown key; did you mean warm_bytes\?"),
        ("zzz = 1", r"zzz: unknown key; known keys: state_dir, socket"),
        ('warm_bytes = "8G"', r"kvstored\.toml: warm_bytes: '8G' has the unknown unit"),
        ("warm_bytes = true", r"warm_bytes: True is not a size"),
        ("warm_bytes = 1.5", r"warm_bytes: 1.5 is not a size"),
        ("warm_bytes = -1", r"warm_bytes: -1 is not a size"),
        ("warm_bytes = 4096", r"warm_bytes: 4KiB is too small; the least is 1MiB"),
        ("cold_bytes = 4096", r"cold_bytes: 4KiB is too small; the least is 16MiB, and 0 turns the cold tier off"),
        ('log_level = "loud"', r"log_level: 'loud' is none of debug, info"),
        ('socket_mode = "0777"', r"socket_mode: .* is not a socket mode"),
        ('socket_mode = "0440"', r"socket_mode: .* is not a socket mode"),
        ("socket_mode = 660", r"socket_mode: .* is not a socket mode"),
        ('socket_group = "no-such-group-here"', r"there is no group named 'no-such-group-here'"),
        ('hot_device = "gpu"', r"hot_device: 'gpu' is none of auto"),
        ("reader_threads = 0", r"reader_threads: 0 is not a whole number from 1 to 64"),
        ("max_sessions = 1000000", r"max_sessions: 1000000 is not a whole number"),
        ("drain_grace_s = -1", r"drain_grace_s: -1 is not a number of seconds"),
        ("lease_ttl_s = 0.5", r"lease_ttl_s: 0.5 s is too short; the least is 1 s"),
        ("agent_timeout_s = 0", r"agent_timeout_s: 0 s is too short; the least is 1 s"),
        ('codec = "zip"', r"codec: 'zip' is none of auto, raw, exphuf"),
        ('state_dir = ""', r"state_dir: '' is not a path"),
        ("tenants = 3", r"tenants: 3 is not a table"),
        ("[tenants.a]\nuid = [1]", r"tenants\.a\.uid: unknown key; did you mean uids\?"),
        ("[tenants.a]\nuids = 1", r"tenants\.a\.uids: 1 is not a list"),
        ("[tenants.a]\nwarm_bytes = 1048576", r"tenant 'a' has no uids, gids, sans or token_file"),
        ('[tenants."a b"]\nuids = [1]', r"'a b' is not a tenant's name"),
        ("[tenants.a]\nuids=[1]\n[tenants.b]\nuids=[1]", r"uid 1 is in 'a' and in 'b'"),
        ('[tenants.a]\nuids=[1]\nwarm_bytes="5GiB"', r"tenants\.a\.warm_bytes: 5GiB is more than the tier's 4GiB"),
        ("[tenants.a]\nuids=[4294967295]", r"tenants\.a\.uids: 4294967295 is neither the name nor the number"),
        ("warm_bytes =", r"kvstored\.toml: not valid TOML"),
    ],
)
def test_a_bad_value_says_where_what_and_what_instead(settle: Settle, toml: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settle(toml)


def test_a_bad_flag_is_called_as_it_was_typed(settle: Settle) -> None:
    with pytest.raises(ConfigError, match=r"^--warm-bytes: 'lots' is not a size"):
        settle(warm_bytes="lots")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"configuration file /no/such/file cannot be read: No such file"):
        load({}, "/no/such/file", environ={}, machine=FakeMachine())


def test_the_path_check_counts_the_attach_suffix(settle: Settle) -> None:
    longest = "/run/" + "s" * (107 - len("/run/") - len(".attach"))
    assert len(str(settle(socket=longest).attach_socket)) == 107
    with pytest.raises(ConfigError, match=r"too long: with '\.attach' it takes 108 bytes, the kernel allows 107"):
        settle(socket=longest + "s")


def test_the_path_check_counts_bytes_not_letters(settle: Settle) -> None:
    with pytest.raises(ConfigError, match="too long"):
        settle(socket="/run/" + "ü" * 60)


# Tenants


def test_without_a_table_our_own_user_is_the_default_tenant(settle: Settle) -> None:
    config = settle()
    assert config.tenant_of(os.geteuid(), []) == "default"
    assert config.tenant_of(os.geteuid() + 1, [12345]) is None


def test_the_socket_group_belongs_to_the_default_tenant(settle: Settle) -> None:
    assert settle(socket_group="54321").tenant_of(77777, [1, 54321]) == "default"


TABLE = '[tenants.a]\nuids=[70001]\ngids=[70]\nwarm_bytes="1GiB"\n[tenants.b]\nuids=[70002]\ngids=[71]\n'


def test_a_peer_is_placed_by_uid_first_then_by_group(settle: Settle) -> None:
    config = settle(TABLE)
    assert config.tenant_of(70002, [70]) == "b"
    assert config.tenant_of(70003, [5, 70]) == "a"
    assert config.tenant_of(70003, [5]) is None
    assert "tenant a: uids [70001], gids [70], warm at most 1GiB" in config.describe()


def test_a_table_does_not_lock_the_operator_out(settle: Settle) -> None:
    assert settle(TABLE).tenant_of(os.geteuid(), []) == "default"
    both = settle(TABLE + "[tenants.default]\nuids=[70009]\n")
    assert both.tenant_of(os.geteuid(), []) == both.tenant_of(70009, []) == "default"
    listed = settle(f"[tenants.ops]\nuids=[{os.geteuid()}]")
    assert [tenant.name for tenant in listed.tenants] == ["ops"]


# The state directory


def test_the_state_directory_is_made_for_us_alone(tmp_path: Path) -> None:
    folder = tmp_path / "var" / "state"
    prepare_state_dir(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    prepare_state_dir(folder)


@pytest.mark.parametrize(("mode", "who"), [(0o770, "group"), (0o707, "everybody"), (0o777, "everybody")])
def test_a_state_directory_that_others_may_change_is_refused(tmp_path: Path, mode: int, who: str) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"has mode {mode:04o}: {who}.* may write to it; run chmod 0700"):
        prepare_state_dir(tmp_path)


def test_a_state_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match=rf"belongs to uid {owner}, this daemon runs as uid {owner + 1}"):
        prepare_state_dir(tmp_path)


def test_a_file_in_the_place_of_the_state_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"state directory .* cannot be used: "):
        prepare_state_dir(tmp_path / "file")
