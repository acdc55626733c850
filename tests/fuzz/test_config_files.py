"""Configuration files of any content: a daemon that would start, or one clear sentence and exit code 2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fuzz_messages import fuzzing
from kvstore import app
from kvstore.cli.kvstored import main
from kvstore.config import Config, ConfigError, load
from kvstore.machine import Machine
from kvstore.settings import Settings

KEYS = sorted(name for name in Settings.__dataclass_fields__ if name != "tenants")
WORDS = (
    "8GiB",
    "64MiB",
    "0",
    "1.5GB",
    "9" * 30 + "TiB",
    "0600",
    "0777",
    "auto",
    "off",
    "cpu",
    "cuda:0",
    "debug",
    "adaptive",
    "raw",
    "numpy",
    "commit",
    "root",
    "nobody",
    "no such user",
    "~nobody/x",
    "~no-such-user/x",
    "",
    "\0",
    "²",
    "٣",
    "a" * 5000,
    "x/" * 2000,
    "unix:/run/k.sock",
    "\ud7ff\U0010ffff",
)
NUMBERS = (
    "0",
    "1",
    "-1",
    "7",
    "64",
    "0o600",
    "0x" + "f" * 5000,
    "9" * 5000,
    "1e400",
    "-0.0",
    "nan",
    "inf",
    "0.5",
    "1e-320",
)
OTHERS = (
    "true",
    "1979-05-27T07:32:00Z",
    "07:32:00",
    "[]",
    "[1, 1]",
    '["root", 0]',
    "[[]]",
    "{}",
    "{a = {}}",
    "[{}, 1]",
)

values = st.one_of(
    st.sampled_from(WORDS).map(json.dumps),
    st.text(max_size=8).map(json.dumps),
    st.sampled_from(NUMBERS),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(OTHERS),
)
names = st.one_of(st.sampled_from(KEYS), st.sampled_from(KEYS), st.sampled_from(("warm_byte", "", "tenants", "ünï")))
lines = st.builds(lambda name, value: f"{json.dumps(name) if name not in KEYS else name} = {value}", names, values)
tenant_keys = st.sampled_from(("uids", "gids", "warm_bytes", "cold_bytes", "colour"))
tenants = st.builds(
    lambda name, entries: f"[tenants.{json.dumps(name)}]\n" + "\n".join(f"{key} = {value}" for key, value in entries),
    st.one_of(st.sampled_from(("search", "default", "a b", "")), st.text(max_size=5)),
    st.lists(st.tuples(tenant_keys, values), max_size=3, unique_by=lambda both: both[0]),
)
documents = st.one_of(
    st.builds(
        lambda top, tables: "\n".join([*top, *tables]), st.lists(lines, max_size=4), st.lists(tenants, max_size=2)
    ),
    st.text(max_size=60),
).map(lambda text: text.encode("utf-8", "surrogatepass"))
junk = st.one_of(documents, documents, documents, st.binary(max_size=60))

HOSTILE = {
    "deep arrays": b"warm_bytes = " + b"[" * 50_000,
    "deep tables": b"a = " + b"{a = " * 10_000,
    "deep names": b"a" + b".a" * 1_000 + b" = 1",
    "a long number": b"warm_bytes = " + b"9" * 50_000,
    "a long hexadecimal number": b"warm_bytes = 0x" + b"f" * 50_000,
    "a long float": b"drain_grace_s = 1." + b"0" * 50_000,
    "a long key": b"k" * 50_000 + b" = 1",
    "a long file": b"# comment\n" * 10_000,
    "a long name of a folder": b'state_dir = "/tmp/' + b"x" * 300 + b'"',
    "a file as a folder": b'state_dir = "/proc/version/x"',
    "no UTF-8": b'socket = "\xff"',
    "a byte order mark": b"\xef\xbb\xbfwarm_bytes = 1",
    "NUL": b"\0" * 1000,
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Configurations that a daemon would have been started with."""
    configs: list[Config] = []
    monkeypatch.setattr(app, "run", configs.append)
    return configs


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "kvstored.toml"
    assert {path.name for path in tmp_path.iterdir()} <= {"kvstored.toml", "state"}, "something else was made"


def check_kvstored(file: Path, content: bytes, started: list[Config]) -> None:
    """Run it up to the point where the daemon would start, in a folder of the test's."""
    file.write_bytes(content)
    started.clear()
    flags = ["--config", str(file), "--state-dir", str(file.parent / "state"), "--socket", "/run/test/k.sock"]
    result = CliRunner().invoke(main, flags, env={"KVSTORE_CONFIG": ""})
    assert result.exception is None or isinstance(result.exception, SystemExit), f"{result.exception!r}"
    assert result.exit_code == (0 if started else 2), result.output
    if not started:
        assert result.stderr.startswith("kvstored: ")
        assert len(result.stderr) < 3000, "an error must not repeat a whole file"
    else:
        assert started[0].describe()


def test_any_file(file: Path, started: list[Config]) -> None:
    @fuzzing(300, "config")
    @given(junk)
    def is_settled_or_refused(content: bytes) -> None:
        check_kvstored(file, content, started)

    is_settled_or_refused()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(file: Path, started: list[Config], name: str) -> None:
    """Without the flags that win over the file: nothing is made, only asked for."""
    check_kvstored(file, HOSTILE[name], started)
    try:
        config = load({}, file, {}, Machine())
    except ConfigError as error:
        assert 0 < len(str(error)) < 3000
    else:
        assert config.describe()


def test_the_harness_finds_a_traceback(file: Path, started: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.config.Settings.parse", lambda raw, label: 1 // 0)
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        check_kvstored(file, b"warm_bytes = 1", started)
