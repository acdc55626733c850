"""The fake driver as the package that agents import: a folder for PYTHONPATH, and faults that a test switches on."""

from __future__ import annotations

import os
from pathlib import Path

_MODULE = '''"""Written by a test."""
from pathlib import Path
from fake_site import start
_driver = start(Path({folder!r}), {free_bytes})
def __getattr__(name):
    return getattr(_driver, name)
'''


class FakeSite:
    """A folder with a package `cuda.bindings` whose driver is FakeDriver's."""

    def __init__(self, folder: Path, free_bytes: int = 64 << 20) -> None:
        self.folder = folder
        package = folder / "cuda" / "bindings"
        package.mkdir(parents=True)
        (folder / "cuda" / "__init__.py").write_text("")
        (package / "__init__.py").write_text("")
        self._driver = package / "driver.py"
        self.has(free_bytes)

    def has(self, free_bytes: int) -> None:
        """The device of the next agent has so much memory."""
        self._driver.write_text(_MODULE.format(folder=str(self.folder), free_bytes=free_bytes))

    def environment(self) -> dict[str, str]:
        """Of a daemon whose agents are to find it."""
        return {**os.environ, "PYTHONPATH": os.pathsep.join([str(self.folder), str(Path(__file__).parent)])}

    def fault(self, name: str, what: str) -> None:
        """Let a function of the driver `hang`, or give the CUresult of a name, from now on."""
        (self.folder / f"{name}.fault").write_text(what)

    def mend(self, name: str) -> None:
        """Let it work again."""
        (self.folder / f"{name}.fault").unlink()


def start(folder: Path, free_bytes: int) -> object:
    """The driver of one process; told of faults by files, as its environment is the agent's own."""
    import threading

    from fake_cuda import CUresult, FakeDriver

    class Driver(FakeDriver):
        def __getattribute__(self, name: str) -> object:
            fault = folder / f"{name}.fault"
            if name.startswith("cu") and fault.exists():
                what = fault.read_text()
                if what == "hang":
                    return lambda *_: threading.Event().wait()
                return lambda *_: (CUresult[what],)
            return super().__getattribute__(name)

    return Driver(free_bytes)
